"""From token ids to text: the one way by which both routes, streamed or not, get their answer.

    engine.generate ─▶ detokenizer, stop strings ─▶ Delta ─▶ queue ─▶ deltas()

One task per sequence fills the queue, so waiting for it can time out (for keep-alive
comments) without touching the engine's generator. Leaving `generating` ends the tasks, and
with them aborts what still runs, in whatever phase it is.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from bezel.engine.detokenizer import IncrementalDetokenizer
from bezel.engine.errors import BezelError, Overloaded
from bezel.engine.messages import FinishReason, SequenceOutput
from bezel.engine.metrics import SequenceMetrics
from bezel.engine.sampling_params import SamplingParams
from bezel.server.errors import GenerationFailed
from bezel.server.state import ServedModel, ServerState


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """One sequence to generate, and how its tokens become text."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of the sequence `index`, and the tokens it was made of.

    Either may be empty: text that could yet become a stop string is held back.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None


class Generation:
    """All sequences of one HTTP request."""

    def __init__(self, state: ServerState, requests: Sequence[TextRequest]) -> None:
        model = state.loaded_model()
        self._queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self._num_unfinished = len(requests)
        self._refusal: Exception | None = None
        self._tasks = [
            asyncio.create_task(self._fill(_deltas(state, model, index, request)))
            for index, request in enumerate(requests)
        ]

    async def _fill(self, deltas: AsyncIterator[Delta]) -> None:
        try:
            async for delta in deltas:
                self._queue.put_nowait(delta)
        except Exception as error:
            # Not swallowed: `admit` or `deltas` raises it to whoever waits.
            self._refusal = error
            self._queue.put_nowait(error)

    async def admit(self) -> None:
        """Give the engine the chance to refuse; it does so before it first suspends.

        Raises:
            Overloaded, EngineUnavailable: it did.
        """
        await asyncio.sleep(0)
        if self._refusal is not None:
            raise self._refusal

    async def deltas(self, idle_s: float | None = None) -> AsyncIterator[Delta | None]:
        """Yield what comes, in order; None whenever nothing came for `idle_s` seconds.

        Raises:
            BezelError: the engine, or `fail`, ended a sequence with it.
        """
        while self._num_unfinished:
            try:
                async with asyncio.timeout(idle_s):
                    item = await self._queue.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(item, Exception):
                raise item
            if item.finish_reason is not None:
                self._num_unfinished -= 1
            yield item

    def fail(self, error: BezelError) -> None:
        """Make whoever waits for deltas get an error after those that have come already."""
        self._queue.put_nowait(error)

    async def close(self) -> None:
        """Abort what still runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def generating(
    state: ServerState, requests: Sequence[TextRequest]
) -> AsyncIterator[Generation]:
    """Have sequences generated for as long as the block runs.

    Raises:
        Overloaded, EngineUnavailable: the engine doesn't take them.
    """
    state.require_ready()
    generation = Generation(state, requests)
    try:
        with state.in_flight.member(generation):
            await generation.admit()
            yield generation
    finally:
        await generation.close()


async def _deltas(
    state: ServerState, model: ServedModel, index: int, request: TextRequest
) -> AsyncIterator[Delta]:
    """One sequence as text, with its metrics."""
    metrics = state.metrics.sequence(len(request.prompt_ids))
    reason: FinishReason | None = FinishReason.ABORT
    try:
        async for delta in _decode(model, index, request, metrics):
            reason = delta.finish_reason or reason
            yield delta
    except Overloaded:
        reason = None  # it never began
        raise
    except Exception:
        reason = FinishReason.ERROR
        raise
    finally:
        if reason is not None:
            metrics.observe_finished(reason)


async def _decode(
    model: ServedModel, index: int, request: TextRequest, metrics: SequenceMetrics
) -> AsyncIterator[Delta]:
    detokenizer = IncrementalDetokenizer(
        model.tokenizer,
        request.stop,
        include_stop=request.include_stop,
        skip_special_tokens=request.skip_special_tokens,
    )
    stop_token_ids = {*model.engine.info.eos_token_ids, *request.params.stop_token_ids}
    outputs = model.engine.generate(request.request_id, request.prompt_ids, request.params)
    async with aclosing(outputs):
        async for output in outputs:
            hidden = 0 if request.include_stop else _num_stop_tokens(output, stop_token_ids)
            text, num_tokens = _push(detokenizer, output.token_ids, hidden)
            metrics.observe_tokens(num_tokens)
            reason = output.finish_reason
            if reason is not None:
                text += detokenizer.flush()
            if detokenizer.stopped:
                if reason is None:
                    model.engine.finish(request.request_id, FinishReason.STOP)
                reason = FinishReason.STOP
            if reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise GenerationFailed("The engine could not finish the answer.")
            yield Delta(index, text, output.token_ids[:num_tokens], reason)
            if reason is not None:
                return
    raise GenerationFailed("The engine ended the answer without a reason.")


def _num_stop_tokens(output: SequenceOutput, stop_token_ids: set[int]) -> int:
    """1 if the last token is there only to end the sequence, and so isn't part of the text."""
    ends = output.finish_reason is FinishReason.STOP and output.token_ids
    return 1 if ends and output.token_ids[-1] in stop_token_ids else 0


def _push(
    detokenizer: IncrementalDetokenizer, token_ids: list[int], num_hidden: int
) -> tuple[str, int]:
    """Text of the tokens up to a stop string, and how many tokens that took.

    One by one, so that the answer doesn't depend on how many tokens came together.
    """
    text = ""
    for num_tokens, token_id in enumerate(token_ids[: len(token_ids) - num_hidden], start=1):
        text += detokenizer.push([token_id])
        if detokenizer.stopped:
            return text, num_tokens
    return text, len(token_ids)
