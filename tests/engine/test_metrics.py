"""What each observation does to which series, and what a scrape looks like."""

import os
import re
from typing import Any

import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from scrape import info

from bezel.engine.messages import FinishReason, PrefixStats, StepStats
from bezel.engine.metric_families import (
    FAMILIES,
    AbortReason,
    ConnectionEnd,
    Phase,
    Process,
    Rejection,
    StartupPhase,
)
from bezel.engine.metrics import Metrics

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
INFO = info(
    max_model_len=100,
    global_pages_total=5,
    global_page_bytes=200,
    local_page_size=16,
    global_page_size=64,
    gpu_memory_bytes=7,
    startup_seconds={"weights": 2.5},
)


@pytest.fixture
def metrics() -> Metrics:
    """With 10 local pages of 100 bytes, or 5 global ones of 200, in 1000 bytes."""
    metrics = Metrics()
    metrics.set_model("gemma", INFO)
    return metrics


def samples(metrics: Metrics) -> dict[str, float]:
    """Sample → value; the label model_name and "bezel_" are left out, other families too."""
    values = {}
    for line in metrics.render()[0].decode().splitlines():
        if line.startswith("bezel_") and "bezel_engine_process" not in line:
            name, value = line.removeprefix("bezel_").rsplit(" ", 1)
            name = re.sub(r',model_name="gemma"|model_name="gemma",?', "", name)
            values[name.replace("{}", "")] = float(value)
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
        "schedule_seconds": 0.0002,
        "model_seconds": 0.0036,
    }
    return StepStats(**(values | changes))


def test_series_of_the_model_begin_at_zero(metrics: Metrics) -> None:
    values = samples(metrics)
    assert values['kv_pages_capacity{kind="local"}'] == 10
    assert values['kv_pages_capacity{kind="global"}'] == 5
    assert values["gpu_memory_bytes"] == 7
    assert values['startup_seconds{phase="weights"}'] == 2.5
    begun = {re.split(r"[{]|_bucket|_count|_sum", name)[0] for name in values}
    of_model = {f.exposed_name.removeprefix("bezel_") for f in FAMILIES if f.of_model}
    assert of_model <= begun
    told = ("kv_pages_capacity", "gpu_memory", "cache_config", "build_info", "startup")
    assert {value for name, value in values.items() if not name.startswith(told)} == {0.0}
    for reason in AbortReason:
        for phase in Phase:
            assert f'request_aborts_total{{phase="{phase}",reason="{reason}"}}' in values


def test_how_the_cache_is_laid_out(metrics: Metrics) -> None:
    (line,) = [name for name in samples(metrics) if name.startswith("cache_config_info")]
    labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
    assert labels == {
        "block_size": "64",
        "num_gpu_blocks": "5",
        "local_page_size": "16",
        "num_local_pages": "10",
        "cache_dtype": "float32",
        "kv_cache_memory_bytes": "1000",
        "enable_prefix_caching": "True",
    }


def test_without_a_model_there_is_only_the_server() -> None:
    metrics = Metrics()
    metrics.observe_http("GET", "/health", 200, 0.1)
    metrics.observe_startup(StartupPhase.TOKENIZER, 1.0)
    metrics.observe_step(stats())  # a first token, to see that the engine can
    begun = {name.split("{")[0] for name in samples(metrics)}
    assert begun == {
        *("ready", "build_info", "http_requests_total"),
        *("connections_open", "connections_closed_total", "log_lines_dropped_total"),
        *(f"event_loop_lag_seconds_{part}" for part in ("bucket", "count", "sum")),
        *(f"http_request_duration_seconds_{part}" for part in ("bucket", "count", "sum")),
    }
    metrics.set_model("gemma", INFO)
    values = samples(metrics)
    assert values['startup_seconds{phase="tokenizer"}'] == 1.0
    assert values["step_duration_seconds_count"] == 0


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
    assert values["kv_cache_usage_perc"] == 0.4


def test_counters_add_up_over_steps(metrics: Metrics) -> None:
    metrics.observe_step(stats())
    metrics.observe_step(stats(num_prefill_tokens=0, num_preemptions=0))
    metrics.observe_step(stats(num_prefill_tokens=0, num_decode_tokens=0))  # no step at all
    values = samples(metrics)
    assert values["prompt_tokens_total"] == 100
    assert values["num_preemptions_total"] == 2
    assert values["step_duration_seconds_count"] == 2
    assert values["step_duration_seconds_sum"] == pytest.approx(0.0084)
    assert values["step_schedule_seconds_sum"] == pytest.approx(0.0004)
    assert values["step_model_seconds_sum"] == pytest.approx(0.0072)
    assert values["iteration_tokens_total_count"] == 2
    assert values["iteration_tokens_total_sum"] == 104


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
    assert values['prompt_tokens_by_source_total{source="local_compute"}'] == 300
    assert values['prompt_tokens_by_source_total{source="local_cache_hit"}'] == 64
    assert values["prompt_tokens_total"] == 364
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
    metrics.observe_ready(True)
    metrics.observe_engine(1.5, 2, INFO)
    metrics.observe_engine(0.5, 2, INFO)
    # A restart is known before there is another engine, which may have less memory.
    metrics.observe_engine(0.75, 3, INFO)
    again = msgspec.structs.replace(
        INFO, startup_seconds={"weights": 0.5}, kv_cache_bytes=800, local_pages_total=8
    )
    metrics.observe_engine(0.25, 3, again)
    metrics.observe_step(stats())
    values = samples(metrics)
    assert values["ready"] == 1
    assert values["engine_step_age_seconds"] == 0.25
    assert values["engine_restarts_total"] == 3
    assert values['startup_seconds{phase="weights"}'] == 0.5
    assert values['kv_pages_capacity{kind="local"}'] == 8
    assert values["kv_cache_usage_perc"] == 0.5
    (config,) = [name for name in values if name.startswith("cache_config_info")]
    assert 'num_local_pages="8"' in config


def test_processes(metrics: Metrics) -> None:
    def resident(name: str) -> list[float]:
        text = metrics.render()[0].decode()
        return [float(found) for found in re.findall(rf"^{name} (\S+)$", text, re.MULTILINE)]

    assert resident("process_resident_memory_bytes")[0] > 1e6
    assert resident("bezel_engine_process_resident_memory_bytes") == []
    # The parent of this one, for want of an engine.
    metrics.observe_engine(0, 1, msgspec.structs.replace(INFO, pid=os.getppid()))
    assert resident("bezel_engine_process_resident_memory_bytes")[0] > 1e5
    # It has ended, and the scrape goes on without it.
    metrics.observe_engine(0, 2, msgspec.structs.replace(INFO, pid=2**22 + 1))
    assert resident("bezel_engine_process_resident_memory_bytes") == []


def test_clock_of_a_sequence(metrics: Metrics) -> None:
    times = iter([10.0, 10.5, 10.75, 11.5])
    sequence = metrics.sequence(7, 20, clock=lambda: next(times))
    sequence.observe_start(0.125)
    sequence.observe_tokens(0)
    sequence.observe_tokens(1, num_cached_tokens=4)
    sequence.observe_tokens(2)
    sequence.observe_finished(FinishReason.LENGTH)
    values = samples(metrics)
    sums = {
        "time_to_first_token_seconds": 0.5,
        "inter_token_latency_seconds": 0.25,
        "e2e_request_latency_seconds": 1.5,
        "request_queue_time_seconds": 0.125,
        "request_prefill_time_seconds": 0.375,
        "request_decode_time_seconds": 0.25,
        "request_inference_time_seconds": 0.625,
        "request_time_per_output_token_seconds": 0.125,
        "request_prompt_tokens": 7,
        "request_prefill_kv_computed_tokens": 3,
        "request_generation_tokens": 3,
        "request_params_max_tokens": 20,
    }
    assert {name: values[f"{name}_sum"] for name in sums} == sums
    counts = {name: values[f"{name}_count"] for name in sums}
    assert counts == dict.fromkeys(sums, 1) | {"inter_token_latency_seconds": 2}
    assert values["generation_tokens_total"] == 3
    assert values['request_success_total{finished_reason="length"}'] == 1
    assert values['request_success_total{finished_reason="stop"}'] == 0
    assert sum(v for name, v in values.items() if name.startswith("request_aborts")) == 0


@pytest.mark.parametrize(
    ("phase", "num_tokens", "queue_seconds"),
    [("waiting", 0, None), ("prefill", 0, 0.5), ("decode", 2, 0.5)],
)
def test_aborts_by_reason_and_phase(
    metrics: Metrics, phase: str, num_tokens: int, queue_seconds: float | None
) -> None:
    sequence = metrics.sequence(7, 20)
    if queue_seconds is not None:
        sequence.observe_start(queue_seconds)
    sequence.observe_tokens(num_tokens)
    sequence.observe_finished(FinishReason.ABORT, AbortReason.DEADLINE)
    aborts = {k: v for k, v in samples(metrics).items() if k.startswith("request_aborts") and v}
    assert aborts == {f'request_aborts_total{{phase="{phase}",reason="deadline"}}': 1}


def test_a_queue_longer_than_the_way_to_the_first_token(metrics: Metrics) -> None:
    """The two clocks are read in two processes."""
    times = iter([10.0, 10.5, 11.0])
    sequence = metrics.sequence(7, 20, clock=lambda: next(times))
    sequence.observe_start(0.75)
    sequence.observe_tokens(1)
    sequence.observe_finished(FinishReason.STOP)
    values = samples(metrics)
    assert values["request_prefill_time_seconds_sum"] == 0
    assert values["request_inference_time_seconds_sum"] == 0
    assert values["request_time_per_output_token_seconds_count"] == 0


def test_requests_and_refusals(metrics: Metrics) -> None:
    metrics.observe_request(3, 40)
    metrics.observe_rejection(Rejection.MAX_NUM_QUEUED_TOKENS)
    metrics.observe_event_loop_lag(0.03)
    values = samples(metrics)
    assert values['request_params_n_bucket{le="2.0"}'] == 0
    assert values['request_params_n_bucket{le="5.0"}'] == 1
    assert values["request_max_num_generation_tokens_sum"] == 40
    assert values['admission_rejections_total{reason="max_num_queued_tokens"}'] == 1
    assert values['event_loop_lag_seconds_bucket{le="0.02"}'] == 0
    assert values['event_loop_lag_seconds_bucket{le="0.05"}'] == 1


def test_connections() -> None:
    metrics = Metrics()
    assert sum(n for name, n in samples(metrics).items() if name.startswith("connections")) == 0
    metrics.observe_connections(3)
    metrics.observe_connection_end(ConnectionEnd.SEND_TIMEOUT)
    metrics.observe_connection_end(ConnectionEnd.SEND_TIMEOUT)
    values = samples(metrics)
    assert values["connections_open"] == 3
    assert values['connections_closed_total{reason="send_timeout"}'] == 2
    assert values['connections_closed_total{reason="client"}'] == 0


def test_log_lines_that_were_lost() -> None:
    metrics = Metrics()
    for num_dropped in (3, 5, 2, 2):  # the third is of an engine started anew
        metrics.observe_step(stats(num_dropped_log_lines=num_dropped))
    metrics.observe_dropped_lines(Process.SERVER, 4)
    values = samples(metrics)
    assert values['log_lines_dropped_total{process="engine"}'] == 7
    assert values['log_lines_dropped_total{process="server"}'] == 4


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


@pytest.mark.parametrize("accept", ["", "text/plain;version=0.0.4", "*/*", OPENMETRICS])
@pytest.mark.parametrize("vllm_names", [False, True])
def test_a_scrape_is_valid_in_the_format_asked_for(accept: str, vllm_names: bool) -> None:
    metrics = Metrics(vllm_names)
    metrics.set_model('a "model"\\', INFO)
    metrics.observe_http("POST", "/v1/completions", 200, 0.25)
    metrics.observe_step(stats())
    text, content_type = metrics.render(accept)
    is_openmetrics = accept == OPENMETRICS
    assert content_type.startswith("application/openmetrics-text; version=1.0.0") == is_openmetrics
    assert content_type.startswith("text/plain; version=0.0.4") != is_openmetrics
    assert text.endswith(b"# EOF\n") == is_openmetrics
    parse = parse_openmetrics if is_openmetrics else parse_text
    families = {family.name: family for family in parse(text.decode())}
    for family in FAMILIES:
        parsed = families[f"bezel_{family.name}"]
        assert (parsed.type, parsed.documentation) == (family.kind, family.help)
        assert all(not sample.name.endswith("_created") for sample in parsed.samples)
    running = families["bezel_num_requests_running"].samples[0]
    assert running.labels == {"model_name": 'a "model"\\'}
    assert running.value == 3
    assert ("vllm:num_requests_running" in families) == vllm_names
    for name, family in families.items():
        assert all(sample.name.startswith(name) for sample in family.samples)
