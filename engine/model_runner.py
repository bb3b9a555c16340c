"""Owns the model and its KV arena, and runs one batch through them."""

import logging
import time
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from bezel.engine.allocator import keep_freed_memory, release_freed_memory
from bezel.engine.batch import Batch
from bezel.engine.checkpoint import Checkpoint, iterate_tensors, num_tensors
from bezel.engine.config import EngineConfig
from bezel.engine.cpu_threads import num_threads
from bezel.engine.decode_graphs import DecodeGraphs, capture_sizes
from bezel.engine.decode_programs import DecodePrograms
from bezel.engine.errors import ConfigError
from bezel.engine.kv_cache import KVCache
from bezel.engine.kv_layout import KVLayout
from bezel.engine.logprobs import PromptLogprobs
from bezel.engine.memory import DeviceMemory, arena_bytes, max_model_len
from bezel.engine.model_config import ModelConfig
from bezel.engine.models.registry import build_model
from bezel.engine.packing import Values, with_whole_experts
from bezel.engine.quantization import (
    bfloat16_matrices,
    choose_formats,
    parameter_of,
    stored_in_bfloat16,
    stored_types,
)
from bezel.engine.scheduler import ScheduledStep
from bezel.engine.warm_up import warm_up_model
from bezel.engine.weights import load_weights, text_name
from bezel.kernels.cpu.jit import set_num_threads
from bezel.kernels.cpu.program import threads_run_together
from bezel.kernels.cpu.rows import FEW_VALUES
from bezel.kernels.packed import WeightFormat

logger = logging.getLogger("bezel")


class ModelRunner:
    """A loaded model. `layout`, `arena_bytes` and `max_model_len` say what its cache can hold.

    `startup_seconds` tells what loading and warming up took.
    """

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint) -> None:
        self.model_config = ModelConfig.from_hf(checkpoint.config)
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.dtype, self.device)
        started = time.monotonic()
        is_cpu = self.device.type == "cpu"
        if is_cpu:
            threads = min(num_threads(), torch.get_num_threads())
            # The API process reads its tokenizer meanwhile, and a thread that waits for a core
            # holds up all others: with both of two cores, loading took half as long again.
            set_num_threads(max(1, threads // 2))
        memory = torch.device("meta") if is_cpu else self.device
        self.model = build_model(self.model_config, self.dtype, memory)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        stored = stored_types(checkpoint)
        formats = choose_formats(config, self.model, not is_cpu, stored)
        if is_cpu:
            if self.dtype == torch.bfloat16:
                formats = bfloat16_matrices(self.model) | formats
            else:
                formats = stored_in_bfloat16(self.model, stored) | formats
        formats = with_whole_experts(formats)
        load_weights(self.model, _with_progress(checkpoint, formats), formats)
        if is_cpu:
            set_num_threads(threads)
        self.model.after_loading()
        self.startup_seconds = {"weights": time.monotonic() - started}
        logger.info("loaded %s in %.1f s", checkpoint.name, self.startup_seconds["weights"])
        page_size = config.local_page_size(is_gpu=not is_cpu)
        self.layout = KVLayout.for_model(self.model_config, self.dtype.itemsize, page_size)
        num_bytes = arena_bytes(
            config,
            self.model_config,
            self.layout,
            self.dtype.itemsize,
            DeviceMemory.of(self.device),
        )
        positions = self.model_config.max_position_embeddings
        self.max_model_len = max_model_len(config, self.layout, positions, num_bytes)
        self.arena_bytes = num_bytes
        self.kv_cache = KVCache(self.model_config, self.layout, num_bytes, self.dtype, self.device)
        self.decode_graphs: DecodeGraphs | None = None
        self.decode_programs: DecodePrograms | None = None
        started = time.monotonic()
        if self.device.type == "cuda":
            self._warm_up(config)
        else:
            self._warm_up_cpu(config)
        self.startup_seconds["warm_up"] = time.monotonic() - started

    @property
    def gpu_memory_bytes(self) -> int:
        """What the allocator holds of a GPU's memory; 0 on a CPU."""
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    @torch.inference_mode()
    def run(self, step: ScheduledStep) -> tuple[Tensor, PromptLogprobs | None]:
        """Compute a step: logits_NV (float32) of its sampled sequences, and log-probabilities of
        the prompts whose sequences ask for them."""
        if self.decode_graphs is not None and self.decode_graphs.takes(step):
            return self._logits(self.decode_graphs.run(step)), None
        if self.decode_programs is not None and self.decode_programs.takes(step):
            hidden_SD = self.decode_programs.run(step)
            if hidden_SD is not None:
                return self._logits(hidden_SD), None
        batch = Batch.build(step, self.layout, self.device)
        hidden_TD = self._hidden(batch)
        prompt_logprobs = PromptLogprobs.compute(step, hidden_TD, self._logits)
        if batch.sampled_rows_N is not None:
            hidden_TD = hidden_TD[batch.sampled_rows_N]
        return self._logits(hidden_TD), prompt_logprobs

    @torch.inference_mode()
    def _warm_up(self, config: EngineConfig) -> None:
        """Compile the model's kernels, and record decode steps unless told not to."""
        started = time.monotonic()
        warm_up_model(
            lambda batch: self._logits(self._hidden(batch)[:1]),
            self.layout,
            config.max_num_batched_tokens,
            self.max_model_len,
            self.device,
        )
        if not config.enforce_eager:
            self.decode_graphs = DecodeGraphs(
                self._hidden,
                self.layout,
                capture_sizes(config.max_num_seqs),
                self.max_model_len,
                self.device,
            )
        logger.info("warmed up in %.1f s", time.monotonic() - started)

    @torch.inference_mode()
    def _warm_up_cpu(self, config: EngineConfig) -> None:
        """Compile the kernels of small and of larger steps, if they aren't on disk, and record."""
        started = time.monotonic()
        keep_freed_memory()
        for num_tokens in (2, FEW_VALUES // self.model_config.hidden_size + 1):
            num_tokens = min(num_tokens, config.max_num_batched_tokens, self.max_model_len)
            batch = Batch.idle_chunk(num_tokens, self.layout, self.device)
            self._logits(self._hidden(batch)[:1])
        if not config.enforce_eager and threads_run_together():
            self.decode_programs = DecodePrograms(
                self._hidden, self.layout, config.max_num_seqs, self.max_model_len
            )
            self.decode_programs.warm_up()
        release_freed_memory()  # of loading and compiling
        logger.info("warmed up in %.1f s", time.monotonic() - started)

    def _hidden(self, batch: Batch) -> Tensor:
        hidden_TD: Tensor = self.model(batch, self.kv_cache)
        return hidden_TD

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        logits_NV: Tensor = self.model.compute_logits(hidden_ND)
        return logits_NV


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises ConfigError for a device that isn't there."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: torch finds no usable GPU on this machine")
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it, float32 elsewhere."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def _with_progress(
    checkpoint: Checkpoint, formats: Mapping[str, WeightFormat]
) -> Iterable[tuple[str, Values]]:
    """The checkpoint's tensors, behind a bar on a terminal."""

    def format_of(name: str) -> WeightFormat | None:
        return formats.get(parameter_of(text_name(name)))

    bar: Iterable[tuple[str, Values]] = tqdm(
        iterate_tensors(checkpoint, format_of),
        total=num_tensors(checkpoint),
        desc="Loading weights",
        unit="tensor",
        disable=None,
    )
    return bar
