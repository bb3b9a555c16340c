"""Grammars and limited thoughts in the engine, from the request to the last token.

The grammars are of three lines of Python; what llguidance makes of real ones is tested elsewhere.
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.errors import ConfigError, GrammarError
from bezel.engine.grammar import GrammarCompiler, Mask
from bezel.engine.messages import AddSequence, FinishReason
from bezel.engine.sampling_params import SamplingParams, ThinkingBudget

VOCAB_SIZE = 300
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
    """Grammars are "<length>" or "<length>, fails at <place>"."""

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
    engine.grammar_compiler = cast(GrammarCompiler, Compiler())
    return engine


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
        tokens += engine.step().outputs[0].token_ids
        if engine.has_work and len(tokens) % 2:
            engine.scheduler._preempt(engine.scheduler.running[0])
    assert [tokens] == run(engine, [params])[0]


def test_log_probabilities_are_those_before_the_mask(engine: Engine) -> None:
    engine.add(AddSequence("a", PROMPTS[0], SamplingParams(**GREEDY, grammar="1", logprobs=5)))
    (output,) = engine.step().outputs
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


def test_a_grammar_that_cannot_be_compiled_is_refused(engine: Engine) -> None:
    with pytest.raises(GrammarError, match="nonsense"):
        engine.add(AddSequence("a", [3], SamplingParams(**GREEDY, grammar="nonsense")))
    assert not engine.has_work


def test_a_checkpoint_without_a_tokenizer_takes_no_grammar(small_checkpoint: Path) -> None:
    config = EngineConfig(model=str(small_checkpoint), kv_cache_memory_bytes=1 << 20)
    engine = Engine(config)
    with pytest.raises(ConfigError, match="tokenizer"):
        engine.add(AddSequence("a", [3], SamplingParams(**GREEDY, grammar="start: /x/")))
    assert not engine.has_work


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
