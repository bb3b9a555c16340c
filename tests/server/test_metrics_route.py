"""/metrics over HTTP: the format asked for, and what is known only at a scrape."""

import os
import re
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from bezel.engine.metrics import Metrics
from bezel.server.app import create_app
from bezel.server.config import ServerConfig
from bezel.server.state import ServerState

pytestmark = pytest.mark.anyio

# What Prometheus 2.42 sends.
PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)


@pytest.mark.parametrize(
    ("accept", "content_type", "parse"),
    [
        (
            PROMETHEUS,
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            parse_openmetrics,
        ),
        ("*/*", "text/plain; version=0.0.4; charset=utf-8", parse_text),
    ],
)
async def test_a_scrape_comes_in_the_format_asked_for(
    client: httpx.AsyncClient, accept: str, content_type: str, parse: Any
) -> None:
    response = await client.get("/metrics", headers={"accept": accept})
    assert response.headers["content-type"].startswith(content_type)
    families = {family.name: family for family in parse(response.text)}
    assert families["bezel_ready"].samples[0].value == 1
    assert families["bezel_request_success"].type == "counter"


async def test_the_engines_process_is_told_of(client: httpx.AsyncClient, engine: Any) -> None:
    name = "bezel_engine_process_resident_memory_bytes"
    assert name not in (await client.get("/metrics")).text
    engine.info = msgspec.structs.replace(engine.info, pid=os.getpid())
    engine.num_restarts = 1
    found = re.search(rf"^{name} (\S+)$", (await client.get("/metrics")).text, re.MULTILINE)
    assert found is not None and float(found[1]) > 1e6


async def ready_gauge(app: FastAPI, client_for: Any) -> float:
    async with client_for(app) as client:
        probe, scrape = [await client.get(path) for path in ("/ready", "/metrics")]
    found = re.search(r"^bezel_ready (\S+)$", scrape.text, re.MULTILINE)
    assert found is not None and (probe.status_code == 200) == (float(found[1]) == 1)
    return float(found[1])


async def test_log_lines_that_were_lost_are_told_of(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bezel.server.app.num_dropped_lines", lambda: 7)
    for _ in range(2):
        text = (await client.get("/metrics")).text
        assert '\nbezel_log_lines_dropped_total{process="server"} 7.0\n' in text


async def test_ready_is_what_the_probe_says(
    app: FastAPI, state: ServerState, engine: Any, client_for: Any
) -> None:
    loading = create_app(ServerState(ServerConfig(), Metrics()))
    assert await ready_gauge(loading, client_for) == 0
    assert await ready_gauge(app, client_for) == 1
    engine.is_ready = False
    assert await ready_gauge(app, client_for) == 0
    engine.is_ready = True
    state.is_leaving = True
    assert await ready_gauge(app, client_for) == 0
