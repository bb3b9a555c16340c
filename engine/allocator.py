"""What the C library's allocator keeps of memory that was freed. Only glibc keeps much and can be
told, so elsewhere nothing happens."""

import ctypes
import sys
from typing import Any

# Of glibc's malloc.h. It takes 32 MiB as the second at most, on machines of 64 bits.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _LARGEST_KEPT_BYTES = 256 << 20, 32 << 20


def release_freed_memory() -> None:
    """Hand it back to the system, after something large was read; tens of milliseconds."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def keep_freed_memory() -> bool:
    """Keep up to 256 MiB of it from now on, in pieces of up to 32 MiB; whether that can be had.

    Every step takes the same memory for its activations. Returned to the system it comes back as
    fresh pages, which can take a tenth of the time of a prefill.
    """
    set_option = _function("mallopt")
    return set_option is not None and all(
        set_option(option, num_bytes) == 1
        for option, num_bytes in (
            (_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES),
            (_M_TRIM_THRESHOLD, _KEPT_BYTES),
        )
    )


def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
