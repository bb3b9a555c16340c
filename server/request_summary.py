"""What became of one HTTP request: gathered while it is served, told once by its end.

The outermost middleware makes a `RequestSummary` and logs it; whoever serves the request finds it
by `current_summary` and notes what it comes to know. It holds numbers and names, never a text of a
client or of the model.
"""

import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bezel.engine.messages import FinishReason

if TYPE_CHECKING:
    from bezel.engine.sampling_params import SamplingParams
    from bezel.server.generation import Delta, TextRequest


@dataclass(slots=True)
class RequestSummary:
    """Times `…_s` are those of the monotonic clock, in seconds.

    `error` is the code of the error that the client was told, `key` the number of its API key,
    counted from 0. `finish_reasons` has one for each
    choice that began, by its number; `abort_reason` says why some of them were cut off.
    `num_first_tokens` came together at `first_token_s`. Prompts count once, however many choices
    they have. All token counts are 0 until something is generated.
    """

    method: str = ""
    route: str = ""
    status: int | None = None
    error: str | None = None
    key: str | None = None
    started_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None

    model: str | None = None
    answer_id: str | None = None
    params: "SamplingParams | None" = None
    num_choices: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_first_tokens: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None
    finish_reasons: dict[int, str] = field(default_factory=dict)
    abort_reason: str | None = None
    _counted: frozenset[int] = frozenset()

    def begin(self, model: str, requests: "Sequence[TextRequest]") -> None:
        """Note what is about to be generated, by the model of this name."""
        self.model = model
        self.answer_id = requests[0].request_id.rpartition("-")[0]
        self.params = requests[0].params
        self.num_choices = len(requests)
        # The choices of one prompt share it; the first of them tells what was cached of it.
        first = {id(request.prompt_ids): i for i, request in reversed([*enumerate(requests)])}
        self._counted = frozenset(first.values())
        self.num_prompt_tokens = sum(len(requests[i].prompt_ids) for i in self._counted)

    def take(self, delta: "Delta") -> None:
        """Note what has come of one choice."""
        if delta.index in self._counted:
            self.num_cached_tokens += delta.num_cached_tokens
        if not delta.token_ids:
            return
        self.last_token_s = time.monotonic()
        if self.first_token_s is None:
            self.first_token_s = self.last_token_s
            self.num_first_tokens = len(delta.token_ids)
        self.num_output_tokens += len(delta.token_ids)

    def finish(self, index: int, reason: FinishReason, abort_reason: str) -> None:
        """Note the end of one choice; `abort_reason` tells of one that was cut off."""
        self.finish_reasons[index] = reason.value
        if reason in (FinishReason.ABORT, FinishReason.ERROR):
            self.abort_reason = self.abort_reason or abort_reason

    @property
    def reasons(self) -> list[str]:
        """Why each choice that began has ended, in order."""
        return [self.finish_reasons[index] for index in sorted(self.finish_reasons)]

    @property
    def ttft_s(self) -> float | None:
        """From the request's arrival to its first token."""
        return None if self.first_token_s is None else self.first_token_s - self.started_s

    @property
    def total_s(self) -> float:
        """From the request's arrival to its end, or until now."""
        return (self.ended_s or time.monotonic()) - self.started_s

    @property
    def tokens_per_s(self) -> float | None:
        """Of all choices together, after the first token; None if there are no more."""
        num_tokens = self.num_output_tokens - self.num_first_tokens
        if self.first_token_s is None or self.last_token_s is None or not num_tokens:
            return None
        seconds = self.last_token_s - self.first_token_s
        return num_tokens / seconds if seconds else None


_current: ContextVar[RequestSummary | None] = ContextVar("request_summary", default=None)


def begin_summary(method: str) -> RequestSummary:
    """Begin that of the HTTP request being served; tasks that it starts inherit it."""
    summary = RequestSummary(method=method)
    _current.set(summary)
    return summary


def current_summary() -> RequestSummary:
    """That of the HTTP request being served; outside any, one that nobody reads."""
    return _current.get() or RequestSummary()
