"""Dashboard and metrics page name exactly the series that the server exports."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bezel.engine.messages import EngineInfo
from bezel.engine.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    path = ROOT / "docker" / "grafana" / "dashboards" / "bezel.json"
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


@pytest.fixture(scope="module")
def exported() -> dict[str, tuple[str, set[str]]]:
    """Name of each metric → its type and its labels, from a scrape with a sample of each."""
    info = EngineInfo(
        max_model_len=8192,
        vocab_size=262144,
        dtype="float32",
        device="cpu",
        num_parameters=1,
        eos_token_ids=[1],
        kv_cache_bytes=1000,
        local_pages_total=10,
        global_pages_total=10,
        local_page_bytes=100,
        global_page_bytes=100,
    )
    metrics = Metrics()
    metrics.set_model("gemma", info)
    metrics.observe_http("GET", "/health", 200, 0.1)
    text = metrics.render()[0].decode()
    types = re.findall(r"^# TYPE (bezel_\w+) (\w+)$", text, re.MULTILINE)
    samples = re.findall(r"^(bezel_\w+)\{(.*)\} ", text, re.MULTILINE)
    labels = {name: set(re.findall(r'(\w+)="', body)) for name, body in samples}
    return {
        name: (kind, labels[name + SUFFIXES[kind][-1]] - {"le"})
        for name, kind in types
        if not name.endswith("_created")
    }


def series(exported: dict[str, tuple[str, set[str]]]) -> dict[str, set[str]]:
    """What PromQL can name → the labels it has."""
    return {
        name + suffix: labels | ({"le"} if suffix == "_bucket" else set())
        for name, (kind, labels) in exported.items()
        for suffix in SUFFIXES[kind]
    }


def queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_dashboard_queries_only_series_and_labels_that_exist(
    dashboard: dict[str, Any], exported: dict[str, tuple[str, set[str]]]
) -> None:
    known = series(exported)
    for query in queries(dashboard):
        names = re.findall(r"bezel_\w+", query)
        assert names and set(names) <= set(known), query
        grouped = ", ".join(re.findall(r"by \(([^)]*)\)", query))
        selected = re.findall(r"(\w+)=~?\"", query)
        for name in names:
            assert {*filter(None, grouped.split(", ")), *selected} <= known[name], query


def test_dashboard_shows_every_metric(
    dashboard: dict[str, Any], exported: dict[str, tuple[str, set[str]]]
) -> None:
    shown = set(re.findall(r"bezel_\w+", " ".join(queries(dashboard))))
    for name, (kind, _) in exported.items():
        assert any(name + suffix in shown for suffix in SUFFIXES[kind]), name


def test_dashboard_takes_quantiles_of_rates_of_buckets_by_le(dashboard: dict[str, Any]) -> None:
    quantiles = [query for query in queries(dashboard) if "histogram_quantile" in query]
    form = (
        r"histogram_quantile\(0\.\d+, sum by \(le(, \w+)?\) \(rate\(\w+_bucket(\{.*\})?\[.*\]\)\)\)"
    )
    assert quantiles and all(re.fullmatch(form, query) for query in quantiles)


def test_dashboard_never_sums_a_counter_without_a_rate(
    dashboard: dict[str, Any], exported: dict[str, tuple[str, set[str]]]
) -> None:
    counters = [name for name, (kind, _) in exported.items() if kind == "counter"]
    for query in queries(dashboard):
        for name in counters:
            assert query.count(name) == query.count(f"rate({name}"), query


def test_metrics_page_has_exactly_what_is_exported(
    exported: dict[str, tuple[str, set[str]]],
) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(bezel_\w+)` \| (\w+) \| (.*?) \|", page, re.MULTILINE)
    listed = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert len(listed) == len(rows)
    assert listed == {
        name: (kind, labels - {"model_name"}) for name, (kind, labels) in exported.items()
    }
    without_model = {name for name, (_, labels) in exported.items() if "model_name" not in labels}
    assert all(name.startswith("bezel_http_") for name in without_model)
