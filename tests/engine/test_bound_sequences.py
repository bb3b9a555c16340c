"""Grammars and limited thoughts in the engine, from the request to the last token.

The grammars are of three lines of Python; what llguidance makes of real ones is tested elsewhere.
"""

import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.errors import GrammarError
from bezel.engine.grammar import GrammarCompiler, Mask
from bezel.engine.grammar_queue import GrammarQueue
from bezel.engine.messages import AddSequence, FailureCause, FinishReason
from bezel.engine.sampling_params import SamplingParams, ThinkingBudget

VOCAB_SIZE = 300
TIMEOUT_S = 20
OPEN, CLOSE = 290, 291
GREEDY = dict(max_tokens=12, temperature=0.0)
PROMPTS = [[5, 6, 7], list(range(3, 90)), [9] * 40, [200, 100]]


class Counter:
    """Allows tokens n, n+1 and n+2 for place n; ends after `length` places."""

    def __init__(self, length: int, fails_at: int) -> None:
        self.place, self.length, self.fails_at = 0, length, fails_at

    @property
    def allowed(self) -> set[int]:
        return {self.place, self.place + 1, self.place + 2}

    @property
    def is_finished(self) -> bool:
        return self.place == self.length

    def fill_mask(self, mask_W: Mask) -> None:
        if self.place == self.fails_at:
            raise GrammarError("too many states")
        bits = [i in self.allowed for i in range(32 * len(mask_W))]
        mask_W[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token_id: int) -> None:
        assert token_id in self.allowed
        self.place += 1


class Compiler:
    """Grammars are "<length>" or "<length>, fails at <place>"; it is made once `may_be_made`."""

    def __init__(self, may_be_made: threading.Event | None = None) -> None:
        if may_be_made is not None:
            assert may_be_made.wait(TIMEOUT_S), "the engine waited for it"

    def compile(self, grammar: str) -> Counter:
        if grammar == "nonsense":
            raise GrammarError("that is nonsense")
        length, _, place = grammar.partition(", fails at ")
        return Counter(int(length), int(place or -1))


@pytest.fixture
def engine(small_checkpoint: Path) -> Engine:
    return make_engine(small_checkpoint)


def make_engine(path: Path, **settings: Any) -> Engine:
    defaults: dict[str, Any] = dict(dtype="float32", device="cpu", kv_cache_memory_bytes=32 << 20)
    engine = Engine(EngineConfig(model=str(path), **(defaults | settings)))
    engine.grammars = queue_of()
    return engine


def queue_of(may_be_made: threading.Event | None = None) -> GrammarQueue:
    return GrammarQueue(lambda: cast(GrammarCompiler, Compiler(may_be_made)))


def run(
    engine: Engine, params: list[SamplingParams]
) -> tuple[list[list[int]], list[FinishReason | None]]:
    """Tokens of each of the prompts, together, and why each ended."""
    for i, own in enumerate(params):
        engine.add(AddSequence(str(i), PROMPTS[i], own))
    tokens: list[list[int]] = [[] for _ in params]
    reasons: list[FinishReason | None] = [None for _ in params]
    while engine.has_work:
        for output in engine.step().outputs:
            tokens[int(output.request_id)] += output.token_ids
            assert reasons[int(output.request_id)] is None
            assert len(output.logprobs) <= len(output.token_ids)
            reasons[int(output.request_id)] = output.finish_reason
    return tokens, reasons


def fits(token_ids: list[int]) -> bool:
    return all(place <= token_id <= place + 2 for place, token_id in enumerate(token_ids))


def test_every_token_fits_alone_and_among_others(engine: Engine) -> None:
    bound = SamplingParams(**GREEDY, grammar="7")
    (alone,), reasons = run(engine, [bound])
    assert fits(alone) and len(alone) == 7 and reasons == [FinishReason.STOP]
    free = SamplingParams(**GREEDY)
    together, reasons = run(engine, [bound, free, bound, free])
    without, _ = run(engine, [free] * 4)
    assert together[0] == alone and fits(together[2]) and len(together[2]) == 7
    assert [together[1], together[3]] == [without[1], without[3]]
    assert reasons == [FinishReason.STOP, FinishReason.LENGTH] * 2


def test_seeded_draws_of_the_others_stay_the_same(engine: Engine) -> None:
    free = SamplingParams(max_tokens=12, temperature=1.5, seed=3)
    bound = SamplingParams(max_tokens=12, temperature=1.5, seed=4, grammar="99", logprobs=2)
    together, reasons = run(engine, [free, bound, free, bound])
    without, _ = run(engine, [free] * 4)
    assert fits(together[1]) and fits(together[3])
    assert [together[0], together[2]] == [without[0], without[2]]
    assert reasons == [FinishReason.LENGTH] * 4


def test_a_preempted_sequence_goes_on_in_its_grammar(engine: Engine) -> None:
    params = SamplingParams(**GREEDY, grammar="7")
    engine.add(AddSequence("a", PROMPTS[0], params))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [i for output in engine.step().outputs for i in output.token_ids]
        if engine.scheduler.running and len(tokens) % 2:
            engine.scheduler._preempt(engine.scheduler.running[0])
    assert [tokens] == run(engine, [params])[0]


def test_log_probabilities_are_those_before_the_mask(engine: Engine) -> None:
    engine.add(AddSequence("a", PROMPTS[0], SamplingParams(**GREEDY, grammar="1", logprobs=5)))
    while not (outputs := engine.step().outputs):
        pass
    (output,) = outputs
    (entry,) = output.logprobs
    assert not {0, 1, 2} >= {*entry.top_ids}
    free = SamplingParams(**(GREEDY | dict(max_tokens=1)), logprobs=5)
    engine.add(AddSequence("b", PROMPTS[0], free))
    (output,) = engine.step().outputs
    assert output.logprobs[0].top_logprobs == entry.top_logprobs


def test_a_grammar_that_fails_ends_its_sequence_alone(engine: Engine) -> None:
    free = SamplingParams(**GREEDY)
    failing = SamplingParams(**GREEDY, grammar="9, fails at 3", logprobs=2)
    tokens, reasons = run(engine, [free, failing, free])
    assert reasons == [FinishReason.LENGTH, FinishReason.ERROR, FinishReason.LENGTH]
    assert fits(tokens[1]) and len(tokens[1]) == 3
    assert tokens[0] == run(engine, [free] * 3)[0][0]
    assert engine.pool.used == engine.pool.idle


def failures(engine: Engine, grammar: str) -> list[FailureCause | None]:
    """Of a sequence that brings no token."""
    engine.add(AddSequence("a", [3], SamplingParams(**GREEDY, grammar=grammar)))
    outputs = []
    while engine.has_work:
        outputs += engine.step().outputs
    assert [(output.token_ids, output.finish_reason) for output in outputs] == [
        ([], FinishReason.ERROR)
    ]
    return [output.failure for output in outputs]


def test_a_grammar_that_cannot_be_compiled_is_refused(engine: Engine) -> None:
    assert failures(engine, "nonsense") == [FailureCause.GRAMMAR]
    assert failures(engine, "9, fails at 0") == [FailureCause.GRAMMAR]


def test_a_checkpoint_without_a_tokenizer_takes_no_grammar(small_checkpoint: Path) -> None:
    config = EngineConfig(model=str(small_checkpoint), kv_cache_memory_bytes=1 << 20)
    engine = Engine(config)
    for _ in range(2):
        assert failures(engine, "start: /x/") == [FailureCause.ENGINE]


def test_others_go_on_while_a_grammar_waits_for_the_compiler(engine: Engine) -> None:
    may_be_made = threading.Event()
    engine.grammars = queue_of(may_be_made)
    engine.add(AddSequence("bound", PROMPTS[0], SamplingParams(**GREEDY, grammar="7")))
    engine.add(AddSequence("free", PROMPTS[1], SamplingParams(**GREEDY)))
    for _ in range(6):
        step = engine.step()
        assert [(o.request_id, len(o.token_ids)) for o in step.outputs] == [("free", 1)]
        assert (step.stats.num_running, step.stats.num_waiting) == (1, 1)
    may_be_made.set()
    tokens: dict[str, list[int]] = {"bound": [], "free": []}
    while engine.has_work:
        for output in engine.step().outputs:
            tokens[output.request_id] += output.token_ids
    assert len(tokens["bound"]) == 7 and fits(tokens["bound"])
    assert len(tokens["free"]) == 6


def test_a_sequence_can_be_ended_while_it_waits_for_the_compiler(engine: Engine) -> None:
    may_be_made = threading.Event()
    engine.grammars = queue_of(may_be_made)
    for name in ("first", "second"):
        engine.add(AddSequence(name, PROMPTS[0], SamplingParams(**GREEDY, grammar="2")))
    step = engine.step()
    assert (step.outputs, step.stats.num_running, step.stats.num_waiting) == ([], 0, 2)
    engine.finish("first", FinishReason.ABORT)
    may_be_made.set()
    names = set()
    while engine.has_work:
        names |= {output.request_id for output in engine.step().outputs}
    assert names == {"second"}
    engine.grammars = queue_of(threading.Event())
    engine.add(AddSequence("third", PROMPTS[0], SamplingParams(**GREEDY, grammar="2")))
    engine.finish("third", FinishReason.ABORT)
    assert not engine.has_work


def test_a_mistake_of_ours_in_making_the_compiler_is_not_told_as_a_requests(
    engine: Engine,
) -> None:
    def make() -> GrammarCompiler:
        raise ZeroDivisionError

    engine.grammars = GrammarQueue(make)
    engine.add(AddSequence("a", [3], SamplingParams(**GREEDY, grammar="2")))
    with pytest.raises(ZeroDivisionError):
        while engine.has_work:
            engine.step()


@pytest.mark.parametrize("num_tokens", [0, 1, 4, 11])
def test_a_thought_ends_after_so_many_tokens(engine: Engine, num_tokens: int) -> None:
    budget = ThinkingBudget(num_tokens=num_tokens, open_id=OPEN, close_id=CLOSE, is_open=True)
    without, _ = run(engine, [SamplingParams(**GREEDY)])
    limited = SamplingParams(**GREEDY, thinking_budget=budget)
    tokens, reasons = run(engine, [limited, SamplingParams(**GREEDY)])
    assert tokens[0][: num_tokens + 1] == [*without[0][:num_tokens], CLOSE]
    assert CLOSE not in without[0] and tokens[0].count(CLOSE) == 1
    assert reasons == [FinishReason.LENGTH] * 2


def test_a_thought_that_the_model_opens_is_limited_too(engine: Engine) -> None:
    """The model is made to open it by a bias; were it not for the limit, it would go on so."""
    budget = ThinkingBudget(num_tokens=2, open_id=OPEN, close_id=CLOSE, is_open=False)
    params = SamplingParams(**GREEDY, thinking_budget=budget, logit_bias={OPEN: 100.0})
    (tokens,), _ = run(engine, [params])
    assert tokens == [OPEN] * 3 + [CLOSE] + [OPEN, CLOSE] * 4
