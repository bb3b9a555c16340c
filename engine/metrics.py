"""Every Prometheus series of the server, with its buckets; nothing else knows the client library.

The state of the engine comes in through `Metrics.observe_step`, the life and the tokens of one
sequence through the `SequenceMetrics` that `Metrics.sequence` hands out, HTTP through
`Metrics.observe_http`. Series of the model carry the label `model_name` and begin with
`Metrics.set_model`, once the model is loaded; so a scrape during loading shows HTTP alone.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from bezel.engine.messages import EngineInfo, FinishReason, PrefixStats, StepStats

# Supersets of vLLM's buckets, so its dashboards port; finer below 10 ms, where a step lives.
_STEP_BUCKETS = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025),
    *(0.03, 0.04, 0.05, 0.06, 0.075, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_REQUEST_BUCKETS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5),
    *(5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKEN_BUCKETS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))

Family = TypeVar("Family", Gauge, Counter, Histogram)

_MODEL = ("model_name",)
_KIND = ("model_name", "kind")


class Metrics:
    """The series of one server process, in a registry of their own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._registry = registry or CollectorRegistry()
        self._model_name = ""
        self._info: EngineInfo | None = None
        self._model_families: list[Gauge | Counter | Histogram] = []
        self._num_restarts = 0
        self._prefix = PrefixStats()
        self._declare_gauges()
        self._declare_counters()
        self._declare_histograms()

    def _declare_gauges(self) -> None:
        self._running = self._gauge("num_requests_running", "Sequences in the current step.")
        self._waiting = self._gauge("num_requests_waiting", "Sequences waiting for their turn.")
        self._pages_used = self._gauge("kv_pages_used", "KV pages held by sequences.", _KIND)
        self._pages_cached = self._gauge(
            "kv_pages_cached", "KV pages that only the prefix cache holds.", _KIND
        )
        self._checkpoints = self._gauge(
            "prefix_cache_checkpoints", "Places in the prefix cache to resume from."
        )
        self._pages_total = self._gauge(
            "kv_pages_total", "KV pages there would be if all memory held this kind.", _KIND
        )
        self._held_bytes = self._gauge("kv_held_bytes", "Bytes of the KV pages held.", _KIND)
        self._usage = self._gauge("kv_cache_usage_ratio", "Held share of the KV memory, 0 to 1.")
        self._step_age = self._gauge(
            "engine_step_age_seconds", "Time since the engine was heard of with work pending."
        )

    def _declare_counters(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._preemptions = self._counter("num_preemptions", "Sequences sent back to waiting.")
        self._prefix_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self._prefix_hits = self._counter(
            "prefix_cache_hits", "Prompt tokens found there, and not computed."
        )
        self._prefix_global_hits = self._counter(
            "prefix_cache_global_hits",
            "Prompt tokens whose global pages were found there, also where the window wasn't.",
        )
        self._prefix_evictions = self._counter(
            "prefix_cache_evictions", "Checkpoints given up for their pages."
        )
        self._restarts = self._counter("engine_restarts", "Restarts of the engine process.")
        self._finished = self._counter(
            "request_success",
            "Sequences that ended, by how they ended.",
            ("model_name", "finished_reason"),
        )
        self._http_requests = self._counter(
            "http_requests", "HTTP responses sent.", ("method", "route", "status")
        )

    def _declare_histograms(self) -> None:
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", _STEP_BUCKETS
        )
        self._itl = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a sequence.", _STEP_BUCKETS
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "Arrival to last token.", _REQUEST_BUCKETS
        )
        self._step = self._histogram(
            "step_duration_seconds", "One step of the engine.", _STEP_BUCKETS
        )
        self._request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a sequence.", _TOKEN_BUCKETS
        )
        self._request_generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens generated by a sequence.", _TOKEN_BUCKETS
        )
        self._http_duration = self._histogram(
            "http_request_duration_seconds",
            "From the request's first byte to the response's last.",
            _REQUEST_BUCKETS,
            ("method", "route"),
        )

    def set_model(self, model_name: str, info: EngineInfo) -> None:
        """Begin the model's series, all at zero, so that rates are right from the first event."""
        self._model_name = model_name
        self._info = info
        for family in self._model_families:
            family.labels(model_name)
        for reason in FinishReason:
            self._finished.labels(model_name, reason.value)
        self._pages_total.labels(model_name, "local").set(info.local_pages_total)
        self._pages_total.labels(model_name, "global").set(info.global_pages_total)
        self._observe_pages(0, 0)
        self._observe_prefix_cache(PrefixStats())

    def observe_step(self, stats: StepStats) -> None:
        """Take over what the engine says of a step, or of its state between steps."""
        model = self._model_name
        self._running.labels(model).set(stats.num_running)
        self._waiting.labels(model).set(stats.num_waiting)
        self._prompt_tokens.labels(model).inc(stats.num_prefill_tokens)
        self._preemptions.labels(model).inc(stats.num_preemptions)
        if stats.num_prefill_tokens + stats.num_decode_tokens:
            self._step.labels(model).observe(stats.step_seconds)
        self._observe_pages(stats.local_pages_used, stats.global_pages_used)
        self._observe_prefix_cache(stats.prefix)

    def _observe_prefix_cache(self, stats: PrefixStats) -> None:
        model, last = self._model_name, self._prefix
        self._pages_cached.labels(model, "local").set(stats.local_pages)
        self._pages_cached.labels(model, "global").set(stats.global_pages)
        self._checkpoints.labels(model).set(stats.num_checkpoints)
        if stats.num_queried_tokens < last.num_queried_tokens:
            last = PrefixStats()  # an engine started anew counts from zero
        self._prefix_queries.labels(model).inc(stats.num_queried_tokens - last.num_queried_tokens)
        self._prefix_hits.labels(model).inc(stats.num_hit_tokens - last.num_hit_tokens)
        num_global = stats.num_global_hit_tokens - last.num_global_hit_tokens
        self._prefix_global_hits.labels(model).inc(num_global)
        self._prefix_evictions.labels(model).inc(stats.num_evicted - last.num_evicted)
        self._prefix = stats

    def _observe_pages(self, num_local: int, num_global: int) -> None:
        model, info = self._model_name, self._info
        assert info is not None, "set_model comes before the first step"
        local_bytes = num_local * info.local_page_bytes
        global_bytes = num_global * info.global_page_bytes
        self._pages_used.labels(model, "local").set(num_local)
        self._pages_used.labels(model, "global").set(num_global)
        self._held_bytes.labels(model, "local").set(local_bytes)
        self._held_bytes.labels(model, "global").set(global_bytes)
        # Both kinds live in one arena, so only their bytes can be added up.
        self._usage.labels(model).set((local_bytes + global_bytes) / info.kv_cache_bytes)

    def observe_engine(self, step_age_s: float, num_restarts: int) -> None:
        """Take over what the API process knows of the engine process, at each scrape."""
        self._step_age.labels(self._model_name).set(step_age_s)
        self._restarts.labels(self._model_name).inc(num_restarts - self._num_restarts)
        self._num_restarts = num_restarts

    def observe_http(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one HTTP response. `route` is the template, so that labels stay few."""
        self._http_requests.labels(method, route, str(status)).inc()
        self._http_duration.labels(method, route).observe(seconds)

    def sequence(
        self, num_prompt_tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> "SequenceMetrics":
        """Start the clock of one sequence."""
        return SequenceMetrics(self, num_prompt_tokens, clock)

    def observe_first_tokens(self, num_tokens: int, seconds: float) -> None:
        """Count the tokens with which an answer begins, `seconds` after its arrival."""
        self._generation_tokens.labels(self._model_name).inc(num_tokens)
        self._ttft.labels(self._model_name).observe(seconds)

    def observe_next_tokens(self, num_tokens: int, seconds: float) -> None:
        """Count tokens that came together; they share the `seconds` since the ones before."""
        self._generation_tokens.labels(self._model_name).inc(num_tokens)
        for _ in range(num_tokens):
            self._itl.labels(self._model_name).observe(seconds / num_tokens)

    def observe_finished(
        self,
        reason: FinishReason,
        num_prompt_tokens: int,
        num_generation_tokens: int,
        e2e_seconds: float,
    ) -> None:
        """Count one sequence that ended, however it ended."""
        model = self._model_name
        self._finished.labels(model, reason.value).inc()
        self._e2e.labels(model).observe(e2e_seconds)
        self._request_prompt_tokens.labels(model).observe(num_prompt_tokens)
        self._request_generation_tokens.labels(model).observe(num_generation_tokens)

    def render(self) -> tuple[bytes, str]:
        """All series in Prometheus' text format, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _gauge(self, name: str, help_text: str, labels: tuple[str, ...] = _MODEL) -> Gauge:
        gauge = Gauge(f"bezel_{name}", help_text, labels, registry=self._registry)
        return self._register(gauge, labels)

    def _counter(self, name: str, help_text: str, labels: tuple[str, ...] = _MODEL) -> Counter:
        counter = Counter(f"bezel_{name}", help_text, labels, registry=self._registry)
        return self._register(counter, labels)

    def _histogram(
        self,
        name: str,
        help_text: str,
        buckets: tuple[float, ...],
        labels: tuple[str, ...] = _MODEL,
    ) -> Histogram:
        histogram = Histogram(
            f"bezel_{name}", help_text, labels, registry=self._registry, buckets=buckets
        )
        return self._register(histogram, labels)

    def _register(self, family: Family, labels: tuple[str, ...]) -> Family:
        if labels == _MODEL:
            self._model_families.append(family)
        return family


class SequenceMetrics:
    """The clock of one sequence: first token, gaps between tokens, end."""

    def __init__(
        self, metrics: Metrics, num_prompt_tokens: int, clock: Callable[[], float]
    ) -> None:
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._clock = clock
        self._arrived = self._last = clock()
        self._num_tokens = 0

    def observe_tokens(self, num_tokens: int) -> None:
        """Note tokens that came together."""
        if num_tokens == 0:
            return
        now = self._clock()
        if self._num_tokens == 0:
            self._metrics.observe_first_tokens(num_tokens, now - self._arrived)
        else:
            self._metrics.observe_next_tokens(num_tokens, now - self._last)
        self._last = now
        self._num_tokens += num_tokens

    def observe_finished(self, reason: FinishReason) -> None:
        """Note the end; to be called once."""
        self._metrics.observe_finished(
            reason, self._num_prompt_tokens, self._num_tokens, self._clock() - self._arrived
        )
