"""Settings of the engine. What follows from the checkpoint is computed, never written back here."""

from dataclasses import dataclass, field
from typing import Any

from bezel.engine.errors import ConfigError
from bezel.engine.logs import LogSettings


def option(default: Any, help_text: str, **metadata: Any) -> Any:
    """A dataclass field that is also a command line flag and a `BEZEL_*` variable; with `secret`
    its value is shown nowhere."""
    is_shown = not metadata.get("secret", False)
    return field(default=default, repr=is_shown, metadata={"help": help_text, **metadata})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How the engine loads and runs one model."""

    model: str = "default"
    logs: LogSettings = field(default_factory=LogSettings)
    dtype: str = option(
        "auto",
        "Number format of weights, activations and KV pages",
        choices=("auto", "float32", "bfloat16"),
    )
    quantization: str = option(
        "auto",
        "Format of weights on a CPU; auto keeps a GGUF near its own size unless --dtype is given, "
        "none means --dtype",
        choices=("auto", "none", "int8", "int4"),
    )
    device: str = option("auto", "Where the model runs", choices=("auto", "cpu", "cuda"))
    max_model_len: int | None = option(
        None,
        "Longest prompt plus output in tokens [default: what the model and the KV memory allow]",
    )
    max_num_seqs: int = option(128, "Most sequences in one step")
    max_num_queued_reqs: int = option(
        1024, "Requests that may wait beyond the running ones; more get 429 with Retry-After"
    )
    max_num_queued_tokens: int = option(
        2_000_000,
        "Prompt tokens that may wait for the first token of their answers; more get 429 with "
        "Retry-After, unless nobody else waits",
    )
    engine_hang_timeout: int | None = option(
        None,
        "Seconds the engine may say nothing with work pending before its process is ended and "
        "started anew; 0 for any number [default: 300, and more on a CPU with a large model]",
    )
    engine_ready_timeout: int = option(
        1800,
        "Seconds in which the engine must have loaded the model and computed a first token before "
        "its process is ended; 0 for any number",
    )
    max_num_batched_tokens: int = option(2048, "Token budget of one step, prefill chunks included")
    long_prefill_token_threshold: int = option(
        0, "Most prompt tokens one sequence computes in a step; 0 means the whole budget"
    )
    max_num_mixed_prefill_tokens: int = option(
        512,
        "Most tokens that a lone prompt computes in a step in which others decode; with more "
        "prompts, or with 0, it is the whole budget",
    )
    block_size: int | None = option(
        None,
        "Tokens in a local KV page; a global page holds four times as many [default: 16, on a "
        "CPU 8]",
        choices=(8, 16, 32, 64),
    )
    kv_cache_memory_bytes: int | None = option(
        None,
        "Bytes for KV pages, e.g. 2G [default: a share of free memory]",
        type="bytes",
    )
    gpu_memory_utilization: float = option(
        0.92, "Share of a GPU's memory to use for weights and KV pages together"
    )
    enforce_eager: bool = option(
        False, "Launch every kernel of a decode step on its own instead of replaying recorded steps"
    )
    enable_prefix_caching: bool = option(
        True, "Keep keys and values of prompts that may come again, as long as there is room"
    )
    prefix_cache_memory_bytes: int | None = option(
        None,
        "Most bytes of KV pages that are kept only for prompts that may come again [default: all "
        "on a GPU, on a CPU an eighth]",
        type="bytes",
    )
    seed: int = option(0, "Seed of requests that bring none of their own")

    def __post_init__(self) -> None:
        """Check what the checkpoint has no say in.

        Raises:
            ConfigError: naming the flag that is out of range.
        """
        _at_least(1, "--max-num-seqs", self.max_num_seqs)
        _at_least(0, "--max-num-queued-reqs", self.max_num_queued_reqs)
        _at_least(1, "--max-num-queued-tokens", self.max_num_queued_tokens)
        _at_least(0, "--engine-hang-timeout", self.engine_hang_timeout or 0)
        _at_least(0, "--engine-ready-timeout", self.engine_ready_timeout)
        _at_least(self.max_num_seqs, "--max-num-batched-tokens", self.max_num_batched_tokens)
        _at_least(0, "--long-prefill-token-threshold", self.long_prefill_token_threshold)
        _at_least(0, "--max-num-mixed-prefill-tokens", self.max_num_mixed_prefill_tokens)
        if self.kv_cache_memory_bytes is not None:
            _at_least(1, "--kv-cache-memory-bytes", self.kv_cache_memory_bytes)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                "--gpu-memory-utilization must be above 0 and at most 1, "
                f"got {self.gpu_memory_utilization}"
            )

    def local_page_size(self, is_gpu: bool) -> int:
        """Tokens in a local KV page on a GPU or a CPU.

        Beginnings are shared in whole global pages, so smaller ones leave less to compute anew. A
        GPU multiplies 64 keys at a time and wants pages of that size; a CPU doesn't care.
        """
        return self.block_size or (16 if is_gpu else 8)


def _at_least(low: int, flag: str, value: int) -> None:
    if value < low:
        raise ConfigError(f"{flag} must be at least {low}, got {value}")
