"""The GGUF reader against files of the `gguf` package, and against damaged ones."""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bezel.engine.gguf
from bezel.engine.errors import CheckpointError
from bezel.engine.gguf import GGUFFile

Q = gguf.GGMLQuantizationType
WriteGGUF = Callable[..., Path]

METADATA = {
    "gemma3.block_count": 18,
    "gemma3.rope.freq_base": 1e6,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["<pad>", "", "▁naïve", "🦄"],
    "tokenizer.ggml.scores": [-1.5, 0.0, 2.25],
    "flags": [True, False, True],
    "numbers": [7, -8],
}


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.fixture
def path(write_gguf: WriteGGUF) -> Path:
    return write_gguf("gemma3", METADATA, {"a.weight": values(3, 32), "b.weight": values(5)})


def header(num_tensors: int = 0, num_metadata: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_metadata)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def open_bytes(tmp_path: Path, content: bytes) -> GGUFFile:
    (tmp_path / "made.gguf").write_bytes(content)
    return GGUFFile(tmp_path / "made.gguf")


def test_metadata_of_every_kind(path: Path) -> None:
    metadata = GGUFFile(path).metadata
    assert metadata["general.architecture"] == "gemma3"
    assert {key: metadata[key] for key in METADATA} == METADATA
    assert metadata["flags"][1] is False


def test_64_bit_numbers(tmp_path: Path) -> None:
    entries = string("u") + struct.pack("<IQ", 10, 2**64 - 1)
    entries += string("i") + struct.pack("<Iq", 11, -(2**63))
    entries += string("f") + struct.pack("<Id", 12, 0.1)
    assert open_bytes(tmp_path, header(num_metadata=3) + entries).metadata == {
        "u": 2**64 - 1,
        "i": -(2**63),
        "f": 0.1,
    }


def test_tensors_are_where_the_gguf_package_says(path: Path) -> None:
    expected = {t.name: t for t in gguf.GGUFReader(path).tensors}
    tensors = GGUFFile(path).tensors
    assert list(tensors) == ["a.weight", "b.weight"] == list(expected)
    for name, tensor in tensors.items():
        assert tensor.offset == expected[name].data_offset
        assert tensor.num_bytes == expected[name].n_bytes
    assert tensors["a.weight"].shape == (3, 32)


def test_version_2_is_read_and_other_versions_are_refused(tmp_path: Path) -> None:
    assert open_bytes(tmp_path, header(version=2) + bytes(32)).metadata == {}
    with pytest.raises(CheckpointError, match="GGUF version 1;"):
        open_bytes(tmp_path, header(version=1))
    with pytest.raises(CheckpointError, match=r"GGUF version 50331648;.*little-endian"):
        open_bytes(tmp_path, header(version=3 << 24))


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q5_1, Q.TQ1_0], ids=str)
def test_quantised_tensors_are_read_as_the_gguf_package_does(
    write_gguf: WriteGGUF, monkeypatch: pytest.MonkeyPatch, kind: Q
) -> None:
    monkeypatch.setattr(bezel.engine.gguf, "_DEQUANTIZED_AT_ONCE", 600)  # two rows, not all seven
    original = values(7, 256)
    path = write_gguf("gemma3", {}, {"a.weight": original}, {"a.weight": kind})
    expected = gguf.dequantize(gguf.quantize(original, kind), kind)
    read = GGUFFile(path).read("a.weight")
    assert read.dtype == torch.float32
    assert torch.equal(read, torch.from_numpy(expected))


def test_some_rows_of_the_first_dimension(write_gguf: WriteGGUF) -> None:
    tensors = {"a.weight": values(7, 64), "experts": values(5, 3, 64), "b": values(40)}
    kinds = {"a.weight": Q.Q5_0, "experts": Q.Q4_1}
    file = GGUFFile(write_gguf("gemma3", {}, tensors, kinds))
    assert torch.equal(file.read("a.weight", slice(2, 5)), file.read("a.weight")[2:5])
    assert torch.equal(file.read("experts", slice(4, 5)), file.read("experts")[4:5])
    assert file.read("b", slice(None)).shape == (40,)


def test_four_bits_as_they_are_stored(write_gguf: WriteGGUF) -> None:
    """Under llama.cpp's rule the value of largest magnitude becomes −8 scales."""
    group = np.linspace(-4, 3.5, 32, dtype=np.float32)
    tensors = {"a": np.stack([group, -group, 2 * group]), "b": values(3, 32)}
    file = GGUFFile(write_gguf("gemma3", {}, tensors, {"a": Q.Q4_0, "b": Q.Q8_0}))
    parts = file.read_int4("a")
    assert parts is not None
    codes_NK, scale_NG, min_NG = parts
    assert scale_NG.tolist() == [[0.5], [-0.5], [1.0]] and min_NG.tolist() == [[4.0], [-4.0], [8.0]]
    assert codes_NK[0].tolist() == codes_NK[1].tolist() == codes_NK[2].tolist()
    assert codes_NK[0, 0] == 0 and codes_NK[0, -1] == 15
    assert torch.equal(scale_NG * codes_NK - min_NG, file.read("a"))
    last = file.read_int4("a", slice(2, 3))
    assert last is not None and last[1].tolist() == [[1.0]]
    assert file.read_int4("b") is None


def test_three_dimensions_keep_torch_order(write_gguf: WriteGGUF) -> None:
    original = values(2, 3, 4)
    file = GGUFFile(write_gguf("gemma4", {}, {"experts": original}))
    assert file.tensors["experts"].shape == (2, 3, 4)
    assert torch.equal(file.read("experts"), torch.from_numpy(original))


def test_a_type_nobody_dequantises_is_named(write_gguf: WriteGGUF) -> None:
    file = GGUFFile(write_gguf("gemma3", {}, {"ids": np.arange(4, dtype=np.int32)}))
    with pytest.raises(CheckpointError, match=r"tensor ids is of type I32"):
        file.read("ids")


def test_the_digest_tells_headers_and_sizes_apart(write_gguf: WriteGGUF) -> None:
    one = write_gguf("gemma3", {"x": 1}, {"a": values(32)}, name="1.gguf")
    same = write_gguf("gemma3", {"x": 1}, {"a": values(32)}, name="2.gguf")
    other = write_gguf("gemma3", {"x": 2}, {"a": values(32)}, name="3.gguf")
    digest = GGUFFile(one).header_digest()
    assert GGUFFile(same).header_digest() == digest
    assert GGUFFile(other).header_digest() != digest
    same.write_bytes(same.read_bytes() + b"more")
    assert GGUFFile(same).header_digest() != digest


def test_a_list_of_strings_is_held_against_the_file_before_it_is_read(tmp_path: Path) -> None:
    entry = header(num_metadata=1) + string("words") + struct.pack("<IIQ", 9, 8, 2)
    file = open_bytes(tmp_path, entry + string("good") + struct.pack("<Q", 1) + b"\xff")
    assert list(file.metadata) == ["words"] and len(file.metadata) == 1
    with pytest.raises(CheckpointError, match=r"made\.gguf is damaged: a string isn't UTF-8"):
        file.metadata["words"]
    with pytest.raises(CheckpointError, match="is truncated"):
        open_bytes(tmp_path, entry + string("good") + struct.pack("<Q", 1))


def test_a_token_is_found_without_reading_the_vocabulary(
    write_gguf: WriteGGUF, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second holds, not at its beginning, what "b" looks like in the file.
    within = "x" + "\x01" + "\x00" * 7 + "b"
    tokens = ["a", within, "bb", "", "b", "naïve", "b"]
    file = GGUFFile(write_gguf("gemma3", {"tokenizer.ggml.tokens": tokens}, {"a": values(32)}))
    with monkeypatch.context() as patch:
        patch.setattr("bezel.engine.gguf._Cursor.read", None)
        found = [file.token_id(text) for text in ("a", "b", "bb", "", "naïve", within, "x", "na")]
    assert found == [0, 4, 2, 3, 5, 1, None, None]
    assert file.metadata["tokenizer.ggml.tokens"] == tokens
    assert [file.token_id(text) for text in ("b", "x")] == [4, None]  # now that it has been read


def test_a_file_may_have_no_vocabulary(write_gguf: WriteGGUF) -> None:
    numbers = {"tokenizer.ggml.tokens": [1, 0, ord("a")]}  # int32: as "a" is written among strings
    for n, metadata in enumerate(({}, numbers)):
        path = write_gguf("gemma3", metadata, {"a": values(32)}, name=f"{n}.gguf")
        assert GGUFFile(path).token_id("a") is None


def test_files_that_are_no_gguf(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"made\.gguf is not a GGUF file"):
        open_bytes(tmp_path, b"PK\x03\x04 something else")
    with pytest.raises(CheckpointError, match="is empty"):
        open_bytes(tmp_path, b"")
    with pytest.raises(CheckpointError, match="can't be read: No such file"):
        GGUFFile(tmp_path / "absent.gguf")


def test_every_truncation_is_reported(path: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    last = GGUFFile(path).tensors["b.weight"]
    for end in range(1, last.offset + last.num_bytes):
        with pytest.raises(CheckpointError, match=r"made\.gguf is (truncated|not a GGUF file)"):
            open_bytes(tmp_path, content[:end])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (header(num_metadata=1) + struct.pack("<Q", 2**63), "is truncated"),
        (header(num_metadata=2**62), "is truncated"),
        (header(num_tensors=2**62), "is truncated"),
        (header(num_metadata=1) + string("k") + struct.pack("<IIQ", 9, 8, 2**62), "is truncated"),
        (header(num_metadata=1) + string("k") + struct.pack("<IIQ", 9, 4, 2**62), "is truncated"),
        (header(num_metadata=1) + string("k") + struct.pack("<IIQ", 9, 9, 1), "'k' is of type 9"),
        (header(num_metadata=1) + string("k") + struct.pack("<I", 77), "'k' is of type 77"),
        (header(num_metadata=1) + struct.pack("<Q", 2) + b"\xff\xfe", "isn't UTF-8"),
        (
            header(num_metadata=1) + string("general.alignment") + struct.pack("<II", 4, 0),
            "general.alignment is 0",
        ),
        (header(1) + string("t") + struct.pack("<I", 2**31), "'t' has 2147483648 dimensions"),
        (header(1) + string("t") + struct.pack("<IQIQ", 1, 0, 0, 0), r"F32 tensor t has shape"),
        (header(1) + string("t") + struct.pack("<IQIQ", 1, 33, 8, 0), r"Q8_0 tensor t has shape"),
        (header(1) + string("t") + struct.pack("<IQIQ", 1, 8, 99, 0), "unknown type 99"),
        (header(1) + string("t") + struct.pack("<IQIQ", 1, 8, 0, 2**60), "t ends at byte 11529"),
        (
            header(1) + string("t") + struct.pack("<I3QIQ", 3, 2**60, 2**60, 2**60, 0, 0),
            "is truncated: tensor t",
        ),
        (header(2) + 2 * (string("t") + struct.pack("<IQIQ", 1, 8, 0, 0)), "two tensors called"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_headers(tmp_path: Path, content: bytes, problem: str) -> None:
    padding = bytes(96)
    with pytest.raises(CheckpointError, match=problem):
        open_bytes(tmp_path, content + (padding if "truncated" not in problem else b""))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 600), replacement=st.binary(min_size=1, max_size=8))
def test_damaged_bytes_never_cause_another_error(
    path: Path, tmp_path: Path, at: int, replacement: bytes
) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(replacement)] = replacement
    try:
        file = open_bytes(tmp_path, bytes(content))
        dict(file.metadata)
        for name in file.tensors:
            file.read(name)
    except CheckpointError:
        pass
