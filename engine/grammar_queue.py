"""Requests with a grammar, until it is compiled.

The compiler is made when the first of them comes, for it takes seconds, and memory, that others
needn't spend; by a thread, so that the others go on meanwhile.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait

from bezel.engine.errors import BezelError
from bezel.engine.grammar import GrammarCompiler, GrammarState
from bezel.engine.messages import AddSequence


class GrammarQueue:
    """Belongs to the engine's thread; the other one runs `make_compiler` and nothing else."""

    def __init__(self, make_compiler: Callable[[], GrammarCompiler]) -> None:
        self._make_compiler = make_compiler
        self._compiler: Future[GrammarCompiler] | None = None
        self._waiting: dict[str, AddSequence] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: AddSequence) -> None:
        self._waiting[request.request_id] = request
        if self._compiler is None:
            self._compiler = Future()
            # A daemon: an engine that is to end doesn't wait for it.
            threading.Thread(
                target=_fulfil,
                args=(self._compiler, self._make_compiler),
                name="grammar-compiler",
                daemon=True,
            ).start()

    def remove(self, request_id: str) -> None:
        """Forget one that was ended; nothing happens if it isn't there."""
        self._waiting.pop(request_id, None)

    def take(self, timeout_s: float) -> Iterator[tuple[AddSequence, GrammarState | BezelError]]:
        """All of them, in order, each with its grammar or why there is none; nothing if there is
        no compiler after `timeout_s`."""
        if not self._waiting:
            return
        assert self._compiler is not None
        if not wait([self._compiler], timeout_s).done:
            return
        waiting, self._waiting = self._waiting, {}
        try:
            compiler = self._compiler.result()
        except BezelError as error:
            self._compiler = None  # whoever comes next may have more luck
            yield from ((request, error) for request in waiting.values())
            return
        for request in waiting.values():
            yield request, _compiled(compiler, request)


def _fulfil(future: Future[GrammarCompiler], make: Callable[[], GrammarCompiler]) -> None:
    try:
        future.set_result(make())
    except Exception as error:
        # For the engine's thread, which ends of those that aren't a user's.
        future.set_exception(error)


def _compiled(compiler: GrammarCompiler, request: AddSequence) -> GrammarState | BezelError:
    assert request.params.grammar is not None
    try:
        return compiler.compile(request.params.grammar)
    except BezelError as error:
        return error
