"""The engine: sequences in, tokens out, one step at a time. Synchronous and single-threaded.

Scheduler.schedule → ScheduledStep → ModelRunner.run → Sampler.draw → Scheduler.commit → StepOutput
"""

import logging
import os
import time
from collections.abc import Sequence as SequenceOf

import torch

from bezel.engine.checkpoint import Checkpoint, resolve_checkpoint
from bezel.engine.config import EngineConfig
from bezel.engine.errors import BezelError, GrammarError
from bezel.engine.grammar import GrammarCompiler, GrammarState
from bezel.engine.grammar_queue import GrammarQueue
from bezel.engine.logs import num_dropped_lines
from bezel.engine.memory import prefix_cache_bytes
from bezel.engine.messages import (
    AddSequence,
    EngineInfo,
    FailureCause,
    FinishReason,
    PrefixStats,
    SequenceOutput,
    StepOutput,
    StepStats,
)
from bezel.engine.model_runner import ModelRunner
from bezel.engine.page_pool import PagePool
from bezel.engine.page_tables import PageTables
from bezel.engine.sampler import Sampler
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.scheduler import ScheduledStep, Scheduler
from bezel.engine.sequence import Sequence
from bezel.engine.warm_up import warm_up_sampling

logger = logging.getLogger("bezel")

# With nothing else to do, as long as a message may lie unread while a grammar isn't compiled.
_GRAMMAR_WAIT_S = 0.01


class Engine:
    """One model and everything it is serving.

    Raises:
        ConfigError: from the constructor, when the checkpoint or a setting can't work.
    """

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint | None = None) -> None:
        self.config = config
        self.checkpoint = checkpoint or resolve_checkpoint(config.model)
        self.runner = ModelRunner(config, self.checkpoint)
        self.pool = PagePool(self.runner.layout, self.runner.arena_bytes)
        is_gpu = self.runner.device.type == "cuda"
        cache_bytes = prefix_cache_bytes(config, is_gpu, self.runner.arena_bytes)
        self.scheduler = Scheduler(config, self.pool, cache_bytes)
        vocab_size = self.runner.model_config.vocab_size
        suppressed = self.checkpoint.generation_config.get("suppress_tokens") or []
        self.sampler = Sampler(suppressed, vocab_size)
        if is_gpu or self.runner.decode_programs is not None:
            warm_up_sampling(self.sampler, self.runner.layout, vocab_size, self.runner.device)
        self._eos_token_ids = frozenset(
            token_id for token_id in eos_token_ids(self.checkpoint) if token_id < vocab_size
        )
        self.grammars = GrammarQueue(self._make_grammar_compiler)
        self._num_added = 0
        self._arrivals: dict[str, float] = {}  # of those that no step has begun with

    @property
    def info(self) -> EngineInfo:
        layout = self.runner.layout
        return EngineInfo(
            max_model_len=self.runner.max_model_len,
            vocab_size=self.runner.model_config.vocab_size,
            dtype=str(self.runner.dtype).removeprefix("torch."),
            device=str(self.runner.device),
            num_parameters=self.runner.num_parameters,
            eos_token_ids=sorted(self._eos_token_ids),
            kv_cache_bytes=self.pool.num_sectors * layout.sector_bytes,
            local_pages_total=self.pool.total.local,
            global_pages_total=self.pool.total.global_,
            local_page_bytes=layout.local_page_bytes,
            global_page_bytes=layout.global_page_bytes,
            local_page_size=layout.local_page_size,
            global_page_size=layout.global_page_size,
            enable_prefix_caching=self.config.enable_prefix_caching,
            gpu_memory_bytes=self.runner.gpu_memory_bytes,
            pid=os.getpid(),
            startup_seconds=self.runner.startup_seconds,
        )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or len(self.grammars) > 0

    def can_serve(self, request: AddSequence) -> bool:
        """Whether prompt and output fit, and every token has an embedding.

        The front end has checked it, but perhaps with the limits of an engine that died since.
        """
        prompt_ids = request.prompt_ids
        num_tokens = len(prompt_ids) + request.params.max_tokens
        return (
            0 < len(prompt_ids)
            and num_tokens <= self.runner.max_model_len
            and 0 <= min(prompt_ids)
            and max(prompt_ids) < self.runner.model_config.vocab_size
        )

    def add(self, request: AddSequence) -> None:
        """Queue a sequence that the engine `can_serve`."""
        assert self.can_serve(request)
        self._arrivals[request.request_id] = time.perf_counter()
        if request.params.grammar is None:
            self._schedule(request, None)
        else:
            self.grammars.add(request)

    def _schedule(self, request: AddSequence, grammar: GrammarState | None) -> None:
        params = request.params
        eos = frozenset() if params.ignore_eos else self._eos_token_ids
        self._num_added += 1
        sequence = Sequence(
            request_id=request.request_id,
            token_ids=list(request.prompt_ids),
            params=params,
            # A request without a seed still gets one of its own, or equal prompts would get
            # equal answers.
            seed=params.seed
            if params.seed is not None
            else hash((self.config.seed, self._num_added)),
            stop_token_ids=eos | frozenset(params.stop_token_ids),
            pages=PageTables(self.runner.layout),
            grammar=grammar,
        )
        self.scheduler.add(sequence)

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """End a sequence in any phase; nothing happens if it has already ended."""
        self._arrivals.pop(request_id, None)
        self.grammars.remove(request_id)
        self.scheduler.finish(request_id, reason)

    def step(self) -> StepOutput:
        """Compute one step, with those whose grammars are compiled by now. Call only while
        `has_work`; nothing is computed where that is a grammar that isn't."""
        refusals = self._take_grammars()
        step = self._compute() if self.scheduler.has_work else self.report()
        return StepOutput(outputs=refusals + step.outputs, stats=step.stats) if refusals else step

    def _take_grammars(self) -> list[SequenceOutput]:
        """Schedule those whose grammars are compiled; the ends of those whose can't be."""
        refusals = []
        timeout_s = 0.0 if self.scheduler.has_work else _GRAMMAR_WAIT_S
        for request, grammar in self.grammars.take(timeout_s):
            if isinstance(grammar, BezelError):
                refusals.append(_refusal(request, grammar))
                del self._arrivals[request.request_id]
            else:
                self._schedule(request, grammar)
        return refusals

    def _make_grammar_compiler(self) -> GrammarCompiler:
        vocab_size = self.runner.model_config.vocab_size
        return GrammarCompiler(self.checkpoint, vocab_size, self._eos_token_ids)

    @torch.inference_mode()
    def _compute(self) -> StepOutput:
        started = time.perf_counter()
        step = self.scheduler.schedule()
        assert step.sequences, "there is work, but nothing could be scheduled"
        scheduled = time.perf_counter()
        logits_NV, prompt_logprobs = self.runner.run(step)
        draws = self.sampler.draw(logits_NV, step.sampled)
        token_ids, logprobs = draws.fetch()
        pieces = {} if prompt_logprobs is None else prompt_logprobs.fetch()
        computed = time.perf_counter()
        sampled = self.scheduler.commit(step, token_ids)
        model_s, commit_s = computed - scheduled, time.perf_counter() - computed
        queued = self._queue_seconds(step, started)
        outputs = [
            SequenceOutput(
                request_id=sequence.request_id,
                token_ids=[token_id] if isinstance(token_id, int) else [],
                finish_reason=sequence.finish_reason,
                failure=sequence.failure,
                logprobs=[logprobs[row]] if row in logprobs and isinstance(token_id, int) else [],
                prompt_logprobs=pieces.pop(sequence.request_id, []),
                num_cached_tokens=_cached_tokens_to_tell(sequence),
                queue_seconds=queued.pop(sequence.request_id, None),
            )
            for row, (sequence, token_id) in enumerate(zip(sampled, token_ids, strict=True))
        ]
        outputs += [
            SequenceOutput(
                request_id=request_id,
                token_ids=[],
                prompt_logprobs=pieces.get(request_id, []),
                queue_seconds=queued.get(request_id),
            )
            for request_id in dict.fromkeys([*pieces, *queued])
        ]
        schedule_s = scheduled - started + commit_s
        stats = self._stats(step, time.perf_counter() - started, schedule_s, model_s)
        return StepOutput(outputs=outputs, stats=stats)

    def report(self) -> StepOutput:
        """The state as it is, without computing anything."""
        return StepOutput(outputs=[], stats=self._stats(ScheduledStep(), 0.0))

    def generate(
        self, prompts: SequenceOf[list[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[list[int]]:
        """Run prompts (token ids) together to their end; the sampled ids of each."""
        all_params = params if isinstance(params, list) else [params] * len(prompts)
        for i, (prompt_ids, own) in enumerate(zip(prompts, all_params, strict=True)):
            self.add(AddSequence(f"offline-{i}", list(prompt_ids), own))
        tokens: dict[str, list[int]] = {f"offline-{i}": [] for i in range(len(prompts))}
        while self.has_work:
            for output in self.step().outputs:
                tokens[output.request_id] += output.token_ids
        return list(tokens.values())

    def _queue_seconds(self, step: ScheduledStep, now: float) -> dict[str, float]:
        """How long those waited whose first step it is."""
        if not self._arrivals:
            return {}
        ids = [scheduled.sequence.request_id for scheduled in step.sequences]
        return {i: now - self._arrivals.pop(i) for i in ids if i in self._arrivals}

    def _stats(
        self, step: ScheduledStep, step_s: float, schedule_s: float = 0.0, model_s: float = 0.0
    ) -> StepStats:
        used, sharing = self.pool.used - self.pool.idle, self.scheduler.sharing
        num_prefill = sum(s.num_tokens for s in step.sequences if s.is_prefill)
        return StepStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting) + len(self.grammars),
            local_pages_used=used.local,
            global_pages_used=used.global_,
            num_prefill_tokens=num_prefill,
            num_decode_tokens=step.num_tokens - num_prefill,
            num_preemptions=step.num_preemptions,
            prefix=PrefixStats(
                local_pages=self.pool.idle.local,
                global_pages=self.pool.idle.global_,
                num_checkpoints=sharing.cache.num_checkpoints,
                num_evicted=sharing.cache.num_evicted,
                num_queried_tokens=sharing.num_queried_tokens,
                num_hit_tokens=sharing.num_hit_tokens,
                num_global_hit_tokens=sharing.num_global_hit_tokens,
            ),
            step_seconds=step_s,
            schedule_seconds=schedule_s,
            model_seconds=model_s,
            num_dropped_log_lines=num_dropped_lines(),
        )


def _refusal(request: AddSequence, error: BezelError) -> SequenceOutput:
    ids = {"request_id": request.request_id}
    logger.warning("the engine can't serve a request", extra=ids)
    # The reason may quote it.
    logger.debug("the engine can't serve a request: %s", error.message, extra=ids)
    is_clients = isinstance(error, GrammarError)
    return SequenceOutput(
        request_id=request.request_id,
        token_ids=[],
        finish_reason=FinishReason.ERROR,
        failure=FailureCause.GRAMMAR if is_clients else FailureCause.ENGINE,
    )


def _cached_tokens_to_tell(sequence: Sequence) -> int:
    return sequence.num_cached_tokens if sequence.num_output_tokens == 1 else 0


def eos_token_ids(checkpoint: Checkpoint) -> frozenset[int]:
    """Union of what config.json and generation_config.json call end of sequence.

    Gemma 4's config.json lacks <|tool_response> (50), its generation_config.json has it.
    """
    found: set[int] = set()
    for source in (
        checkpoint.config,
        checkpoint.config.get("text_config", {}),
        checkpoint.generation_config,
    ):
        value = source.get("eos_token_id")
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(found)
