"""From token ids to text: the one way by which every route, streamed or not, gets its answer.

    engine.generate ─▶ parser, stop strings ─▶ Delta ─▶ queue ─▶ deltas()

One task per sequence fills the queue, so waiting for it can time out (for keep-alive
comments) without touching the engine's generator. Leaving `generating` ends the tasks, and
with them aborts what still runs, in whatever phase it is.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from bezel.engine.errors import BezelError, Overloaded
from bezel.engine.messages import FinishReason, SequenceOutput, TokenLogprobs
from bezel.engine.metrics import SequenceMetrics
from bezel.engine.sampling_params import SamplingParams
from bezel.server.errors import DeadlineExceeded, GenerationFailed
from bezel.server.parsing.parser import OutputParser, Parsed
from bezel.server.state import ServedModel, ServerState


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """One sequence to generate, and how its tokens become text.

    `hides_tokens`: only the prompt's log-probabilities are wanted, none of the output.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    parser: OutputParser
    include_stop: bool = False
    hides_tokens: bool = False
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What is new of the sequence `index`, and the tokens it was made of.

    Either may be empty: text that could yet become a stop string is held back. `logprobs` has an
    entry for each of `token_ids` if they were asked for; `prompt_logprobs` come in pieces, the
    last of them with the first token at the latest. With that also comes how many of the prompt's
    tokens were found in the prefix cache.
    """

    index: int
    parsed: Parsed
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs]
    num_reasoning_tokens: int
    num_cached_tokens: int
    finish_reason: FinishReason | None


@dataclass(slots=True)
class ToolCall:
    """One whole call; `arguments` is JSON, cut off if the sequence was."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Choice:
    """The whole output of one sequence."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_reasoning_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self.content += delta.parsed.content
        self.reasoning += delta.parsed.reasoning
        for call in delta.parsed.tool_calls:
            if call.id is not None:
                self.tool_calls.append(ToolCall(call.id, call.name or "", ""))
            self.tool_calls[call.index].arguments += call.arguments
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        self.num_reasoning_tokens += delta.num_reasoning_tokens
        self.num_cached_tokens += delta.num_cached_tokens
        self.finish_reason = delta.finish_reason


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
    """Have sequences generated for as long as the block runs, within the time they may take.

    Raises:
        Overloaded, EngineUnavailable: the engine doesn't take them.
    """
    state.require_ready()
    generation = Generation(state, requests)
    given = [request.timeout_s for request in requests if request.timeout_s is not None]
    timeout_s = min([state.config.request_timeout, *given])
    loop = asyncio.get_running_loop()
    deadline = loop.call_later(timeout_s, generation.fail, DeadlineExceeded(timeout_s))
    try:
        with state.in_flight.member(generation):
            await generation.admit()
            yield generation
    finally:
        deadline.cancel()
        await generation.close()


async def collect(state: ServerState, requests: Sequence[TextRequest]) -> list[Choice]:
    """Have sequences generated to their ends.

    Raises:
        BezelError: one of them couldn't be; the others are aborted.
    """
    choices = [Choice() for _ in requests]
    await for_each_delta(state, requests, lambda delta: choices[delta.index].add(delta))
    return choices


async def for_each_delta(
    state: ServerState, requests: Sequence[TextRequest], take: Callable[[Delta], None]
) -> None:
    """Have sequences generated to their ends, and `take` each piece of them.

    Raises:
        BezelError: one of them couldn't be; the others are aborted.
    """
    async with generating(state, requests) as generation:
        async for delta in generation.deltas():
            assert delta is not None
            take(delta)


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
    stop_token_ids = {*model.engine.info.eos_token_ids, *request.params.stop_token_ids}
    outputs = model.engine.generate(request.request_id, request.prompt_ids, request.params)
    async with aclosing(outputs):
        async for output in outputs:
            if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise GenerationFailed("The engine could not finish the answer.")
            delta = _delta(index, request, output, stop_token_ids)
            metrics.observe_tokens(len(delta.token_ids))
            if delta.finish_reason is not None and output.finish_reason is None:
                model.engine.finish(request.request_id, FinishReason.STOP)
            yield delta
            if delta.finish_reason is not None:
                return
    raise GenerationFailed("The engine ended the answer without a reason.")


def _delta(
    index: int, request: TextRequest, output: SequenceOutput, stop_token_ids: set[int]
) -> Delta:
    parser, token_ids, reason = request.parser, output.token_ids, output.finish_reason
    if request.hides_tokens:
        token_ids, reason = [], reason and FinishReason.LENGTH
    # A token that is there only to end the sequence isn't part of the text.
    ends = reason is FinishReason.STOP and token_ids and token_ids[-1] in stop_token_ids
    num_hidden = 1 if ends and not request.include_stop else 0
    num_thought = parser.num_reasoning_tokens
    pieces, num_tokens = _push(parser, token_ids, num_hidden)
    if reason is not None:
        pieces.append(parser.flush(is_cut=reason is not FinishReason.STOP))
    return Delta(
        index=index,
        parsed=_joined(pieces),
        token_ids=token_ids[:num_tokens],
        logprobs=output.logprobs[:num_tokens],
        prompt_logprobs=output.prompt_logprobs,
        num_reasoning_tokens=parser.num_reasoning_tokens - num_thought,
        num_cached_tokens=output.num_cached_tokens,
        finish_reason=FinishReason.STOP if parser.stopped else reason,
    )


def _push(parser: OutputParser, token_ids: list[int], num_hidden: int) -> tuple[list[Parsed], int]:
    """What the tokens up to a stop string say, and how many tokens that took.

    One by one, so that the answer doesn't depend on how many tokens came together.
    """
    pieces = []
    for num_tokens, token_id in enumerate(token_ids[: len(token_ids) - num_hidden], start=1):
        pieces.append(parser.push([token_id]))
        if parser.stopped:
            return pieces, num_tokens
    return pieces, len(token_ids)


def _joined(pieces: Sequence[Parsed]) -> Parsed:
    """Pieces of one answer as one piece."""
    return Parsed(
        content="".join(piece.content for piece in pieces),
        reasoning="".join(piece.reasoning for piece in pieces),
        tool_calls=tuple(call for piece in pieces for call in piece.tool_calls),
    )
