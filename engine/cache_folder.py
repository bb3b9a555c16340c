"""Where Bezel keeps files it derived from others: the embedded model, converted tokenizers.

Everything in it can be deleted at any time; the next start makes it again.
"""

from pathlib import Path

from bezel.engine.errors import CheckpointError


def default_cache_root() -> Path:
    """`~/.cache/bezel`.

    Raises:
        CheckpointError: the user has no home directory.
    """
    try:
        return Path.home() / ".cache" / "bezel"
    except RuntimeError as error:
        raise CheckpointError("no home directory to keep a cache in; set HOME") from error
