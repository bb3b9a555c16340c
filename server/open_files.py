"""How many files, and so connections, the system lets this process have open."""

import logging
import sys

logger = logging.getLogger("bezel")

# Beside connections: what runs the process, the engine's sockets, files that are read.
_NUM_OTHERS = 256


def allow_connections(num: int) -> None:
    """Have the system allow so many, or as many as it may; too few are told in the log."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num + _NUM_OTHERS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        logger.warning(
            "the system allows %d open files, so not all of %d connections (--max-connections)",
            allowed,
            num,
        )
