"""The report says what was assumed, that it is estimated, and the numbers of the results."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from bezel.engine.simulation.report import to_json, to_text
from bezel.engine.simulation.results import Results, results_of
from bezel.engine.simulation.setup import Setup
from bezel.engine.simulation.simulator import Simulator
from bezel.engine.simulation.trace import TraceRequest


@pytest.fixture
def results(simulator: Callable[..., Simulator]) -> Results:
    def requests() -> Iterator[TraceRequest]:
        for i in range(20):
            yield TraceRequest(arrival_s=i * 0.02, prompt_tokens=50, num_output_tokens=1 + i)

    return results_of(simulator(requests()).run(), slo_ttft_s=0.25, slo_itl_s=0.1)


def test_text_has_constants_and_numbers(setup: Setup, results: Results) -> None:
    text = to_text(setup, results)
    lines = text.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 130
    assert "gemma-3-270m in bfloat16 on one 2 CPU cores; all times are estimated" in lines[0]
    assert "4 GB; 0.082 TB/s, of which 50% are reached; 0.7 TFLOP/s, 60%; 3.0 ms more" in text
    assert results.ttft_s is not None and results.itl_s is not None
    row = next(line for line in lines if line.startswith("to first token")).split()
    ttft = results.ttft_s
    shown = [float(value) for value in row[3:]]
    assert shown == pytest.approx([ttft.mean, ttft.p50, ttft.p90, ttft.p99, ttft.max], rel=1e-3)
    assert f"{results.peak_waiting} waiting" not in text
    assert f"at most {results.peak_waiting}" in text
    assert "first token within 0.25 s and others every 0.1 s or faster" in text


def test_text_of_nothing(setup: Setup, simulator: Callable[..., Simulator]) -> None:
    text = to_text(setup, results_of(simulator([]).run()))
    assert "requests    0: 0 answered" in text
    assert "to first token               -" in text
    assert "goodput" not in text


def test_json_has_everything(setup: Setup, results: Results) -> None:
    found = json.loads(json.dumps(to_json(setup, results)))
    assert "estimated" in found["estimated"]
    assert found["device"]["memory_efficiency"] == setup.device.memory_efficiency
    assert found["engine"]["max_num_seqs"] == 128
    assert found["memory"]["kv_bytes"] == setup.arena_bytes
    assert results.ttft_s is not None
    assert found["results"]["ttft_s"]["p99"] == results.ttft_s.p99
    assert found["results"]["timeline"]["running"] == results.timeline["running"]
    later = replace(results, num_answered=7)
    assert to_json(setup, later)["results"]["num_answered"] == 7
