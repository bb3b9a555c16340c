"""Importing torch without what the engine has no use for.

`import torch` defines what its compiler and its exporter need, too: a third of its time. Whoever
looks at anything in one of these modules still gets it as it is. Python's own `LazyLoader` won't
do, as torch itself asks every module for its file while it is imported.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PUT_OFF = frozenset(
    {
        "torch._meta_registrations",
        "torch.distributed._meta_registrations",
        "torch.export",
    }
)


class _Unread(ModuleType):
    """A module whose code is run when something is asked for that isn't there yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # as anybody asks who looks at all modules
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None
        loader = self.__spec__.loader
        assert isinstance(loader, _LazyLoader)
        loader.loader.exec_module(self)
        return getattr(self, name)


class _LazyLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = _Unread


class _LazyFinder:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in PUT_OFF:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _LazyLoader(spec.loader)
        return spec


@contextmanager
def heavy_parts_put_off() -> Iterator[None]:
    """Import torch in such a block, before anything else does."""
    sys.meta_path.insert(0, _LazyFinder)
    try:
        yield
    finally:
        sys.meta_path.remove(_LazyFinder)


def import_torch() -> None:
    """Import torch ahead of all that needs it, and keep Triton from being imported where there is
    no GPU: `kernels.jit` then does without it, as on systems that have none."""
    with heavy_parts_put_off():
        import torch
    if not torch.cuda.is_available():
        sys.modules.setdefault("triton", None)  # type: ignore[arg-type]  # which makes it missing
