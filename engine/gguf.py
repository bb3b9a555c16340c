"""Reading GGUF files, versions 2 and 3, little-endian.

    header      "GGUF"  version  num_tensors  num_metadata
    metadata    num_metadata × (key, type, value)
    tensors     num_tensors × (name, dims, type, offset)
    padding     up to a multiple of general.alignment
    data        each tensor at data_start + its offset

The file is mapped, and only the header is parsed before a tensor is asked for. Every count, length
and offset is held against the size of the file before it is used: a damaged or hostile file is a
`CheckpointError`, not a traceback or a huge allocation. What the values mean is not known here:
see `gguf_config` and `gguf_tensors`.
"""

import hashlib
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import gguf
import numpy as np

from bezel.engine.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_MAX_DIMS = 4
# Values; small enough for the scratch arrays of `gguf.dequantize` to stay in the CPU's cache.
_DEQUANTIZED_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies. `shape` is in torch order (rows first), `offset` counts from byte 0."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


class GGUFFile:
    """Metadata and tensors of one file.

    Raises:
        CheckpointError: the file can't be opened, isn't a GGUF, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = _map(path)
        header = _Cursor(path, self._data)
        num_tensors, num_metadata = header.counts()
        self.metadata = _Metadata(header, num_metadata)
        infos = [header.tensor_info() for _ in range(num_tensors)]
        data_start = header.data_start(self.metadata.get("general.alignment", 32))
        self._header_bytes = header.position
        self.tensors: dict[str, GGUFTensor] = {}
        for info in infos:
            tensor = header.place(info, data_start)
            if tensor.name in self.tensors:
                header.fail(f"has two tensors called {tensor.name!r}")
            self.tensors[tensor.name] = tensor

    def header_digest(self) -> str:
        """Hex digest of the header and the file's size: enough to tell two checkpoints apart."""
        digest = hashlib.sha256(self._data[: self._header_bytes])
        digest.update(_U64.pack(len(self._data)))
        return digest.hexdigest()

    def token_id(self, text: str) -> int | None:
        """The id of the token spelled so, if there is one; the vocabulary isn't read for that."""
        return self.metadata.index("tokenizer.ggml.tokens", text)

    def read(self, name: str, rows: slice = slice(None)) -> "torch.Tensor":
        """The values of a tensor as float32, or of some of its first dimension's rows.

        Raises:
            CheckpointError: the tensor's type can't be dequantised.
        """
        import torch  # the API process reads metadata only and stays without it

        from bezel.kernels.cpu.gguf_blocks import dequantize

        tensor = self.tensors[name]
        raw_NB, shape = self._raw(tensor, rows)
        values_NK = dequantize(raw_NB, tensor.type)
        if values_NK is None:
            values_NK = self._dequantize_slowly(tensor, raw_NB)
        self._release()
        return torch.from_numpy(values_NK.reshape(shape))

    def read_int4(
        self, name: str, rows: slice = slice(None)
    ) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None":
        """Of a 2-D tensor in a format of 4 bits: codes_NK uint8 from 0 to 15 and for each group of
        32 columns scale_NG and min_NG, float32, so that w = scale·code − min without rounding.

        None if the tensor isn't stored so.
        """
        import torch

        from bezel.kernels.cpu.gguf_blocks import split_int4

        tensor = self.tensors[name]
        raw_NB, _ = self._raw(tensor, rows)
        parts = split_int4(raw_NB, tensor.type)
        if parts is None:
            return None
        self._release()
        codes_NK, scale_NG, min_NG = map(torch.from_numpy, parts)
        return codes_NK, scale_NG, min_NG

    def _release(self) -> None:
        """No longer count what was read as this process's memory; the system goes on caching it."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)

    def _raw(self, tensor: GGUFTensor, rows: slice) -> tuple[np.ndarray[Any, Any], tuple[int, ...]]:
        """Bytes by row of the last dimension, and the shape of what they hold."""
        raw = np.frombuffer(self._data, np.uint8, tensor.num_bytes, tensor.offset)
        if len(tensor.shape) == 1:
            return raw.reshape(1, -1), tensor.shape
        raw = raw.reshape(*tensor.shape[:-1], -1)[rows]
        return raw.reshape(-1, raw.shape[-1]), (*raw.shape[:-1], tensor.shape[-1])

    def _dequantize_slowly(
        self, tensor: GGUFTensor, raw_NB: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        """By `gguf.dequantize`, a few rows at a time."""
        columns = tensor.shape[-1]
        values_NK = np.empty((len(raw_NB), columns), np.float32)
        step = max(1, _DEQUANTIZED_AT_ONCE // columns)
        for row in range(0, len(raw_NB), step):
            try:
                values_NK[row : row + step] = gguf.dequantize(raw_NB[row : row + step], tensor.type)
            except NotImplementedError as error:
                raise CheckpointError(
                    f"{self.path}: tensor {tensor.name} is of type {tensor.type.name}, "
                    "which can't be dequantised"
                ) from error
        return values_NK


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is empty, not a GGUF file") from error


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True, slots=True)
class _Unread:
    """A list that lies in the file and hasn't been read: of strings, or of numbers of a `dtype`."""

    start: int
    end: int
    count: int
    dtype: np.dtype[Any] | None = None


class _Metadata(Mapping[str, Any]):
    """Lists are read when they are asked for: a vocabulary has 262,144 strings and as many scores,
    and whoever wants tensors wants none."""

    def __init__(self, cursor: "_Cursor", count: int) -> None:
        self._cursor = cursor
        self._values = dict(cursor.entry() for _ in range(count))

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _Unread):
            value = self._values[key] = self._cursor.read(value)
        return value

    def index(self, key: str, text: str) -> int | None:
        """Where `text` stands in a list of strings, if it does; the list isn't read for that."""
        value = self._values.get(key)
        if isinstance(value, _Unread) and value.dtype is None:
            return self._cursor.index(value, text)
        return value.index(text) if isinstance(value, list) and text in value else None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class _Cursor:
    """Walks the header; `position` is the next byte to read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path} {problem}")

    def counts(self) -> tuple[int, int]:
        """Check magic and version, and return the numbers of tensors and of metadata entries."""
        if self.data[:4] != b"GGUF":
            self.fail("is not a GGUF file")
        self.position = 4
        version = self._u32()
        if version not in (2, 3):
            self.fail(f"is of GGUF version {version}; versions 2 and 3, little-endian, are read")
        return self._u64(), self._u64()

    def entry(self) -> tuple[str, Any]:
        """Key and value of a metadata entry, a list as `_Unread`."""
        key = self._string()
        return key, self._value(key)

    def tensor_info(self) -> _TensorInfo:
        name = self._string()
        num_dims = self._u32()
        if not 1 <= num_dims <= _MAX_DIMS:
            self.fail(f"is damaged: tensor {name!r} has {num_dims} dimensions")
        # Stored fastest-moving dimension first, the other way round than in torch.
        shape = tuple(reversed([self._u64() for _ in range(num_dims)]))
        return _TensorInfo(name, shape, type_id=self._u32(), offset=self._u64())

    def data_start(self, alignment: Any) -> int:
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            self.fail(f"is damaged: general.alignment is {alignment!r}, not a power of two")
        return -(-self.position // alignment) * alignment

    def place(self, info: _TensorInfo, data_start: int) -> GGUFTensor:
        """Resolve type and offset of a tensor, and check that all its bytes are in the file."""
        if info.type_id not in gguf.GGML_QUANT_SIZES:
            self.fail(f"has a tensor {info.name} of the unknown type {info.type_id}")
        tensor_type = gguf.GGMLQuantizationType(info.type_id)
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
        if prod(info.shape) < 1 or info.shape[-1] % block_values:
            self.fail(f"is damaged: {tensor_type.name} tensor {info.name} has shape {info.shape}")
        num_bytes = prod(info.shape) // block_values * block_bytes
        offset = data_start + info.offset
        if offset + num_bytes > len(self.data):
            self.fail(
                f"is truncated: tensor {info.name} ends at byte {offset + num_bytes}, "
                f"the file at {len(self.data)}"
            )
        return GGUFTensor(info.name, info.shape, tensor_type, offset, num_bytes)

    def _take(self, num_bytes: int) -> int:
        """Step over `num_bytes`, and return where they start."""
        start, end = self.position, self.position + num_bytes
        if end > len(self.data):
            self.fail(f"is truncated: the header goes on after byte {len(self.data)}")
        self.position = end
        return start

    def _u32(self) -> int:
        value: int = _U32.unpack_from(self.data, self._take(4))[0]
        return value

    def _u64(self) -> int:
        value: int = _U64.unpack_from(self.data, self._take(8))[0]
        return value

    def _value(self, key: str) -> Any:
        kind = self._u32()
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self.read(self._numbers(key, kind, 1))[0]
        kind, count = self._u32(), self._u64()
        return self._skip_strings(count) if kind == _STRING else self._numbers(key, kind, count)

    def _numbers(self, key: str, kind: int, count: int) -> _Unread:
        if kind not in _SCALARS:
            self.fail(f"is damaged: metadata {key!r} is of type {kind}")
        dtype = _SCALARS[kind]
        start = self._take(count * dtype.itemsize)
        return _Unread(start, self.position, count, dtype)

    def _string(self) -> str:
        text: str = self.read(self._skip_strings(1))[0]
        return text

    def _skip_strings(self, count: int) -> _Unread:
        start = position = self.position
        data, length_at = self.data, _U64.unpack_from
        try:
            for _ in range(count):
                position += 8 + length_at(data, position)[0]
        except (struct.error, IndexError, OverflowError):
            position = len(data) + 1
        self._take(position - start)
        return _Unread(start, position, count)

    def index(self, strings: _Unread, text: str) -> int | None:
        """Where `text` stands among strings that were stepped over."""
        encoded = text.encode()
        encoded = _U64.pack(len(encoded)) + encoded
        position = strings.start
        place = self.data.find(encoded, position, strings.end)
        for i in range(strings.count):
            if place in (-1, position):
                return None if place == -1 else i
            position += 8 + _U64.unpack_from(self.data, position)[0]
            if position > place:  # it began within a string
                place = self.data.find(encoded, position, strings.end)
        return None

    def read(self, values: _Unread) -> list[Any]:
        """What was stepped over."""
        if values.dtype is not None:
            numbers: list[Any]
            numbers = np.frombuffer(self.data, values.dtype, values.count, values.start).tolist()
            return numbers
        position, read = values.start, []
        try:
            for _ in range(values.count):
                start = position + 8
                position = start + _U64.unpack_from(self.data, position)[0]
                read.append(self.data[start:position].decode())
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path} is damaged: a string isn't UTF-8") from error
        return read
