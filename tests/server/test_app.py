"""Routes that don't generate: health, readiness, models, version, metrics, error objects."""

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from bezel.engine.metrics import Metrics
from bezel.server.app import create_app
from bezel.server.config import ServerConfig
from bezel.server.state import ServerState
from bezel.server.version import VERSION

pytestmark = pytest.mark.anyio


@pytest.fixture
def loading_app() -> FastAPI:
    return create_app(ServerState(ServerConfig(), Metrics()))


async def test_loading_server_is_healthy_but_not_ready(
    loading_app: FastAPI, client_for: Any
) -> None:
    async with client_for(loading_app) as client:
        assert (await client.get("/health")).status_code == 200
        response = await client.get("/ready")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "5"
        assert response.json()["error"]["message"] == "The model is still loading."
        assert (await client.get("/v1/models")).status_code == 503
        assert (await client.get("/v1/models/tiny")).status_code == 503
        assert (await client.get("/metrics")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_loading_server_refuses_to_generate(
    loading_app: FastAPI, client_for: Any, chat: Any, completion: Any, stream: bool
) -> None:
    async with client_for(loading_app) as client:
        for path, body in (("chat/completions", chat()), ("completions", completion())):
            response = await client.post(f"/v1/{path}", json=body | {"stream": stream})
            assert response.status_code == 503
            assert response.headers["retry-after"] == "5"
            assert response.json()["error"] == {
                "message": "The model is still loading.",
                "type": "server_error",
                "param": None,
                "code": "server_is_overloaded",
            }


async def test_ready(client: httpx.AsyncClient) -> None:
    response = await client.get("/ready")
    assert (response.status_code, response.json()) == (200, {"status": "ready"})


async def test_not_ready_while_engine_restarts(client: httpx.AsyncClient, engine: Any) -> None:
    engine.is_ready = False
    response = await client.get("/ready")
    assert response.status_code == 503
    assert "restarted" in response.json()["error"]["message"]
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/v1/models")).status_code == 200


async def test_not_ready_while_draining(
    client: httpx.AsyncClient, state: ServerState, chat: Any
) -> None:
    state.is_draining = True
    for response in (
        await client.get("/ready"),
        await client.post("/v1/chat/completions", json=chat()),
    ):
        assert response.status_code == 503
        assert response.json()["error"]["message"] == "The server is shutting down."


async def test_unhealthy_when_engine_hangs(client: httpx.AsyncClient, engine: Any) -> None:
    engine.step_age_s = 600.0
    assert (await client.get("/health")).status_code == 200
    engine.step_age_s = 601.0
    response = await client.get("/health")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "The engine has done nothing for 601 s."


async def test_models(client_for: Any, make_state: Any) -> None:
    state = make_state(served_model_name=("org/a", "b"))
    async with client_for(create_app(state)) as client:
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert [card["id"] for card in listed["data"]] == ["org/a", "b"]
        card = (await client.get("/v1/models/org/a")).json()
        assert card == listed["data"][0]
        assert card == {
            "id": "org/a",
            "object": "model",
            "created": state.model.created,
            "owned_by": "bezel",
            "root": "tiny",
            "max_model_len": 100,
        }


async def test_unknown_model_card(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/models/other")
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": "The model 'other' is not served here.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


async def test_version(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": VERSION}


async def test_metrics(client: httpx.AsyncClient, engine: Any, chat: Any) -> None:
    engine.say("Hello")
    engine.step_age_s = 1.5
    engine.num_restarts = 2
    await client.post("/v1/chat/completions", json=chat())
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = response.text.splitlines()
    for line in (
        'bezel_engine_step_age_seconds{model_name="tiny"} 1.5',
        'bezel_engine_restarts_total{model_name="tiny"} 2.0',
        'bezel_request_success_total{finished_reason="stop",model_name="tiny"} 1.0',
        'bezel_request_generation_tokens_sum{model_name="tiny"} 6.0',
        'bezel_http_requests_total{method="POST",route="/v1/chat/completions",status="200"} 1.0',
    ):
        assert line in lines


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
    ],
)
async def test_errors_of_routing_are_error_objects(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.json()["error"]["code"] == code
    if status == 405:
        assert response.headers["allow"] == "POST"


async def test_our_own_mistakes_are_error_objects(
    client: httpx.AsyncClient, engine: Any, chat: Any, caplog: Any
) -> None:
    engine.script = [ZeroDivisionError("secret")]
    headers = {"x-request-id": "of-mine"}
    response = await client.post("/v1/chat/completions", json=chat(), headers=headers)
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "The server made a mistake; its log has more on request of-mine.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert response.headers["x-request-id"]
    assert "ZeroDivisionError: secret" in caplog.text
