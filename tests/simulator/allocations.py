"""Memory that torch hands out without anything in it."""

from typing import TYPE_CHECKING, Any

import torch
from simulator.memory import MAX_TRACKED
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from simulator.watch import Watch

_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


class Allocations(TorchDispatchMode):
    """Poisons what `torch.empty` returns, and notes what torch operations write themselves."""

    def __init__(self, watch: "Watch") -> None:
        super().__init__()
        self._watch = watch

    def poison(self, x: torch.Tensor) -> None:
        """Fill with NaN or huge integers, and take reads for bugs until a kernel stores."""
        if x.numel() == 0:
            return
        memory = self._watch.memory(x)
        memory.set_undefined(x, True)
        if x.numel() <= MAX_TRACKED:
            x.fill_(torch.nan if x.is_floating_point() else _huge(x.dtype))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            self.poison(result)
            return result
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._define(args[i] if i < len(args) else (kwargs or {}).get(argument.name))
        return result

    def _define(self, value: Any) -> None:
        for x in tree_leaves(value):
            if isinstance(x, torch.Tensor) and x.numel():
                memory = self._watch.known_memory(x)
                if memory is not None:
                    memory.set_undefined(x, False)


def _huge(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max // 3
