"""Every Prometheus series of the server, as a table: name, kind, meaning, labels, buckets.

Dashboards, alerts and the queries of others know them by these names. The stems, labels and
meanings are vLLM's where it has the same thing; `vllm` are the names under which a series is
exposed once more if that is asked for. `metrics` makes them, and docs/metrics.md lists them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from bezel.engine.messages import FinishReason


class Kind(StrEnum):
    """What Prometheus calls a type."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


class AbortReason(StrEnum):
    """Why a sequence ended before its answer did."""

    CLIENT = "client"
    SLOW_READER = "slow_reader"
    DEADLINE = "deadline"
    SHUTDOWN = "shutdown"
    ENGINE = "engine"
    ERROR = "error"


class Phase(StrEnum):
    """How far a sequence had come: in no step yet, without a token yet, or beyond."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"


class StartupPhase(StrEnum):
    """What a start spends its time on. Those of the engine's process run beside the tokenizer;
    `ready` is all of it."""

    IMPORTS = "imports"
    WEIGHTS = "weights"
    WARM_UP = "warm_up"
    CHECKPOINT = "checkpoint"
    TOKENIZER = "tokenizer"
    READY = "ready"


class Rejection(StrEnum):
    """Which limit a request was refused for."""

    MAX_NUM_QUEUED_REQS = "max_num_queued_reqs"
    MAX_NUM_QUEUED_TOKENS = "max_num_queued_tokens"


class ConnectionEnd(StrEnum):
    """Who closed a connection, or which limit it met."""

    CLIENT = "client"
    SERVER = "server"
    MALFORMED = "malformed"
    MAX_CONNECTIONS = "max_connections"
    MAX_HEADER_BYTES = "max_header_bytes"
    MAX_BODY_BYTES = "max_body_bytes"
    RECEIVE_TIMEOUT = "receive_timeout"
    SEND_TIMEOUT = "send_timeout"
    TIMEOUT_KEEP_ALIVE = "timeout_keep_alive"


class Process(StrEnum):
    """Bezel's two, as their log lines name them."""

    SERVER = "server"
    ENGINE = "engine"


@dataclass(frozen=True, slots=True)
class Family:
    """One row. `name` comes without `bezel_`, a counter's without `_total`.

    `labels` map each label, but for the model's name, to its values: with all of them known, the
    series begin at zero. Families that aren't `of_model` have no model's name and are there from
    the server's start.
    """

    name: str
    kind: Kind
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()
    of_model: bool = True
    vllm: tuple[str, ...] = ()

    @property
    def exposed_name(self) -> str:
        """As it stands in a scrape."""
        return f"bezel_{self.name}" + ("_total" if self.kind is Kind.COUNTER else "")

    @property
    def label_names(self) -> tuple[str, ...]:
        return (*(("model_name",) if self.of_model else ()), *self.labels)


# Supersets of vLLM's buckets, finer below 10 ms, where a step of a small model lives.
STEP_BUCKETS = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025),
    *(0.03, 0.04, 0.05, 0.06, 0.075, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
REQUEST_BUCKETS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5),
    *(5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
SHORT_BUCKETS = (
    *(0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0),
)
TOKEN_BUCKETS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
STEP_TOKEN_BUCKETS = tuple(float(2**power) for power in range(15))
CHOICE_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)

PAGE_KIND = {"kind": ("local", "global")}
CACHE_LABELS = (
    *("block_size", "num_gpu_blocks", "local_page_size", "num_local_pages", "cache_dtype"),
    *("kv_cache_memory_bytes", "enable_prefix_caching"),
)


def _gauge(name: str, help_text: str, *vllm: str, **labels: tuple[str, ...]) -> Family:
    return Family(name, Kind.GAUGE, help_text, labels, vllm=vllm)


def _counter(name: str, help_text: str, *vllm: str, **labels: tuple[str, ...]) -> Family:
    return Family(name, Kind.COUNTER, help_text, labels, vllm=vllm)


def _histogram(name: str, help_text: str, buckets: tuple[float, ...], *vllm: str) -> Family:
    return Family(name, Kind.HISTOGRAM, help_text, buckets=buckets, vllm=vllm)


SERVER = (
    Family("ready", Kind.GAUGE, "1 while /ready answers 200, otherwise 0.", of_model=False),
    Family(
        "build_info",
        Kind.GAUGE,
        "Always 1; the labels tell what runs.",
        {"version": (), "python_version": ()},
        of_model=False,
    ),
    Family(
        "event_loop_lag_seconds",
        Kind.HISTOGRAM,
        "How much later than asked the API process's event loop wakes up.",
        buckets=SHORT_BUCKETS,
        of_model=False,
    ),
    Family("connections_open", Kind.GAUGE, "Connections of clients that are open.", of_model=False),
    Family(
        "connections_closed",
        Kind.COUNTER,
        "Connections of clients that were closed, by who did it or by the limit they met.",
        {"reason": tuple(ConnectionEnd)},
        of_model=False,
    ),
    Family(
        "log_lines_dropped",
        Kind.COUNTER,
        "Log lines that couldn't be written, by the process that said them.",
        {"process": tuple(Process)},
        of_model=False,
    ),
    Family(
        "http_requests",
        Kind.COUNTER,
        "HTTP responses sent.",
        {"method": (), "route": (), "status": ()},
        of_model=False,
    ),
    Family(
        "http_request_duration_seconds",
        Kind.HISTOGRAM,
        "From the request's first byte to the response's last.",
        {"method": (), "route": ()},
        REQUEST_BUCKETS,
        of_model=False,
    ),
)

TRAFFIC = (
    _gauge("num_requests_running", "Sequences in the current step.", "num_requests_running"),
    _gauge("num_requests_waiting", "Sequences waiting for their turn.", "num_requests_waiting"),
    _counter(
        "prompt_tokens",
        "Prompt tokens of sequences, computed or found in the prefix cache; those computed again "
        "after a preemption count again.",
        "prompt_tokens",
    ),
    _counter(
        "prompt_tokens_by_source",
        "The same, by where their keys and values came from.",
        "prompt_tokens_by_source",
        source=("local_compute", "local_cache_hit"),
    ),
    _counter("generation_tokens", "Tokens generated.", "generation_tokens"),
    _counter(
        "request_success",
        "Sequences that ended, by how they ended.",
        "request_success",
        finished_reason=tuple(FinishReason),
    ),
    _counter(
        "request_aborts",
        "Sequences that ended before their answer did, by why and how far they had come.",
        reason=tuple(AbortReason),
        phase=tuple(Phase),
    ),
    _counter(
        "admission_rejections",
        "Requests answered with 429, by the limit they met.",
        "admission_rejections",
        reason=tuple(Rejection),
    ),
)

LATENCY = (
    _histogram(
        "time_to_first_token_seconds",
        "Arrival to first token.",
        STEP_BUCKETS,
        "time_to_first_token_seconds",
    ),
    _histogram(
        "inter_token_latency_seconds",
        "Between two tokens of a sequence.",
        STEP_BUCKETS,
        "inter_token_latency_seconds",
        "time_per_output_token_seconds",
    ),
    _histogram(
        "request_time_per_output_token_seconds",
        "Mean time between the tokens of a sequence.",
        STEP_BUCKETS,
        "request_time_per_output_token_seconds",
    ),
    _histogram(
        "e2e_request_latency_seconds",
        "Arrival to the end.",
        REQUEST_BUCKETS,
        "e2e_request_latency_seconds",
    ),
    _histogram(
        "request_queue_time_seconds",
        "Arrival at the engine to the first step.",
        REQUEST_BUCKETS,
        "request_queue_time_seconds",
    ),
    _histogram(
        "request_prefill_time_seconds",
        "First step to first token.",
        REQUEST_BUCKETS,
        "request_prefill_time_seconds",
    ),
    _histogram(
        "request_decode_time_seconds",
        "First token to last token.",
        REQUEST_BUCKETS,
        "request_decode_time_seconds",
    ),
    _histogram(
        "request_inference_time_seconds",
        "First step to last token.",
        REQUEST_BUCKETS,
        "request_inference_time_seconds",
    ),
)

SIZES = (
    _histogram(
        "request_prompt_tokens",
        "Prompt tokens of a sequence.",
        TOKEN_BUCKETS,
        "request_prompt_tokens",
    ),
    _histogram(
        "request_prefill_kv_computed_tokens",
        "Prompt tokens of a sequence that weren't found in the prefix cache.",
        TOKEN_BUCKETS,
        "request_prefill_kv_computed_tokens",
    ),
    _histogram(
        "request_generation_tokens",
        "Tokens generated by a sequence.",
        TOKEN_BUCKETS,
        "request_generation_tokens",
    ),
    _histogram(
        "request_max_num_generation_tokens",
        "Tokens of the longest of a request's answers.",
        TOKEN_BUCKETS,
        "request_max_num_generation_tokens",
    ),
    _histogram(
        "request_params_max_tokens",
        "Tokens that a sequence might generate at most.",
        TOKEN_BUCKETS,
        "request_params_max_tokens",
    ),
    _histogram(
        "request_params_n",
        "Answers that a request asks for to each of its prompts.",
        CHOICE_BUCKETS,
        "request_params_n",
    ),
)

ENGINE = (
    _histogram("step_duration_seconds", "One step of the engine.", STEP_BUCKETS),
    _histogram(
        "step_schedule_seconds",
        "Of that, choosing what to compute, and booking what was.",
        SHORT_BUCKETS,
    ),
    _histogram("step_model_seconds", "Of that, model and sampling.", STEP_BUCKETS),
    _histogram(
        "iteration_tokens_total",
        "Tokens computed in a step, of prompts and answers.",
        STEP_TOKEN_BUCKETS,
        "iteration_tokens_total",
    ),
    _gauge(
        "engine_step_age_seconds", "Time since the engine was heard of with work pending, else 0."
    ),
    _counter("engine_restarts", "Restarts of the engine process."),
    _counter("num_preemptions", "Sequences sent back to waiting.", "num_preemptions"),
    _gauge(
        "startup_seconds",
        "What the last start took, by phase; phases overlap, and `ready` is the server's start to "
        "readiness.",
        phase=tuple(StartupPhase),
    ),
)

KV_CACHE = (
    _gauge("kv_pages_used", "KV pages held by sequences.", **PAGE_KIND),
    _gauge("kv_pages_cached", "KV pages that only the prefix cache holds.", **PAGE_KIND),
    _gauge(
        "kv_pages_capacity", "KV pages there would be if all memory held this kind.", **PAGE_KIND
    ),
    _gauge("kv_held_bytes", "Bytes of the KV pages held by sequences.", **PAGE_KIND),
    _gauge(
        "kv_cache_usage_perc",
        "Share of the KV memory that sequences hold, 0 to 1.",
        *("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    ),
    _gauge("gpu_memory_bytes", "GPU memory that the engine took at start, in all; 0 on a CPU."),
    _gauge(
        "cache_config_info",
        "Always 1; the labels tell how the KV cache is laid out.",
        "cache_config_info",
        **dict.fromkeys(CACHE_LABELS, ()),
    ),
    _gauge("prefix_cache_checkpoints", "Places in the prefix cache to resume from."),
    _counter(
        "prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        "prefix_cache_queries",
    ),
    _counter(
        "prefix_cache_hits",
        "Prompt tokens found there, and not computed.",
        *("prefix_cache_hits", "prompt_tokens_cached"),
    ),
    _counter(
        "prefix_cache_global_hits",
        "Prompt tokens whose global pages were found there, also where the window wasn't, so that "
        "they were computed again.",
    ),
    _counter("prefix_cache_evictions", "Checkpoints given up for their pages."),
)

FAMILIES = (*SERVER, *TRAFFIC, *LATENCY, *SIZES, *ENGINE, *KV_CACHE)
