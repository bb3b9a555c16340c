"""How long an answer may take, by the server's settings and by the request."""

import asyncio
from typing import Any

import pytest

from bezel.engine.messages import FinishReason
from bezel.server.app import create_app

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_takes_too_long_ends(
    make_state: Any, client_for: Any, engine: Any, chat: Any, events_of: Any, stream: bool
) -> None:
    engine.script = [[65], asyncio.Event()]
    app = create_app(make_state(request_timeout=3600))
    async with client_for(app) as client:
        body = chat(stream=stream, timeout=0.05)
        response = await client.post("/v1/chat/completions", json=body)
    if stream:
        error = events_of(response.text)[-1]["error"]
    else:
        assert response.status_code == 504
        assert response.headers["x-should-retry"] == "false"
        error = response.json()["error"]
    assert error["code"] == "deadline_exceeded"
    assert error["message"] == "The answer was not finished within 0.05 s."
    assert list(engine.ended.values()) == [FinishReason.ABORT]


async def test_a_request_cannot_ask_for_more_time_than_there_is(
    make_state: Any, client_for: Any, engine: Any, chat: Any
) -> None:
    engine.script = [asyncio.Event()]
    async with client_for(create_app(make_state(request_timeout=1))) as client:
        response = await client.post("/v1/chat/completions", json=chat(timeout=1000))
        assert response.json()["error"]["message"] == "The answer was not finished within 1 s."
        for timeout in (0, -1):
            response = await client.post("/v1/chat/completions", json=chat(timeout=timeout))
            assert response.json()["error"]["param"] == "timeout"


@pytest.mark.parametrize(
    ("server_s", "header", "body_s", "counts"),
    [(3600, "0.05", None, "0.05"), (3600, "0.05", 99, "0.05"), (3600, "99", 0.05, "0.05")],
)
async def test_the_shortest_time_counts(
    make_state: Any,
    client_for: Any,
    engine: Any,
    chat: Any,
    server_s: int,
    header: str,
    body_s: float | None,
    counts: str,
) -> None:
    engine.script = [asyncio.Event()]
    async with client_for(create_app(make_state(request_timeout=server_s))) as client:
        response = await client.post(
            CHAT, json=chat(timeout=body_s), headers={"X-Request-Timeout": header}
        )
    message = f"The answer was not finished within {counts} s."
    assert (response.status_code, response.json()["error"]["message"]) == (504, message)


async def test_a_header_cannot_ask_for_more_time_than_there_is(
    make_state: Any, client_for: Any, engine: Any, chat: Any
) -> None:
    engine.script = [asyncio.Event()]
    async with client_for(create_app(make_state(request_timeout=1))) as client:
        response = await client.post(CHAT, json=chat(), headers={"X-Request-Timeout": "9"})
    assert response.json()["error"]["message"] == "The answer was not finished within 1 s."


@pytest.mark.parametrize("header", ["0", "-1", "nan", "inf", "30s", ""])
async def test_a_header_that_is_no_time(
    client: Any, engine: Any, say: Any, chat: Any, header: str
) -> None:
    response = await client.post(CHAT, json=chat(), headers={"X-Request-Timeout": header})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-request-timeout"
    say("x")
    assert (await client.post(CHAT, json=chat())).status_code == 200, "it is forgotten"
