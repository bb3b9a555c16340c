"""Whether a grammar can be enforced, found out before the engine gets it.

    check ─▶ seen before? ─▶ worker process, for a few seconds at most ─▶ 400 with the reason

One grammar at a time; what takes too long is refused and the worker replaced.
"""

import asyncio
import hashlib
import multiprocessing
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from bezel.engine.errors import GrammarError
from bezel.engine.tokenizer import Tokenizer
from bezel.server.grammars.worker import run_worker

_TIMEOUT_S = 5.0  # of the clock, most of which a busy machine may give to others
_START_TIMEOUT_S = 60.0
_MAX_VERDICTS = 4096


class GrammarChecker:
    """Made in no time: the worker starts with the first grammar, and ends with this process."""

    def __init__(self, tokenizer: Tokenizer, timeout_s: float = _TIMEOUT_S) -> None:
        self._tokenizer, self._timeout_s = tokenizer, timeout_s
        self._flaws: OrderedDict[bytes, str] = OrderedDict()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")
        self._worker: tuple[SpawnProcess, Connection] | None = None

    async def check(self, grammar: str) -> None:
        """Return if the engine can enforce it.

        Raises:
            GrammarError: it isn't a grammar, contradicts itself, or costs too much.
        """
        key = hashlib.blake2b(grammar.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key not in self._flaws:
            loop = asyncio.get_running_loop()
            self._flaws[key] = await loop.run_in_executor(self._thread, self._flaw, grammar)
        self._flaws.move_to_end(key)
        if len(self._flaws) > _MAX_VERDICTS:
            self._flaws.popitem(last=False)
        if flaw := self._flaws[key]:
            raise GrammarError(f"What the output must be can't be enforced: {flaw}.")

    def close(self) -> None:
        """End the worker, after the grammar it may be at."""
        self._thread.shutdown()
        self._stop()

    def _flaw(self, grammar: str) -> str:
        try:
            connection = self._connection()
            connection.send(grammar)
            if connection.poll(self._timeout_s):
                flaw: str = connection.recv()
                return flaw
            flaw = f"it takes more than {self._timeout_s:g} s to compile"
        except (EOFError, OSError):  # it ran out of memory, or into a bug of the compiler's
            flaw = "it is too much for the compiler"
        self._stop()
        return flaw

    def _connection(self) -> Connection:
        """To a worker that waits for a grammar."""
        if self._worker is not None and not self._worker[0].is_alive():
            self._stop()  # somebody has ended it, as a signal to all of a service's processes does
        if self._worker is None:
            spawn = multiprocessing.get_context("spawn")
            ours, theirs = spawn.Pipe()
            names = {
                i: self._tokenizer.decode([i], skip_special_tokens=False)
                for i in self._tokenizer.special_token_ids
            }
            size = max(self._tokenizer.vocab_size, *(i + 1 for i in names))
            process = spawn.Process(target=run_worker, args=(theirs, names, size), daemon=True)
            process.start()
            theirs.close()
            self._worker = process, ours
            if not ours.poll(_START_TIMEOUT_S):
                raise EOFError
            ours.recv()
        return self._worker[1]

    def _stop(self) -> None:
        if self._worker is not None:
            process, connection = self._worker
            process.kill()
            process.join()
            connection.close()
            self._worker = None
