"""What the C library's allocator keeps of memory that was freed."""

import ctypes
import sys


def release_freed_memory() -> None:
    """Hand it back to the system, after something large was read; tens of milliseconds.

    Only glibc keeps much and can be told, so elsewhere nothing happens.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
