"""Body limit, request ids and HTTP metrics, on every path."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from bezel.server.app import create_app
from bezel.server.state import ServerState

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


@pytest.fixture
def make_app(make_state: Callable[..., ServerState]) -> Callable[..., FastAPI]:
    return lambda **settings: create_app(make_state(**settings))


async def test_declared_body_over_the_limit(
    make_app: Any, client_for: Any, chat: Any, engine: Any
) -> None:
    engine.say("x")
    async with client_for(make_app(max_body_bytes=200)) as client:
        assert (await client.post(CHAT, json=chat())).status_code == 200
        response = await client.post(CHAT, json=chat(user="x" * 200))
    assert response.status_code == 413
    assert response.json()["error"] == {
        "message": "The body is larger than 200 bytes.",
        "type": "invalid_request_error",
        "param": None,
        "code": "request_too_large",
    }


@pytest.mark.parametrize("headers", [{}, {"content-length": "10"}], ids=["none", "a lie"])
async def test_undeclared_body_over_the_limit(
    make_app: Any, connect: Any, headers: dict[str, str]
) -> None:
    app = make_app(max_body_bytes=200)
    connection = connect(CHAT, app=app, body_parts=[b"x" * 150] * 2, headers=headers)
    status, body = await connection.response()
    assert status == 413
    assert body["error"]["code"] == "request_too_large"


async def test_body_of_exactly_the_limit(make_app: Any, connect: Any) -> None:
    connection = connect(CHAT, app=make_app(max_body_bytes=200), body_parts=[b"x" * 100] * 2)
    status, body = await connection.response()
    assert status == 400
    assert "not valid JSON" in body["error"]["message"]


async def test_request_id_comes_back(client: httpx.AsyncClient) -> None:
    response = await client.get("/nowhere", headers={"x-request-id": "abc-1"})
    assert response.headers["x-request-id"] == "abc-1"


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "\x7f"])
async def test_request_ids_are_made_where_none_is_usable(
    client: httpx.AsyncClient, given: str
) -> None:
    ids = set()
    for _ in range(2):
        response = await client.get("/health", headers={"x-request-id": given})
        ids.add(response.headers["x-request-id"])
    assert len(ids) == 2
    assert given not in ids


async def test_http_metrics_have_templates_not_paths(
    client: httpx.AsyncClient, state: ServerState
) -> None:
    await client.get("/v1/models/tiny")
    await client.get("/v1/models/other")
    await client.get("/some/secret")
    await client.request("BREW", "/v1/models")
    text = state.metrics.render()[0].decode()
    counted = [line for line in text.splitlines() if "bezel_http_requests_total{" in line]
    route = 'route="/v1/models/{model_id:path}"'
    assert sorted(counted) == [
        f'bezel_http_requests_total{{method="GET",{route},status="200"}} 1.0',
        f'bezel_http_requests_total{{method="GET",{route},status="404"}} 1.0',
        'bezel_http_requests_total{method="GET",route="unmatched",status="404"} 1.0',
        'bezel_http_requests_total{method="other",route="/v1/models",status="405"} 1.0',
    ]
    assert f'bezel_http_request_duration_seconds_count{{method="GET",{route}}} 2.0' in text
