"""Memory that was freed is there for the next step, in a process of its own."""

import platform
import subprocess
import sys

import pytest

# Faults, each for a new page, of steps that take, write and free the same memory.
SOURCE = """
import ctypes, resource, sys
from bezel.engine.allocator import keep_freed_memory, release_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults_of_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [libc.malloc(100_000) for _ in range(400)]
    for piece in pieces:
        libc.memset(piece, 1, 100_000)
    for piece in pieces:
        libc.free(piece)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    assert keep_freed_memory()
first, second = faults_of_step(), faults_of_step()
release_freed_memory()
print(first, second, faults_of_step())
"""
PAGES = 400 * 100_000 // 4096


def faults(how: str) -> list[int]:
    command = [sys.executable, "-c", SOURCE, how]
    return list(map(int, subprocess.check_output(command, text=True).split()))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_step_gets_the_memory_of_the_one_before() -> None:
    first, second, after_release = faults("keep")
    assert first > PAGES * 0.9
    assert second < PAGES * 0.1
    assert after_release > PAGES * 0.9, "what was kept can be handed back all the same"
    assert faults("leave")[1] > PAGES * 0.9, "or nothing is gained"
