"""From token ids to text: the one way by which every route, streamed or not, gets its answer.

    engine.generate ─▶ parser, stop strings ─▶ Delta ─▶ queue ─▶ deltas()

One task per sequence fills the queue, so waiting for it can time out (for keep-alive
comments) without touching the engine's generator. Leaving `generating` ends the tasks, and
with them aborts what still runs, in whatever phase it is.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from bezel.engine.errors import BezelError, EngineUnavailable, GrammarError
from bezel.engine.messages import FailureCause, FinishReason, SequenceOutput, TokenLogprobs
from bezel.engine.metric_families import AbortReason
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.sequence_metrics import SequenceMetrics
from bezel.server.admission import Ticket
from bezel.server.deadlines import shortest_s
from bezel.server.errors import (
    DeadlineExceeded,
    GenerationFailed,
    ReaderTooSlow,
    ShuttingDown,
)
from bezel.server.parsing.parser import OutputParser, Parsed
from bezel.server.request_summary import current_summary
from bezel.server.state import ServedModel, ServerState

# Of each sequence, deltas that nobody has taken: some 200 bytes a token on the wire, of which a
# reader who is that far behind takes fewer than come.
_MAX_PENDING = 4096


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

    def __init__(self, state: ServerState, requests: Sequence[TextRequest], ticket: Ticket) -> None:
        model = state.loaded_model()
        self._ticket = ticket
        self._max_pending = _MAX_PENDING * len(requests)
        self._metrics = state.metrics
        self.summary = current_summary()
        self.summary.begin(model.names[0], requests)
        self._queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self._num_unfinished = len(requests)
        self._refusal: Exception | None = None
        self._num_prompts = len({id(request.prompt_ids) for request in requests})
        self._num_tokens = [0] * len(requests)
        self.abort_reason = AbortReason.CLIENT
        self._tasks = [
            asyncio.create_task(self._fill(index, _deltas(state, model, index, request, self)))
            for index, request in enumerate(requests)
        ]

    async def _fill(self, index: int, deltas: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    self._take(index, delta)
        except Exception as error:
            # Not swallowed: `admit` or `deltas` raises it to whoever waits.
            self._refusal = error
            self._queue.put_nowait(error)
        finally:
            self._ticket.ended(index)

    def _take(self, index: int, delta: Delta) -> None:
        if delta.token_ids or delta.finish_reason is not None:
            self._ticket.began(index)
        self._num_tokens[index] += len(delta.token_ids)
        if self._queue.qsize() >= self._max_pending:
            self.abort_reason = AbortReason.SLOW_READER
            raise ReaderTooSlow
        self._queue.put_nowait(delta)

    async def admit(self) -> None:
        """Give the engine the chance to refuse; it does so before it first suspends.

        Raises:
            EngineUnavailable: it did.
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
        self.abort_reason = abort_reason_of(error)
        self._queue.put_nowait(error)

    async def close(self) -> None:
        """Abort what still runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        num_choices = len(self._tasks) // self._num_prompts
        self._metrics.observe_request(num_choices, max(self._num_tokens))


def abort_reason_of(error: Exception) -> AbortReason:
    """Why sequences end that end with this error."""
    match error:
        case DeadlineExceeded():
            return AbortReason.DEADLINE
        case ReaderTooSlow():
            return AbortReason.SLOW_READER
        case ShuttingDown():
            return AbortReason.SHUTDOWN
        case EngineUnavailable():
            return AbortReason.ENGINE
    return AbortReason.ERROR


@asynccontextmanager
async def generating(
    state: ServerState, requests: Sequence[TextRequest]
) -> AsyncIterator[Generation]:
    """Have sequences generated for as long as the block runs, within the time they may take.

    Raises:
        Overloaded, EngineUnavailable: there is no place for them, or no engine.
    """
    state.require_serving()
    prompts = [request.prompt_ids for request in requests]
    timeouts_s = [request.timeout_s for request in requests]
    timeout_s = shortest_s(state.config.request_timeout, *timeouts_s)
    with state.admission.admitted(requests[0].params.tenant, prompts) as ticket:
        generation = Generation(state, requests, ticket)
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
    state: ServerState,
    model: ServedModel,
    index: int,
    request: TextRequest,
    generation: Generation,
) -> AsyncGenerator[Delta, None]:
    """One sequence as text, with its metrics."""
    metrics = state.metrics.sequence(len(request.prompt_ids), request.params.max_tokens)
    reason = FinishReason.ABORT
    try:
        async for delta in _decode(model, index, request, metrics):
            reason = delta.finish_reason or reason
            generation.summary.take(delta)
            yield delta
    except Exception as error:
        reason = FinishReason.ERROR
        generation.abort_reason = abort_reason_of(error)
        raise
    finally:
        metrics.observe_finished(reason, generation.abort_reason)
        generation.summary.finish(index, reason, generation.abort_reason)


async def _decode(
    model: ServedModel, index: int, request: TextRequest, metrics: SequenceMetrics
) -> AsyncIterator[Delta]:
    stop_token_ids = {*model.engine.info.eos_token_ids, *request.params.stop_token_ids}
    outputs = model.engine.generate(request.request_id, request.prompt_ids, request.params)
    async with aclosing(outputs):
        async for output in outputs:
            if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise _failure(output)
            if output.queue_seconds is not None:
                metrics.observe_start(output.queue_seconds)
                if not output.token_ids and not output.prompt_logprobs:
                    continue
            delta = _delta(index, request, output, stop_token_ids)
            metrics.observe_tokens(len(delta.token_ids), delta.num_cached_tokens)
            if delta.finish_reason is not None and output.finish_reason is None:
                model.engine.finish(request.request_id, FinishReason.STOP)
            yield delta
            if delta.finish_reason is not None:
                return
    raise GenerationFailed("The engine ended the answer without a reason.")


def _failure(output: SequenceOutput) -> BezelError:
    if output.failure is FailureCause.GRAMMAR:
        # How much one costs, or whether a token is left, can't all be told before.
        return GrammarError(
            "What the output must be can't be enforced any further: no token may follow, or "
            "those that may are too costly to find."
        )
    return GenerationFailed("The engine could not finish the answer.")


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
