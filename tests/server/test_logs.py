"""One line in the log for each request, whatever became of it, and nobody's texts in any."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from bezel.engine.messages import FinishReason
from bezel.server.app import create_app
from bezel.server.request_summary import RequestSummary

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[dict[str, Any]]]:
    """The fields of the lines on requests so far, without times."""
    caplog.set_level(logging.INFO, "bezel")

    def read() -> list[dict[str, Any]]:
        records = [r for r in caplog.records if r.getMessage() == "request"]
        assert all(r.levelno == logging.INFO for r in records)
        return [{n: v for n, v in r.__dict__["fields"].items() if "_s" not in n} for r in records]

    return read


def times_of(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    """Those of the only line on a request."""
    (found,) = [r.__dict__["fields"] for r in caplog.records if r.getMessage() == "request"]
    return {name: value for name, value in found.items() if "_s" in name}


GENERATED = {"method": "POST", "route": CHAT, "status": 200, "model": "tiny", "choices": 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer(
    client: httpx.AsyncClient, engine: Any, chat: Any, told: Any, caplog: Any, stream: bool
) -> None:
    engine.say("abc")
    engine.cached_tokens = [4]
    response = await client.post(CHAT, json=chat(stream=stream))
    assert response.status_code == 200
    (line,) = told()
    answer_id = line.pop("id")
    assert answer_id.startswith("chatcmpl-") and answer_id in response.text
    num_prompt = len("<user:hi\nassistant:")  # < is <bos>
    counts = {"prompt_tokens": num_prompt, "cached_tokens": 4, "output_tokens": 4}
    assert line == GENERATED | counts | {"finish": ["stop"]}
    times = times_of(caplog)
    assert 0 < times["ttft_s"] <= times["total_s"]
    assert times["tokens_per_s"] > 0


async def test_choices_and_prompts_are_counted_as_the_usage_counts_them(
    client: httpx.AsyncClient, engine: Any, completion: Any, told: Any
) -> None:
    engine.scripts = [[[65, 66], FinishReason.LENGTH], [[67], FinishReason.STOP]] * 2
    engine.cached_tokens = [1, 3, 2, 3]
    body = completion(prompt=["ab", "cde"], n=2)
    usage = (await client.post(COMPLETIONS, json=body)).json()["usage"]
    (line,) = told()
    assert (line["choices"], line["finish"]) == (4, ["length", "stop"])
    assert line["prompt_tokens"] == usage["prompt_tokens"] == 7
    assert line["output_tokens"] == usage["completion_tokens"] == 8
    assert line["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] == 3


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_other_apis(client: httpx.AsyncClient, engine: Any, told: Any, path: str) -> None:
    engine.say("ab")
    hi = [{"role": "user", "content": "hi"}]
    body = {"model": "tiny", "max_tokens": 9, "messages": hi}
    body = body if "messages" in path else {"model": "tiny", "input": "hi"}
    response = await client.post(path, json=body)
    (line,) = told()
    assert (line["route"], line["output_tokens"]) == (path, 3)
    assert line["id"] == response.json()["id"]


async def test_the_callers_trace(client: httpx.AsyncClient, told: Any) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    await client.get("/v1/models", headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
    await client.get("/v1/models")
    assert [line.get("trace_id") for line in told()] == [trace, None]


async def test_refusals(
    client: httpx.AsyncClient, state: Any, chat: Any, told: Any, caplog: Any
) -> None:
    for content, error in [
        (b"{", "invalid_request_error"),
        (b'{"model": "other", "messages": [{"role": "user", "content": "hi"}]}', "model_not_found"),
    ]:
        await client.post(CHAT, content=content, headers={"content-type": "application/json"})
        assert told()[-1]["error"] == error
    # The prompt is what there is no room for.
    state.admission.waiting_tokens.take("", state.config.engine.max_num_queued_tokens - 1)
    assert (await client.post(CHAT, json=chat())).status_code == 429
    await client.get("/some/secret?key=sk-1")
    await client.get("/v1/models/other")
    lines = told()
    assert [(line["route"], line["status"]) for line in lines] == [
        (CHAT, 400),
        (CHAT, 404),
        (CHAT, 429),
        ("unmatched", 404),
        ("/v1/models/{model_id:path}", 404),
    ]
    assert lines[2]["error"] == "slow_down"
    assert not any("output_tokens" in line and line["output_tokens"] for line in lines)
    assert "finish" not in lines[2]
    assert "secret" not in caplog.text and "sk-1" not in caplog.text


async def test_what_is_refused_before_it_is_routed_has_its_route(
    make_state: Any, client_for: Any, chat: Any, told: Any, engine: Any
) -> None:
    engine.say("x")
    keys = {name: {"Authorization": f"Bearer sk-{name}"} for name in ("no", "b", "a")}
    async with client_for(create_app(make_state(api_key=("sk-a", "sk-b")))) as client:
        for headers in keys.values():
            await client.post(CHAT, json=chat(), headers=headers)
    refused, second, first = told()
    assert refused == {
        "method": "POST",
        "route": CHAT,
        "status": 401,
        "error": "invalid_api_key",
    }
    assert (second["key"], first["key"]) == ("1", "0")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves(
    connect: Any, engine: Any, chat: Any, told: Any, stream: bool
) -> None:
    engine.script = [[65], [66], asyncio.Event()]
    connection = connect(CHAT, chat(stream=stream))
    await engine.begun.wait()
    if stream:
        while b'"B"' not in (await connection.next()).get("body", b""):
            pass
    connection.disconnect()
    await connection.task
    (line,) = told()
    assert (line["finish"], line["abort_reason"]) == (["abort"], "client")
    assert line["status"] == (200 if stream else 499)
    if stream:
        assert line["output_tokens"] == 2


@pytest.mark.parametrize(
    ("happens", "fields", "status", "error", "reason"),
    [
        (lambda: FinishReason.ERROR, {}, 500, "generation_failed", "error"),
        (asyncio.Event, {"timeout": 0.01}, 504, "deadline_exceeded", "deadline"),
        (lambda: KeyError("x"), {}, 500, "internal_error", "error"),
    ],
    ids=["engine", "deadline", "mistake"],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_failures(
    client: httpx.AsyncClient,
    engine: Any,
    chat: Any,
    told: Any,
    stream: bool,
    happens: Callable[[], Any],
    fields: Any,
    status: int,
    error: str,
    reason: str,
) -> None:
    engine.script = [[65], happens()]
    await client.post(CHAT, json=chat(stream=stream, **fields))
    (line,) = told()
    assert line["status"] == (200 if stream else status)
    assert (line["error"], line["abort_reason"]) == (error, reason)
    assert line["finish"] in (["error"], ["abort"])


async def test_a_mistake_of_ours_after_the_first_bytes(app: FastAPI, told: Any) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("half")

    app.mount("/broken", broken)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.get("/broken/x")
    (line,) = told()
    assert (line["status"], line["error"]) == (200, "internal_error")


async def test_probes_only_when_debugging(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    for level, num_lines in ((logging.INFO, 0), (logging.DEBUG, 3)):
        caplog.clear()
        caplog.set_level(level, "bezel")
        for path in ("/health", "/ready", "/metrics"):
            assert (await client.get(path)).status_code == 200
        lines = [r for r in caplog.records if r.getMessage() == "request"]
        assert [r.levelno for r in lines] == [logging.DEBUG] * num_lines


async def test_lines_can_be_turned_off(
    make_state: Any, client_for: Any, engine: Any, chat: Any, told: Any
) -> None:
    engine.say("x")
    async with client_for(create_app(make_state(enable_log_requests=False))) as client:
        assert (await client.post(CHAT, json=chat())).status_code == 200
    assert told() == []


async def test_texts_and_keys_are_in_no_line(
    make_state: Any, client_for: Any, engine: Any, chat: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """At the chattiest level, in good and in bad requests."""
    caplog.set_level(logging.DEBUG)
    engine.say("ANSWERED", chunk=3)
    headers = {"Authorization": "Bearer sk-GIVEN", "x-api-key": "sk-GIVEN"}
    ask = {"role": "user", "content": "ASKED"}
    async with client_for(create_app(make_state(api_key=("sk-GIVEN",)))) as client:
        for body in (
            chat(messages=[ask]),
            chat(messages=[ask], stream=True),
            chat(messages=[ask] * 50),
            chat(messages=[ask], temperature=9),
            chat(messages=[{"role": "ASKED", "content": 1}]),
            chat(messages=[ask], unheard_of="ASKED"),
        ):
            await client.post(CHAT, json=body, headers=headers)
        await client.post(CHAT, json=chat(), headers={"Authorization": "Bearer sk-WRONG"})
    lines = [f"{r.getMessage()} {r.__dict__}" for r in caplog.records if r.name != "httpx"]
    assert len(lines) >= 7
    for text in ("ASKED", "ANSWERED", "sk-GIVEN", "sk-WRONG"):
        assert not any(text in line for line in lines)


def test_times_of_a_summary() -> None:
    summary = RequestSummary(started_s=10.0, ended_s=14.0)
    assert (summary.total_s, summary.ttft_s, summary.tokens_per_s) == (4.0, None, None)
    summary.first_token_s = summary.last_token_s = 10.5
    summary.num_first_tokens = summary.num_output_tokens = 3
    assert (summary.ttft_s, summary.tokens_per_s) == (0.5, None)
    summary.last_token_s, summary.num_output_tokens = 12.5, 23
    assert summary.tokens_per_s == 10.0
