"""Scrapes, and what asks for them: the dashboard's queries and the alert rules."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bezel.engine.messages import EngineInfo, FinishReason, PrefixStats, StepStats
from bezel.engine.metrics import Metrics

DOCKER = Path(__file__).resolve().parent.parent / "docker"
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
# What Prometheus itself adds to every series.
TARGET_LABELS = {"job", "instance"}

Exported = dict[str, tuple[str, set[str]]]


def info(**changes: Any) -> EngineInfo:
    """Of an engine with 1,000 bytes of KV memory, in pages of 100."""
    values: dict[str, Any] = dict(
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
    return EngineInfo(**(values | changes))


def step(**changes: Any) -> StepStats:
    """Of a step with one sequence that decodes."""
    values: dict[str, Any] = dict(
        num_running=1,
        num_waiting=0,
        local_pages_used=1,
        global_pages_used=1,
        num_prefill_tokens=0,
        num_decode_tokens=1,
        num_preemptions=0,
        prefix=PrefixStats(),
        step_seconds=0.01,
    )
    return StepStats(**(values | changes))


def observe_sequence(
    metrics: Metrics, reason: FinishReason = FinishReason.STOP, first_token_s: float = 0.2
) -> None:
    """One of four tokens, 10 ms apart."""
    times = iter([0.0, first_token_s, *(first_token_s + 0.01 * i for i in range(1, 5))])
    sequence = metrics.sequence(100, 16, clock=lambda: next(times))
    sequence.observe_start(first_token_s / 2)
    for _ in range(4):
        sequence.observe_tokens(1)
    sequence.observe_finished(reason)


def full_metrics(vllm_names: bool = False) -> Metrics:
    """With a sample of every series there can be; the engine is this process itself."""
    metrics = Metrics(vllm_names)
    metrics.set_model("gemma", info(pid=os.getpid()))
    metrics.observe_http("GET", "/health", 200, 0.1)
    return metrics


def exported_by(text: str) -> Exported:
    """Name of each metric in a scrape → its type and its labels."""
    types = re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE)
    labels: dict[str, set[str]] = {}
    for name, body in re.findall(r"^([\w:]+)(?:\{(.*)\})? \S+$", text, re.MULTILINE):
        labels.setdefault(name, set()).update(re.findall(r'(\w+)="', body))
    return {name: (kind, labels[name + SUFFIXES[kind][-1]] - {"le"}) for name, kind in types}


def series_of(exported: Exported) -> dict[str, set[str]]:
    """What PromQL can name → the labels it has, once Prometheus has scraped it."""
    return {
        name + suffix: labels | TARGET_LABELS | ({"le"} if suffix == "_bucket" else set())
        for name, (kind, labels) in exported.items()
        for suffix in SUFFIXES[kind]
    }


def check_query(query: str, known: dict[str, set[str]]) -> None:
    """Assert that series and labels of a query exist."""
    names = re.findall(r"\b(?:bezel|process|vllm)[:_]\w+", query)
    assert names and set(names) <= set(known), query
    grouped = re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", query)))
    assert all(set(grouped) <= known[name] for name in names), query
    for name, selector in re.findall(r"((?:bezel|process|vllm)[:_]\w+)\{([^}]*)\}", query):
        assert set(re.findall(r"(\w+)=~?\"", selector)) <= known[name], query


def dashboard() -> dict[str, Any]:
    """The Grafana dashboard."""
    text = (DOCKER / "grafana" / "dashboards" / "bezel.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document


def dashboard_queries() -> list[str]:
    """Those of all panels, in order."""
    panels = dashboard()["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def alert_rules() -> Iterator[dict[str, Any]]:
    """Those of all groups, in order."""
    document = yaml.safe_load((DOCKER / "alerts.yml").read_text(encoding="utf-8"))
    for group in document["groups"]:
        yield from group["rules"]


def program(name: str) -> str:
    """The path of one of Prometheus' programs; without it the test is skipped."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} isn't installed; Debian's package `prometheus` has it")
    return path
