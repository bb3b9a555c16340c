"""The clock of one sequence: first step, first token, gaps between tokens, end."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from bezel.engine.messages import FinishReason
from bezel.engine.metric_families import AbortReason, Phase

if TYPE_CHECKING:
    from bezel.engine.metrics import Metrics


class SequenceMetrics:
    """Made when a sequence arrives; each of its outputs is told, and its end once."""

    def __init__(
        self,
        metrics: "Metrics",
        num_prompt_tokens: int,
        max_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._max_tokens = max_tokens
        self._clock = clock
        self._arrived_s = self._first_s = self._last_s = clock()
        self._queue_s: float | None = None
        self._num_tokens = 0
        self._num_cached_tokens = 0

    @property
    def phase(self) -> Phase:
        """How far the sequence has come."""
        if self._num_tokens:
            return Phase.DECODE
        return Phase.WAITING if self._queue_s is None else Phase.PREFILL

    def observe_start(self, queue_seconds: float) -> None:
        """Note that the engine has begun with it, after `queue_seconds`."""
        self._queue_s = queue_seconds
        self._metrics.observe("request_queue_time_seconds", queue_seconds)

    def observe_tokens(self, num_tokens: int, num_cached_tokens: int = 0) -> None:
        """Note tokens that came together, and what of the prompt the prefix cache had."""
        if num_tokens == 0:
            return
        now = self._clock()
        self._metrics.add("generation_tokens", num_tokens)
        if self._num_tokens == 0:
            self._first_s = now
            self._num_cached_tokens = num_cached_tokens
            self._metrics.observe("time_to_first_token_seconds", now - self._arrived_s)
        else:
            # Tokens that came together share the time since the ones before.
            for _ in range(num_tokens):
                seconds = (now - self._last_s) / num_tokens
                self._metrics.observe("inter_token_latency_seconds", seconds)
        self._last_s = now
        self._num_tokens += num_tokens

    def observe_finished(
        self, reason: FinishReason, abort_reason: AbortReason = AbortReason.CLIENT
    ) -> None:
        """Note the end, and if it came too early why; to be called once."""
        metrics = self._metrics
        metrics.add("request_success", 1, reason)
        if reason in (FinishReason.ABORT, FinishReason.ERROR):
            metrics.add("request_aborts", 1, abort_reason, self.phase)
        metrics.observe("e2e_request_latency_seconds", self._clock() - self._arrived_s)
        metrics.observe("request_prompt_tokens", self._num_prompt_tokens)
        metrics.observe("request_generation_tokens", self._num_tokens)
        metrics.observe("request_params_max_tokens", self._max_tokens)
        if self._num_tokens:
            self._observe_phases()

    def _observe_phases(self) -> None:
        metrics = self._metrics
        # The engine tells of the queue, and this process of tokens: hence the limit.
        started_s = min(self._arrived_s + (self._queue_s or 0.0), self._first_s)
        decode_s = self._last_s - self._first_s
        metrics.observe("request_prefill_time_seconds", self._first_s - started_s)
        metrics.observe("request_decode_time_seconds", decode_s)
        metrics.observe("request_inference_time_seconds", self._last_s - started_s)
        num_computed = self._num_prompt_tokens - self._num_cached_tokens
        metrics.observe("request_prefill_kv_computed_tokens", num_computed)
        if self._num_tokens > 1:
            seconds = decode_s / (self._num_tokens - 1)
            metrics.observe("request_time_per_output_token_seconds", seconds)
