"""Downloading a checkpoint from the Hugging Face hub into its own cache.

`huggingface_hub` resumes, verifies and finds what is there already; it takes token, endpoint and
offline mode from its usual environment variables. This module picks the files and turns its
exceptions into one line for the user.
"""

from collections.abc import Sequence
from pathlib import Path

from bezel.engine.errors import CheckpointError

# No pickles, no images, no GGUF variants.
_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")


def download_config(repo_id: str, revision: str | None = None) -> Path:
    """The config.json of a repository, and nothing else of it.

    Raises:
        CheckpointError: as `download`, or there is none.
    """
    path = download(repo_id, revision, ["config.json"]) / "config.json"
    if not path.exists():
        raise CheckpointError(f"{repo_id} has no config.json on the Hugging Face hub")
    return path


def download(repo_id: str, revision: str | None = None, files: Sequence[str] = _FILES) -> Path:
    """The directory with the snapshot of a repository: those of its `files` that it has.

    Raises:
        CheckpointError: no such repository, no access to it, or no connection.
    """
    # A tenth of a second that local checkpoints don't need.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(files)))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id} is gated: accept its terms on https://huggingface.co/{repo_id}, "
            "then set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} is neither a local path nor on the Hugging Face hub "
            "(a private one needs HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo_id} has no revision {revision!r}") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} is neither a local path nor in the hub's cache, "
            "and the Hugging Face hub can't be reached"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} can't be a hub id: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{repo_id} can't be downloaded: {error}") from error
