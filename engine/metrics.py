"""The Prometheus series of one server process; nothing else knows the client library.

Which there are is the table in `metric_families`. The state of the engine comes in through
`Metrics.observe_step`, the life and the tokens of one sequence through the `SequenceMetrics` that
`Metrics.sequence` hands out, HTTP through `Metrics.observe_http`. Series of the model carry the
label `model_name` and begin with `Metrics.set_model`, once the model is loaded; so a scrape during
loading shows the server alone.
"""

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from bezel.engine.messages import EngineInfo, PrefixStats, StepStats
from bezel.engine.metric_families import (
    FAMILIES,
    ConnectionEnd,
    Family,
    Kind,
    Process,
    Rejection,
    StartupPhase,
)
from bezel.engine.sequence_metrics import SequenceMetrics

_Series = Gauge | Counter | Histogram


class Metrics:
    """The series of one server process, in a registry of their own.

    With `vllm_names` those that dashboards for vLLM ask for are exposed under its names as well.
    """

    def __init__(self, vllm_names: bool = False) -> None:
        self._registry = CollectorRegistry()
        self._families = {family.name: family for family in FAMILIES}
        self._series = {family.name: _new_series(family, self._registry) for family in FAMILIES}
        if vllm_names:
            self._registry.register(_VllmNames(self._families, self._series))
        self._children: dict[tuple[str, ...], _Series] = {}
        self._engine_pid = 0
        ProcessCollector(registry=self._registry)
        ProcessCollector("bezel_engine", lambda: self._engine_pid, registry=self._registry)
        self._model_name = ""
        self._info: EngineInfo | None = None
        self._startup: dict[StartupPhase, float] = {}
        self._num_restarts = 0
        self._prefix = PrefixStats()
        self._num_dropped = dict.fromkeys(Process, 0)
        self._begin(of_model=False)
        self.set("ready", 0)
        self.set("build_info", 1, version("bezel-serve"), platform.python_version())

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge. `labels` are values in the table's order, but for the model's name."""
        series = self._child(name, labels)
        assert isinstance(series, Gauge)
        series.set(value)

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Count."""
        series = self._child(name, labels)
        assert isinstance(series, Counter)
        series.inc(amount)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Put a value into its bucket."""
        series = self._child(name, labels)
        assert isinstance(series, Histogram)
        series.observe(value)

    def _child(self, name: str, labels: tuple[str, ...]) -> _Series:
        key = (name, *labels)
        child = self._children.get(key)
        if child is None:  # to ask the library for each token would take longer than to count it
            of_model = (self._model_name,) if self._families[name].of_model else ()
            values = (*of_model, *labels)
            child = self._series[name].labels(*values) if values else self._series[name]
            self._children[key] = child
        return child

    def set_model(self, model_name: str, info: EngineInfo) -> None:
        """Begin the model's series, all at zero, so that rates are right from the first event."""
        self._model_name = model_name
        self._children.clear()
        self._begin(of_model=True)
        self._take_over(info)
        self._observe_pages(0, 0)
        self._observe_prefix_cache(PrefixStats())

    def _begin(self, of_model: bool) -> None:
        for family in FAMILIES:
            if family.of_model == of_model:
                for labels in product(*family.labels.values()):
                    self._child(family.name, labels)

    def observe_startup(self, phase: StartupPhase, seconds: float) -> None:
        """Note how long a part of the start took; also before there is a model."""
        self._startup[phase] = seconds
        if self._info is not None:
            self.set("startup_seconds", seconds, phase)

    def observe_step(self, stats: StepStats) -> None:
        """Take over what the engine says of a step, or of its state between steps.

        What it computes before there is a model to name, to see that it can, isn't counted.
        """
        self.observe_dropped_lines(Process.ENGINE, stats.num_dropped_log_lines)
        if self._info is None:
            return
        self.set("num_requests_running", stats.num_running)
        self.set("num_requests_waiting", stats.num_waiting)
        self.add("prompt_tokens", stats.num_prefill_tokens)
        self.add("prompt_tokens_by_source", stats.num_prefill_tokens, "local_compute")
        self.add("num_preemptions", stats.num_preemptions)
        num_tokens = stats.num_prefill_tokens + stats.num_decode_tokens
        if num_tokens:
            self.observe("iteration_tokens_total", num_tokens)
            self.observe("step_duration_seconds", stats.step_seconds)
            self.observe("step_schedule_seconds", stats.schedule_seconds)
            self.observe("step_model_seconds", stats.model_seconds)
        self._observe_pages(stats.local_pages_used, stats.global_pages_used)
        self._observe_prefix_cache(stats.prefix)

    def _observe_prefix_cache(self, stats: PrefixStats) -> None:
        last = self._prefix
        self.set("kv_pages_cached", stats.local_pages, "local")
        self.set("kv_pages_cached", stats.global_pages, "global")
        self.set("prefix_cache_checkpoints", stats.num_checkpoints)
        if stats.num_queried_tokens < last.num_queried_tokens:
            last = PrefixStats()  # an engine started anew counts from zero
        num_hits = stats.num_hit_tokens - last.num_hit_tokens
        num_global_hits = stats.num_global_hit_tokens - last.num_global_hit_tokens
        self.add("prefix_cache_queries", stats.num_queried_tokens - last.num_queried_tokens)
        self.add("prefix_cache_hits", num_hits)
        self.add("prefix_cache_global_hits", num_global_hits)
        self.add("prefix_cache_evictions", stats.num_evicted - last.num_evicted)
        self.add("prompt_tokens", num_hits)
        self.add("prompt_tokens_by_source", num_hits, "local_cache_hit")
        self._prefix = stats

    def _observe_pages(self, num_local: int, num_global: int) -> None:
        info = self._info
        assert info is not None
        local_bytes = num_local * info.local_page_bytes
        global_bytes = num_global * info.global_page_bytes
        self.set("kv_pages_used", num_local, "local")
        self.set("kv_pages_used", num_global, "global")
        self.set("kv_held_bytes", local_bytes, "local")
        self.set("kv_held_bytes", global_bytes, "global")
        # Both kinds live in one arena, so only their bytes can be added up.
        self.set("kv_cache_usage_perc", (local_bytes + global_bytes) / info.kv_cache_bytes)

    def observe_ready(self, is_ready: bool) -> None:
        """Take over whether the server takes requests, at each scrape."""
        self.set("ready", float(is_ready))

    def observe_engine(self, step_age_s: float, num_restarts: int, info: EngineInfo) -> None:
        """Take over what the API process knows of the engine process, at each scrape."""
        self.set("engine_step_age_seconds", step_age_s)
        self.add("engine_restarts", num_restarts - self._num_restarts)
        self._num_restarts = num_restarts
        if info != self._info:
            self._take_over(info)

    def _take_over(self, info: EngineInfo) -> None:
        """What may be another with each engine process."""
        self._info = info
        self._engine_pid = info.pid
        self.set("kv_pages_capacity", info.local_pages_total, "local")
        self.set("kv_pages_capacity", info.global_pages_total, "global")
        self.set("gpu_memory_bytes", info.gpu_memory_bytes)
        self._series["cache_config_info"].clear()
        self._children.clear()
        self.set("cache_config_info", 1, *_cache_config(info))
        for name, seconds in info.startup_seconds.items():
            self._startup[StartupPhase(name)] = seconds
        for phase, seconds in self._startup.items():
            self.set("startup_seconds", seconds, phase)

    def observe_event_loop_lag(self, seconds: float) -> None:
        """Note how late the event loop woke up."""
        self.observe("event_loop_lag_seconds", seconds)

    def observe_connections(self, num_open: int) -> None:
        """Take over how many there are."""
        self.set("connections_open", num_open)

    def observe_connection_end(self, end: ConnectionEnd) -> None:
        """Count a connection that was closed."""
        self.add("connections_closed", 1, end)

    def observe_dropped_lines(self, process: Process, num_dropped: int) -> None:
        """Take over how many log lines a process has dropped since its start."""
        num_more = num_dropped - self._num_dropped[process]
        # An engine started anew counts from zero.
        self.add("log_lines_dropped", num_more if num_more >= 0 else num_dropped, process)
        self._num_dropped[process] = num_dropped

    def observe_http(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one HTTP response. `route` is the template, so that labels stay few."""
        self.add("http_requests", 1, method, route, str(status))
        self.observe("http_request_duration_seconds", seconds, method, route)

    def observe_rejection(self, limit: Rejection) -> None:
        """Count one request that was refused for a limit."""
        self.add("admission_rejections", 1, limit)

    def observe_request(self, num_choices: int, num_tokens: int) -> None:
        """Count one request that ended, with the tokens of its longest answer."""
        self.observe("request_params_n", num_choices)
        self.observe("request_max_num_generation_tokens", num_tokens)

    def sequence(
        self,
        num_prompt_tokens: int,
        max_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> SequenceMetrics:
        """Start the clock of one sequence."""
        return SequenceMetrics(self, num_prompt_tokens, max_tokens, clock)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All series in the format that an Accept header asks for, and its content type.

        That is OpenMetrics, or else Prometheus' text format.
        """
        encode, content_type = choose_encoder(accept)
        text = encode(_WithoutCreated(self._registry))
        # Before OpenMetrics' samples, though not before their types, the library has "vllm_".
        return text.replace(b"\nvllm_", b"\nvllm:"), content_type


class _WithoutCreated(Collector):
    """Leaves out when each series began: Prometheus would store that as further series."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


class _VllmNames(Collector):
    """Families once more, named and labelled as by vLLM's engine number 0."""

    def __init__(self, families: Mapping[str, Family], series: Mapping[str, _Series]) -> None:
        self._families = families
        self._series = series

    def describe(self) -> Iterable[Metric]:
        return []  # for the registry, which would look for names used twice

    def collect(self) -> Iterator[Metric]:
        for name, family in self._families.items():
            for alias in family.vllm:
                for metric in self._series[name].collect():
                    yield _renamed(metric, f"vllm:{alias}")


def _renamed(metric: Metric, name: str) -> Metric:
    renamed = Metric(name, metric.documentation, metric.type)
    for sample in metric.samples:
        suffix = sample.name.removeprefix(metric.name)
        labels = sample.labels | {"engine": "0"}
        renamed.samples.append(sample._replace(name=name + suffix, labels=labels))
    return renamed


def _new_series(family: Family, registry: CollectorRegistry) -> _Series:
    name, labels = f"bezel_{family.name}", family.label_names
    if family.kind is Kind.GAUGE:
        return Gauge(name, family.help, labels, registry=registry)
    if family.kind is Kind.COUNTER:
        return Counter(name, family.help, labels, registry=registry)
    return Histogram(name, family.help, labels, registry=registry, buckets=family.buckets)


def _cache_config(info: EngineInfo) -> list[str]:
    """Values of `metric_families.CACHE_LABELS`; vLLM's block of KV memory is our global page."""
    return [
        str(info.global_page_size),
        str(info.global_pages_total),
        str(info.local_page_size),
        str(info.local_pages_total),
        info.dtype,
        str(info.kv_cache_bytes),
        str(info.enable_prefix_caching),
    ]
