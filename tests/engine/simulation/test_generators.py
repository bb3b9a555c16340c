"""Invented traces have the rates and lengths asked for, and the shape of conversations."""

import math
import statistics
from dataclasses import replace

import pytest

from bezel.engine.errors import ConfigError
from bezel.engine.simulation.generators import WORKLOADS, Workload, generate


def test_single_requests_have_the_rate_and_the_lengths_asked_for() -> None:
    workload = Workload(rate=8.0, num_requests=20_000, prompt_mean=500, output_mean=100)
    requests = list(generate(workload))
    assert len(requests) == 20_000
    arrivals = [request.arrival_s or 0.0 for request in requests]
    gaps = [later - earlier for earlier, later in zip([0.0, *arrivals], arrivals, strict=False)]
    assert statistics.mean(gaps) == pytest.approx(1 / 8.0, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 8.0, rel=0.03), "exponential"
    assert statistics.mean(r.num_prompt_tokens for r in requests) == pytest.approx(500, rel=0.02)
    assert statistics.mean(r.num_output_tokens for r in requests) == pytest.approx(100, rel=0.02)
    logarithms = [math.log(request.num_prompt_tokens) for request in requests]
    assert statistics.stdev(logarithms) == pytest.approx(0.6, rel=0.02)
    assert all(request.after is None for request in requests)


def test_without_spread_every_length_is_the_mean() -> None:
    workload = Workload(num_requests=20, prompt_mean=33, prompt_sigma=0, output_sigma=0)
    assert {(r.num_prompt_tokens, r.num_output_tokens) for r in generate(workload)} == {(33, 100)}


def test_chats_say_again_all_that_was_said() -> None:
    workload = replace(WORKLOADS["chats"], num_requests=10_000, rate=2.0)
    requests = {request.id: request for request in generate(workload)}
    assert len(requests) == 10_000
    beginnings = [request for request in requests.values() if request.after is None]
    assert 10_000 / len(beginnings) == pytest.approx(5, rel=0.06), "within three deviations"
    systems = {(request.prompt or [])[0] for request in requests.values()}
    assert systems == {(f"system {i}", 400) for i in range(4)}
    pauses = []
    for request in requests.values():
        assert request.num_preamble_tokens == 400
        if request.after is None:
            assert request.arrival_s is not None and len(request.prompt or []) == 2
            continue
        before = requests[request.after]
        assert request.arrival_s is None
        said = [*(before.prompt or []), (f"output:{before.id}", before.num_output_tokens)]
        assert (request.prompt or [])[:-1] == said
        pauses.append(request.think_s)
    assert statistics.mean(pauses) == pytest.approx(20, rel=0.05)


def test_a_seed_gives_one_trace() -> None:
    workload = replace(WORKLOADS["agents"], num_requests=300)
    assert list(generate(workload)) == list(generate(workload))
    assert list(generate(workload)) != list(generate(replace(workload, seed=1)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rate", 0.0, "--rate must be above 0, got 0.0"),
        ("rate", math.inf, "--rate must be above 0, got inf"),
        ("num_requests", 0, "--num-requests must be at least 1, got 0"),
        ("turns_mean", 0.5, "--turns-mean must be at least 1, got 0.5"),
        ("prompt_sigma", -1.0, "--prompt-sigma must be at least 0, got -1.0"),
        ("output_mean", math.nan, "--output-mean must be at least 1, got nan"),
    ],
)
def test_values_that_cannot_be(field: str, value: float, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(WORKLOADS["chats"], **{field: value})
    assert caught.value.message == message
