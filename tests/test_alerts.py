"""The alert rules ask for series that exist, and go off when they should: promtool says so."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scrape
import yaml
from scrape import DOCKER, program

from bezel.engine.messages import FinishReason
from bezel.engine.metrics import Metrics

MINUTES = 31
ROUTE = "/v1/completions"


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Series → labels, with the one series that is Prometheus' own."""
    exported = scrape.exported_by(scrape.full_metrics().render()[0].decode())
    return scrape.series_of(exported) | {"up": scrape.TARGET_LABELS}


def test_rules_ask_for_what_exists(known: dict[str, set[str]]) -> None:
    for rule in scrape.alert_rules():
        if rule["alert"] != "BezelDown":
            scrape.check_query(rule["expr"], known)
        template = " ".join(rule["annotations"].values())
        grouped = re.findall(r"by \(([^)]*)\)", rule["expr"])
        kept = set(re.findall(r"\w+", grouped[0])) if grouped else {"instance", "job", "model_name"}
        assert set(re.findall(r"\$labels\.(\w+)", template)) <= kept, rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_every_rule_is_tested_with_series_that_exist(known: dict[str, set[str]]) -> None:
    text = (DOCKER / "alerts_test.yml").read_text(encoding="utf-8")
    for test in yaml.safe_load(text)["tests"]:
        for series in test["input_series"]:
            name, _, labels = series["series"].rstrip("}").partition("{")
            assert set(re.findall(r'(\w+)="', labels)) <= known[name], series
    fired = set(re.findall(r'alertname="(\w+)"', text)) | set(re.findall(r"alertname: (\w+)", text))
    assert fired == {rule["alert"] for rule in scrape.alert_rules()}


def test_rules_pass_their_own_tests() -> None:
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(
            [program("promtool"), *command], cwd=DOCKER, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr


def minute(
    metrics: Metrics,
    *,
    num_served: int = 20,
    num_aborted: int = 0,
    num_refused: int = 0,
    num_failed: int = 0,
    first_token_s: float = 0.2,
    lag_s: float = 0.001,
    step_age_s: float = 0.0,
    num_restarts: int = 0,
    is_ready: bool = True,
    **state: int,
) -> None:
    """What a server sees in one, as its metrics."""
    for _ in range(num_served):
        scrape.observe_sequence(metrics, FinishReason.STOP, first_token_s)
        metrics.observe_http("POST", ROUTE, 200, 1.0)
    for _ in range(num_aborted):
        scrape.observe_sequence(metrics, FinishReason.ABORT, first_token_s)
    for _ in range(num_refused):
        metrics.observe_http("POST", ROUTE, 429, 0.01)
    for _ in range(num_failed):
        metrics.observe_http("POST", ROUTE, 500, 0.01)
    for _ in range(20):
        metrics.observe_event_loop_lag(lag_s)
    metrics.observe_step(scrape.step(**state))
    metrics.observe_engine(step_age_s, num_restarts, scrape.info())
    metrics.observe_ready(is_ready)


def as_series(scrapes: list[str]) -> list[dict[str, str]]:
    """Scrapes, a minute apart, as promtool takes them."""
    values: dict[str, dict[int, str]] = {}
    for at, text in enumerate(scrapes):
        for sample, value in re.findall(r"^([^#\s]\S*?(?:\{.*\})?) (\S+)$", text, re.MULTILINE):
            name, _, labels = sample.partition("{")
            target = 'job="bezel",instance="a"' + ("," if labels else "}")
            values.setdefault(f"{name}{{{target}{labels}", {})[at] = value
    return [
        {"series": series, "values": " ".join(known.get(at, "_") for at in range(len(scrapes)))}
        for series, known in values.items()
    ]


def alerts_in(scrapes: list[str], folder: Path) -> set[str]:
    """Those that fire at the end of recorded scrapes: promtool is asked by a wrong expectation."""
    at_end = f"{len(scrapes) - 1}m"
    query = {"expr": 'count by (alertname) (ALERTS{alertstate="firing"})', "eval_time": at_end}
    nothing = {"labels": '{alertname="none"}', "value": 0}
    document = {
        "rule_files": [str(DOCKER / "alerts.yml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": as_series(scrapes),
                "promql_expr_test": [query | {"exp_samples": [nothing]}],
            }
        ],
    }
    path = folder / "recorded.yml"
    path.write_text(json.dumps(document), encoding="utf-8")  # which is YAML, and faster
    command = [program("promtool"), "test", "rules", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    got = re.search(r"^\s*got: ?(.*)$", done.stderr, re.MULTILINE)
    assert got is not None, done.stdout + done.stderr
    return set(re.findall(r'alertname="(\w+)"', got[1]))


def record(happens: Callable[[int], dict[str, Any]]) -> list[str]:
    """Half an hour of scrapes of one server."""
    metrics = scrape.full_metrics()
    scrapes = []
    for at in range(MINUTES):
        minute(metrics, **happens(at))
        scrapes.append(metrics.render()[0].decode())
    return scrapes


TROUBLES: dict[str, tuple[Callable[[int], dict[str, Any]], set[str]]] = {
    "none": (lambda at: {}, set()),
    "a busy server": (
        lambda at: {"num_waiting": at % 5 * 20, "local_pages_used": 8, "num_aborted": 1},
        set(),
    ),
    "too much is asked of it": (
        lambda at: {"num_waiting": 200, "num_refused": 20, "first_token_s": 30.0},
        {"BezelQueueLong", "BezelRejecting", "BezelFirstTokenSlow"},
    ),
    "no room for pages": (
        lambda at: {"local_pages_used": 9, "num_preemptions": 20},
        {"BezelKVCacheFull", "BezelPreempting"},
    ),
    "an engine that hangs": (
        lambda at: {"num_served": 0 if at > 20 else 20, "step_age_s": max(0, 60 * (at - 20))},
        {"BezelEngineHung"},
    ),
    "an engine that dies": (
        lambda at: {"num_restarts": at // 25, "num_failed": at // 15 * 5, "num_aborted": 10},
        {"BezelEngineRestarted", "BezelServerErrors", "BezelLowGoodput"},
    ),
    "an API process with too much to do": (
        lambda at: {"lag_s": 0.7, "is_ready": at < 15},
        {"BezelEventLoopSlow", "BezelNotReady"},
    ),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_alerts_in_recorded_scrapes(trouble: str, tmp_path: Path) -> None:
    happens, alerts = TROUBLES[trouble]
    assert alerts_in(record(happens), tmp_path) == alerts
