"""`bezel bench latency` and `throughput`: what an engine is given, and how it is timed."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError
from bezel.engine.messages import AddSequence, SequenceOutput
from bezel.server.benchmarking.offline import (
    Iteration,
    LatencyBenchmark,
    ThroughputBenchmark,
    run_offline,
    to_json,
    to_text,
)
from bezel.server.cli import main


@dataclass
class Limits:
    max_model_len: int = 20
    vocab_size: int = 40
    dtype: str = "float32"
    device: str = "cpu"


@dataclass
class Outputs:
    outputs: list[SequenceOutput]


@dataclass
class Named:
    name: str = "tiny"


@dataclass
class OneAtATime:
    """A step gives the oldest sequence its next token; it takes twice as long each run."""

    config: EngineConfig = field(default_factory=EngineConfig)
    info: Limits = field(default_factory=Limits)
    checkpoint: Named = field(default_factory=Named)
    now: float = 0.0
    step_s: float = 0.5
    added: list[AddSequence] = field(default_factory=list)
    left: list[list[Any]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def add(self, message: AddSequence) -> None:
        if not self.left and self.added:
            self.step_s *= 2
        self.added.append(message)
        self.left.append([message.request_id, message.params.max_tokens])

    @property
    def has_work(self) -> bool:
        return bool(self.left)

    def step(self) -> Outputs:
        self.now += self.step_s
        self.left[0][1] -= 1
        request_id, num_left = self.left[0]
        if not num_left:
            self.left.pop(0)
        nothing = SequenceOutput(request_id="1", token_ids=[])
        return Outputs([nothing, SequenceOutput(request_id=request_id, token_ids=[7])])


def run(engine: OneAtATime, benchmark: Any) -> list[Iteration]:
    return run_offline(cast(Any, engine), benchmark, clock=engine.clock)


def test_the_first_iteration_is_left_out_and_times_are_of_each() -> None:
    engine = OneAtATime()
    benchmark = LatencyBenchmark(batch_size=2, input_len=4, output_len=3, num_iters=3)
    # With steps of a second: the first token of one comes after 1, of the other after 4; 6 in all.
    expected = [Iteration(6.0, 2.5), Iteration(12.0, 5.0), Iteration(24.0, 10.0)]
    assert run(engine, benchmark) == expected
    prompts = [message.prompt_ids for message in engine.added]
    assert len(prompts) == 8 and {len(ids) for ids in prompts} == {4}
    assert len({tuple(ids) for ids in prompts}) == 8, "else the prefix cache would have them"
    assert {10 <= token_id < 40 for ids in prompts for token_id in ids} == {True}
    assert all(m.params.ignore_eos and m.params.temperature == 0 for m in engine.added)


def test_medians_and_rates() -> None:
    engine = OneAtATime()
    benchmark = ThroughputBenchmark(num_prompts=6, input_len=10, output_len=4, num_iters=3)
    iterations = [Iteration(2.0, 0.5), Iteration(3.0, 1.0), Iteration(9.0, 1.5)]
    content = to_json(cast(Any, engine), benchmark, iterations)
    results = content["results"]
    assert (results["total_s"], results["ttft_s"]) == (3.0, 1.0)
    assert results["requests_per_s"] == 2.0
    assert (results["output_tokens_per_s"], results["all_tokens_per_s"]) == (8.0, 28.0)
    assert json.loads(json.dumps(content)) == content
    printed = to_text(content)
    assert "6 × (10 + 4 tokens), median of 3\n" in printed
    assert "3 s, from 2 to 9; 1 s to the first token\n" in printed


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="together exceed 20 tokens"):
        run(OneAtATime(), LatencyBenchmark(input_len=15, output_len=6))


def test_the_command_with_a_real_engine(
    small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["bench", "throughput", str(small_checkpoint), "--num-prompts", "3", "--input-len", "5"]
    argv += ["--output-len", "4", "--num-iters", "2", "--max-num-seqs", "2", "--device", "cpu"]
    assert main([*argv, "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["arguments"]["num_prompts"] == 3
    assert content["engine"]["max_num_seqs"] == 2
    totals_s = [iteration["total_s"] for iteration in content["iterations"]]
    assert len(totals_s) == 2 and content["results"]["total_s"] == statistics.median(totals_s)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["latency", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["latency", "--num-prompts", "3"], "unknown flag --num-prompts"),
        (["throughput", "--num-iters", "0"], "--num-iters must be at least 1, got 0"),
        (["throughput", "--max-num-seqs", "0"], "--max-num-seqs must be at least 1, got 0"),
        (["throughput", "--json", "none/out.json"], "--json: there is no folder none"),
        (["latency", "none.gguf"], "none.gguf can't be read"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *argv]) == 2
    assert capsys.readouterr().err.startswith(f"bezel: error: {message}")
