"""`--metrics-compat vllm`: the names, labels and buckets that dashboards for vLLM know.

They are those of vLLM 0.32 (vllm/v1/metrics/loggers.py), and of the dashboard in its examples
(examples/online_serving/prometheus_grafana/grafana.json), which has older names for two of them.
"""

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from scrape import full_metrics, observe_sequence, step

PLAIN = {"model_name", "engine"}
LABELS = {
    "vllm:num_requests_running": PLAIN,
    "vllm:num_requests_waiting": PLAIN,
    "vllm:kv_cache_usage_perc": PLAIN,
    "vllm:gpu_cache_usage_perc": PLAIN,
    "vllm:prefix_cache_queries": PLAIN,
    "vllm:prefix_cache_hits": PLAIN,
    "vllm:num_preemptions": PLAIN,
    "vllm:prompt_tokens": PLAIN,
    "vllm:prompt_tokens_cached": PLAIN,
    "vllm:prompt_tokens_by_source": {*PLAIN, "source"},
    "vllm:generation_tokens": PLAIN,
    "vllm:request_success": {*PLAIN, "finished_reason"},
    "vllm:admission_rejections": {*PLAIN, "reason"},
    "vllm:request_prompt_tokens": PLAIN,
    "vllm:request_generation_tokens": PLAIN,
    "vllm:request_max_num_generation_tokens": PLAIN,
    "vllm:request_params_max_tokens": PLAIN,
    "vllm:request_params_n": PLAIN,
    "vllm:request_prefill_kv_computed_tokens": PLAIN,
    "vllm:iteration_tokens_total": PLAIN,
    "vllm:time_to_first_token_seconds": PLAIN,
    "vllm:inter_token_latency_seconds": PLAIN,
    "vllm:time_per_output_token_seconds": PLAIN,
    "vllm:request_time_per_output_token_seconds": PLAIN,
    "vllm:e2e_request_latency_seconds": PLAIN,
    "vllm:request_queue_time_seconds": PLAIN,
    "vllm:request_inference_time_seconds": PLAIN,
    "vllm:request_prefill_time_seconds": PLAIN,
    "vllm:request_decode_time_seconds": PLAIN,
}
TOKENS = [digit * 10**power for power in range(5) for digit in (1, 2, 5)]
REQUEST = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920]
REQUEST += [7680]
ITL = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40]
ITL += [80]
TTFT = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20]
TTFT += [40, 80, 160, 640, 2560]
BUCKETS = {
    "time_to_first_token_seconds": TTFT,
    "inter_token_latency_seconds": ITL,
    "request_time_per_output_token_seconds": ITL,
    "e2e_request_latency_seconds": REQUEST,
    "request_queue_time_seconds": REQUEST,
    "request_inference_time_seconds": REQUEST,
    "request_prefill_time_seconds": REQUEST,
    "request_decode_time_seconds": REQUEST,
    "request_prompt_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "request_params_max_tokens": TOKENS,
    "request_params_n": [1, 2, 5, 10, 20],
    "iteration_tokens_total": [2**power for power in range(15)],
}


@pytest.fixture(scope="module")
def families() -> dict[str, Metric]:
    metrics = full_metrics(vllm_names=True)
    metrics.observe_step(step(num_running=3, num_prefill_tokens=50))
    observe_sequence(metrics)
    found = text_string_to_metric_families(metrics.render()[0].decode())
    return {family.name: family for family in found}


def test_names_and_labels(families: dict[str, Metric]) -> None:
    found = {
        name: set().union(*(sample.labels for sample in family.samples)) - {"le"}
        for name, family in families.items()
        if name.startswith("vllm:")
    }
    cache = found.pop("vllm:cache_config_info")
    assert {"engine", "block_size", "num_gpu_blocks", "enable_prefix_caching"} <= cache
    assert found == LABELS


def test_values_are_those_of_our_own_names(families: dict[str, Metric]) -> None:
    num_compared = 0
    for name in LABELS:
        ours = families.get(name.replace("vllm:", "bezel_"))
        if ours is not None:
            theirs = families[name]
            assert theirs.type == ours.type
            for one, other in zip(theirs.samples, ours.samples, strict=True):
                assert one.name.removeprefix("vllm:") == other.name.removeprefix("bezel_")
                assert one.labels == {**other.labels, "engine": "0"}
                assert one.value == other.value
                num_compared += 1
    assert num_compared > 300
    assert families["vllm:num_requests_running"].samples[0].value == 3
    for old, new in (
        ("vllm:gpu_cache_usage_perc", "vllm:kv_cache_usage_perc"),
        ("vllm:time_per_output_token_seconds", "vllm:inter_token_latency_seconds"),
    ):
        values = [[s.value for s in families[name].samples] for name in (old, new)]
        assert values[0] == values[1] and any(values[0])


@pytest.mark.parametrize("stem", BUCKETS)
def test_buckets_are_a_superset(families: dict[str, Metric], stem: str) -> None:
    ours = {
        float(sample.labels["le"])
        for sample in families[f"vllm:{stem}"].samples
        if sample.name.endswith("_bucket")
    }
    assert set(map(float, BUCKETS[stem])) <= ours


def test_without_the_flag_there_are_none() -> None:
    assert b"vllm" not in full_metrics().render()[0]
