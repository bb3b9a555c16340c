"""Garbage collection while a process starts."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from bezel.engine.garbage import nothing_collected


class Ring:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_what_is_made_meanwhile_is_left_out_of_collections() -> None:
    with nothing_collected():
        assert not gc.isenabled()
        early = weakref.ref(Ring())
    late = weakref.ref(Ring())
    assert gc.isenabled()
    gc.collect()
    assert early() is not None
    assert late() is None


def test_collections_go_on_after_an_error() -> None:
    with pytest.raises(ImportError), nothing_collected():
        raise ImportError
    assert gc.isenabled()
