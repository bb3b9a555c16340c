"""What passes between the API process and the engine process: frozen structs of plain values."""

from enum import StrEnum

import msgspec

from bezel.engine.sampling_params import SamplingParams


class FinishReason(StrEnum):
    """Why a sequence ended; every sequence ends in exactly one of them."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class FailureCause(StrEnum):
    """Why a sequence ended in `error`: no token may follow in its grammar, or none can be found;
    or anything else, which is nothing that the request could do better."""

    GRAMMAR = "grammar"
    ENGINE = "engine"


class AddSequence(msgspec.Struct, frozen=True, tag=True):
    """Start generating after `prompt_ids`."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams


class FinishSequence(msgspec.Struct, frozen=True, tag=True):
    """End a sequence early: its client left (abort), or a stop string was seen (stop)."""

    request_id: str
    reason: FinishReason


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Leave the step loop and exit."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sent once, when the engine can take sequences.

    Page sizes are in tokens; `startup_seconds` has the names of `metric_families.StartupPhase`.
    """

    max_model_len: int
    vocab_size: int
    dtype: str
    device: str
    num_parameters: int
    eos_token_ids: list[int]
    kv_cache_bytes: int
    local_pages_total: int
    global_pages_total: int
    local_page_bytes: int
    global_page_bytes: int
    local_page_size: int = 0
    global_page_size: int = 0
    enable_prefix_caching: bool = True
    gpu_memory_bytes: int = 0
    pid: int = 0
    startup_seconds: dict[str, float] = {}


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """Sent instead of `EngineInfo` when the engine can't start; the message is for the user."""

    message: str


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural log-probability of a token, and the likeliest tokens in its place, best first.

    Of the logits as the model gives them: temperature, penalties and biases don't enter.
    """

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class SequenceOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one sequence. The last one carries `finish_reason`, and if that is `error`
    also `failure`.

    `logprobs` has an entry for each of `token_ids` if they were asked for. `prompt_logprobs` come
    in pieces, in order, before or with the first token: an entry for each token of the prompt but
    the first, which nothing predicts. `num_cached_tokens` of the prompt were found in the prefix
    cache, told with the first token. `queue_seconds` comes once, after the sequence's first step:
    how long it had waited for that, in an output without tokens if the step brought none.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    failure: FailureCause | None = None
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    num_cached_tokens: int = 0
    queue_seconds: float | None = None


class PrefixStats(msgspec.Struct, frozen=True, kw_only=True):
    """The prefix cache: pages that only it holds, checkpoints, and how many were evicted since the
    engine's start; prompt tokens looked up since then, those found, and those of which at least the
    global pages were found."""

    local_pages: int = 0
    global_pages: int = 0
    num_checkpoints: int = 0
    num_evicted: int = 0
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_global_hit_tokens: int = 0


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """State of the engine after a step, and what the step cost; no tokens means no step.

    `num_dropped_log_lines` are those that its process couldn't write since its start.
    Of `step_seconds`, the scheduler took `schedule_seconds`, model and sampling `model_seconds`.
    """

    num_running: int
    num_waiting: int
    local_pages_used: int
    global_pages_used: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_preemptions: int
    prefix: PrefixStats
    step_seconds: float
    schedule_seconds: float = 0.0
    model_seconds: float = 0.0
    num_dropped_log_lines: int = 0


class StepOutput(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Everything one engine step produced."""

    outputs: list[SequenceOutput]
    stats: StepStats


ToEngine = AddSequence | FinishSequence | Shutdown
FromEngine = EngineInfo | StartFailed | StepOutput
