"""Modules with a bug put into them, to see whether the tests notice."""

import importlib.util
import inspect
import itertools
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

_serial = itertools.count()


@contextmanager
def mutated(module: ModuleType, old: str, new: str, count: int = 1) -> Iterator[ModuleType]:
    """A second copy of `module`, in whose source the first `count` (0: all) `old` are `new`.

    The module itself, and whatever others have imported from it, stay as they are.
    """
    source = inspect.getsource(module)
    assert old in source, f"{module.__name__} has no {old!r}"
    name = f"mutant_{next(_serial)}_of_{module.__name__.rpartition('.')[2]}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.py")
        path.write_text(source.replace(old, new, count or -1), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        mutant = importlib.util.module_from_spec(spec)
        sys.modules[name] = mutant  # dataclasses look themselves up there
        try:
            spec.loader.exec_module(mutant)
            yield mutant
        finally:
            del sys.modules[name]
