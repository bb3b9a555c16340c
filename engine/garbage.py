"""Garbage collection while a process starts.

What is imported stays. Python goes through all of it again and again all the same, each time that
there is a quarter more, and later in every full collection.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Import in such a block, or build what stays: collections never look at it."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
