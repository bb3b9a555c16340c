"""What each observation does to which series."""

import re
from typing import Any

import pytest

from bezel.engine.messages import EngineInfo, FinishReason, PrefixStats, StepStats
from bezel.engine.metrics import Metrics

KINDS = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_pages_used": "gauge",
    "kv_pages_total": "gauge",
    "kv_pages_cached": "gauge",
    "prefix_cache_checkpoints": "gauge",
    "kv_held_bytes": "gauge",
    "kv_cache_usage_ratio": "gauge",
    "engine_step_age_seconds": "gauge",
    "prompt_tokens_total": "counter",
    "generation_tokens_total": "counter",
    "num_preemptions_total": "counter",
    "request_success_total": "counter",
    "prefix_cache_queries_total": "counter",
    "prefix_cache_hits_total": "counter",
    "prefix_cache_global_hits_total": "counter",
    "prefix_cache_evictions_total": "counter",
    "engine_restarts_total": "counter",
    "http_requests_total": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "step_duration_seconds": "histogram",
    "http_request_duration_seconds": "histogram",
}


@pytest.fixture
def metrics() -> Metrics:
    """With 10 local pages of 100 bytes, or 5 global ones of 200, in 1000 bytes."""
    metrics = Metrics()
    info = EngineInfo(
        max_model_len=100,
        vocab_size=10,
        dtype="float32",
        device="cpu",
        num_parameters=1,
        eos_token_ids=[1],
        kv_cache_bytes=1000,
        local_pages_total=10,
        global_pages_total=5,
        local_page_bytes=100,
        global_page_bytes=200,
    )
    metrics.set_model("gemma", info)
    return metrics


def samples(metrics: Metrics) -> dict[str, float]:
    """Sample → value; the label model_name is checked and left out, and "bezel_" too."""
    text, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    values = {}
    for line in text.decode().splitlines():
        if line.startswith("#") or "_created" in line:
            continue
        name, value = line.removeprefix("bezel_").rsplit(" ", 1)
        if not name.startswith("http_"):
            assert 'model_name="gemma"' in name
        name = re.sub(r',?model_name="gemma"', "", name).replace("{}", "")
        values[name] = float(value)
    return values


def stats(**changes: Any) -> StepStats:
    values = {
        "num_running": 3,
        "num_waiting": 4,
        "local_pages_used": 2,
        "global_pages_used": 1,
        "num_prefill_tokens": 100,
        "num_decode_tokens": 2,
        "num_preemptions": 1,
        "prefix": PrefixStats(),
        "step_seconds": 0.0042,
    }
    return StepStats(**(values | changes))


def test_series_and_their_kinds(metrics: Metrics) -> None:
    found = re.findall(r"^# TYPE bezel_(\w+) (\w+)$", metrics.render()[0].decode(), re.MULTILINE)
    assert {name: kind for name, kind in found if not name.endswith("_created")} == KINDS


def test_series_of_the_model_begin_at_zero(metrics: Metrics) -> None:
    values = samples(metrics)
    assert values['kv_pages_total{kind="local"}'] == 10
    assert values['kv_pages_total{kind="global"}'] == 5
    begun = {re.split(r"[{]|_bucket|_count|_sum", name)[0] for name in values}
    assert begun == {name for name in KINDS if not name.startswith("http_")}
    others = [value for name, value in values.items() if not name.startswith("kv_pages_total")]
    assert set(others) == {0.0}


def test_without_a_model_there_is_only_http() -> None:
    metrics = Metrics()
    metrics.observe_http("GET", "/health", 200, 0.1)
    assert all(name.startswith("http_") for name in samples(metrics))


def test_gauges_follow_the_last_step(metrics: Metrics) -> None:
    metrics.observe_step(stats(num_running=9, local_pages_used=7))
    metrics.observe_step(stats())
    values = samples(metrics)
    assert values["num_requests_running"] == 3
    assert values["num_requests_waiting"] == 4
    assert values['kv_pages_used{kind="local"}'] == 2
    assert values['kv_pages_used{kind="global"}'] == 1
    assert values['kv_held_bytes{kind="local"}'] == 200
    assert values['kv_held_bytes{kind="global"}'] == 200
    assert values["kv_cache_usage_ratio"] == 0.4


def test_counters_add_up_over_steps(metrics: Metrics) -> None:
    metrics.observe_step(stats())
    metrics.observe_step(stats(num_prefill_tokens=0, num_preemptions=0))
    values = samples(metrics)
    assert values["prompt_tokens_total"] == 100
    assert values["num_preemptions_total"] == 1
    assert values["step_duration_seconds_count"] == 2
    assert values["step_duration_seconds_sum"] == pytest.approx(0.0084)


def test_the_prefix_cache_is_told_in_totals(metrics: Metrics) -> None:
    first = PrefixStats(
        local_pages=3,
        global_pages=2,
        num_checkpoints=4,
        num_evicted=1,
        num_queried_tokens=100,
        num_hit_tokens=64,
        num_global_hit_tokens=96,
    )
    metrics.observe_step(stats(prefix=first))
    metrics.observe_step(stats(prefix=first))
    # An engine that was started anew counts from zero.
    restarted = PrefixStats(num_queried_tokens=30, num_hit_tokens=0)
    metrics.observe_step(stats(prefix=restarted))
    values = samples(metrics)
    assert values["prefix_cache_queries_total"] == 130
    assert values["prefix_cache_hits_total"] == 64
    assert values["prefix_cache_global_hits_total"] == 96
    assert values["prefix_cache_evictions_total"] == 1
    assert values['kv_pages_cached{kind="local"}'] == 0
    metrics.observe_step(stats(prefix=first))
    values = samples(metrics)
    assert values['kv_pages_cached{kind="local"}'] == 3
    assert values['kv_pages_cached{kind="global"}'] == 2
    assert values["prefix_cache_checkpoints"] == 4
    assert values["prefix_cache_hits_total"] == 128


def test_buckets_tell_milliseconds_apart(metrics: Metrics) -> None:
    metrics.observe_step(stats(step_seconds=0.0042))
    values = samples(metrics)
    assert values['step_duration_seconds_bucket{le="0.004"}'] == 0
    assert values['step_duration_seconds_bucket{le="0.005"}'] == 1
    for name in ("time_to_first_token", "inter_token_latency", "step_duration"):
        below = re.findall(rf'{name}_seconds_bucket{{le="0\.00\d+"}}', "\n".join(values))
        assert len(below) >= 8


def test_engine_as_seen_from_outside(metrics: Metrics) -> None:
    metrics.observe_engine(1.5, 2)
    metrics.observe_engine(0.5, 2)
    metrics.observe_engine(0.25, 3)
    values = samples(metrics)
    assert values["engine_step_age_seconds"] == 0.25
    assert values["engine_restarts_total"] == 3


def test_clock_of_a_sequence(metrics: Metrics) -> None:
    times = iter([10.0, 10.5, 10.75, 11.0])
    sequence = metrics.sequence(7, clock=lambda: next(times))
    sequence.observe_tokens(0)
    sequence.observe_tokens(1)
    sequence.observe_tokens(2)
    sequence.observe_finished(FinishReason.LENGTH)
    values = samples(metrics)
    assert values["time_to_first_token_seconds_sum"] == 0.5
    assert values["time_to_first_token_seconds_count"] == 1
    assert values["inter_token_latency_seconds_sum"] == 0.25
    assert values["inter_token_latency_seconds_count"] == 2
    assert values["e2e_request_latency_seconds_sum"] == 1.0
    assert values["request_prompt_tokens_sum"] == 7
    assert values["request_generation_tokens_sum"] == 3
    assert values["generation_tokens_total"] == 3
    assert values['request_success_total{finished_reason="length"}'] == 1
    assert values['request_success_total{finished_reason="stop"}'] == 0


def test_http(metrics: Metrics) -> None:
    metrics.observe_http("POST", "/v1/completions", 200, 0.25)
    metrics.observe_http("POST", "/v1/completions", 429, 0.25)
    values = samples(metrics)
    labels = 'method="POST",route="/v1/completions"'
    assert values[f'http_requests_total{{{labels},status="200"}}'] == 1
    assert values[f'http_requests_total{{{labels},status="429"}}'] == 1
    assert values[f"http_request_duration_seconds_sum{{{labels}}}"] == 0.5


def test_two_servers_in_one_process_do_not_meet(metrics: Metrics) -> None:
    other = Metrics()
    other.observe_http("GET", "/health", 200, 0.1)
    assert not any(name.startswith("http_requests_total") for name in samples(metrics))
