"""A real Prometheus scrapes a real server, and answers what dashboard and alerts ask."""

import math
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import scrape
import yaml
from gemma4_checkpoint import write_gemma4_checkpoint
from server_process import Server, running

MODEL = "tiny-gemma-4"
TIMEOUT_S = 60


class Prometheus:
    """A running one, and its HTTP API."""

    def __init__(self, port: int) -> None:
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10)

    def get(self, path: str, **params: str) -> Any:
        """What the API answers; None while it doesn't."""
        try:
            response = self._client.get(path, params=params)
        except httpx.TransportError:
            return None
        if response.status_code == 503:
            return None  # it is still starting
        body = response.json()
        assert body["status"] == "success", f"{params}: {body}"
        return body["data"]

    def query(self, query: str) -> list[dict[str, Any]]:
        """The samples that a query finds now."""
        data = self.get("/api/v1/query", query=query)
        return [] if data is None else data["result"]

    def wait_for(self, query: str) -> None:
        """Until a query finds something."""
        wait_until(lambda: bool(self.query(query)), query)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {TIMEOUT_S} s: {what}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One with vLLM's names as well, and places for two sequences."""
    scrape.program("prometheus")
    folder = tmp_path_factory.mktemp("server")
    write_gemma4_checkpoint(folder / MODEL)
    flags = ["--metrics-compat", "vllm", "--max-num-seqs", "2", "--max-num-queued-reqs", "0"]
    with running(folder, str(folder / MODEL), *flags) as server:
        yield server


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """With docker/'s configuration and alerts, but another address and a shorter interval."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((scrape.DOCKER / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(scrape.DOCKER / name) for name in config["rule_files"]]
    targets = [f"127.0.0.1:{server.port}"]
    config["scrape_configs"][0]["static_configs"] = [{"targets": targets}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(scrape.program("prometheus"), f"--config.file={folder / 'prometheus.yml'}"),
        *(f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"),
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        found = Prometheus(port)
        found.wait_for('up{job="bezel"} == 1')
        yield found
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def traffic(server: Server, prometheus: Prometheus) -> None:
    """Answers, refusals and somebody who leaves, with scrapes before and after."""
    prometheus.wait_for("bezel_http_requests_total")
    url, prompt = f"{server.url}/v1/completions", "Once upon a time, in a land of numbers, " * 6
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "ignore_eos": True}
    for _ in range(3):
        assert httpx.post(url, json=body | {"n": 2}, timeout=60).status_code == 200
    assert httpx.post(url, json=body | {"temperature": -1}, timeout=60).status_code == 400
    endless = body | {"max_tokens": 8000, "stream": True}
    with httpx.stream("POST", url, json=endless, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        assert httpx.post(url, json=body | {"n": 2}, timeout=60).status_code == 429
    server.wait_idle()
    # A rate takes two scrapes that know of it.
    for _ in range(2):
        seen = prometheus.query("max(timestamp(bezel_ready))")[0]["value"][1]
        prometheus.wait_for(f"max(timestamp(bezel_ready)) > {seen}")


def test_every_series_is_scraped(server: Server, prometheus: Prometheus, traffic: None) -> None:
    text = httpx.get(f"{server.url}/metrics", timeout=10).text
    known = set(prometheus.get("/api/v1/label/__name__/values"))
    exported = scrape.exported_by(text)
    assert len(exported) > 80
    assert set(scrape.series_of(exported)) <= known
    assert not {name for name in known if name.endswith("_created")}
    (target,) = prometheus.get("/api/v1/targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")


def test_every_query_of_the_dashboard_finds_something(
    prometheus: Prometheus, traffic: None
) -> None:
    variables = {"$__rate_interval": "1m", "$model": MODEL, "$instance": ".*"}
    nothing = []
    for query in scrape.dashboard_queries():
        filled = query
        for name, value in variables.items():
            filled = filled.replace(name, value)
        values = [float(sample["value"][1]) for sample in prometheus.query(filled)]
        if all(math.isnan(value) for value in values):
            nothing.append(filled)
    assert nothing == []


def test_values_are_those_of_the_traffic(prometheus: Prometheus, traffic: None) -> None:
    def value(query: str) -> float:
        (sample,) = prometheus.query(query)
        return float(sample["value"][1])

    assert value('bezel_request_success_total{finished_reason="length"}') == 6
    assert value('bezel_request_aborts_total{reason="client",phase="decode"}') == 1
    assert value("bezel_request_params_n_sum") == 7
    assert value("bezel_request_queue_time_seconds_count") == 7
    assert value('bezel_http_requests_total{route="/v1/completions",status="400"}') == 1
    assert value('bezel_admission_rejections_total{reason="max_num_queued_reqs"}') == 1
    prompts = value("bezel_request_prompt_tokens_sum")
    assert value("bezel_prompt_tokens_total") == prompts
    assert value('bezel_prompt_tokens_by_source_total{source="local_cache_hit"}') > 0
    steps = value("bezel_step_duration_seconds_sum")
    parts = value("bezel_step_model_seconds_sum + bezel_step_schedule_seconds_sum")
    assert 0 < parts <= steps
    assert value("bezel_iteration_tokens_total_sum") > 48
    assert value('bezel_startup_seconds{phase="ready"}') > value(
        'bezel_startup_seconds{phase="weights"}'
    )
    assert (
        value("bezel_engine_process_resident_memory_bytes")
        > value("process_resident_memory_bytes")
        > 2**25
    )
    assert value("bezel_event_loop_lag_seconds_count") > 0
    assert value("bezel_ready") == 1


def test_dashboards_for_vllm_find_their_series(prometheus: Prometheus, traffic: None) -> None:
    for query in (
        'rate(vllm:generation_tokens_total{model_name="tiny-gemma-4"}[1m]) > 0',
        'vllm:kv_cache_usage_perc{model_name="tiny-gemma-4", engine="0"}',
        "histogram_quantile(0.99, sum by (le) (rate(vllm:e2e_request_latency_seconds_bucket[1m])))",
    ):
        assert len(prometheus.query(query)) == 1, query


def test_alerts_are_evaluated_and_quiet(prometheus: Prometheus, traffic: None) -> None:
    def rules() -> list[dict[str, Any]]:
        return [
            rule for group in prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]
        ]

    wait_until(lambda: all(rule["health"] != "unknown" for rule in rules()), "rules evaluated")
    assert {rule["name"] for rule in rules()} == {rule["alert"] for rule in scrape.alert_rules()}
    for rule in rules():
        assert (rule["health"], rule.get("lastError")) == ("ok", None)
        assert rule["state"] != "firing", rule["name"]
