"""The server's own OpenAPI document, fuzzed: whatever comes, the answer is what it promises.

`make test ARGS="-k openapi --openapi-cases=20000"` is the long run.

Bodies are drawn by schemathesis, right and wrong ones. Most of them end at the first field that is
out of range, so each is also sent tamed, in three ways: with the model's name, and a few of its
fields. Behind the app is an engine that says random tokens, control tokens among them.
"""

import copy
import json
import random
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from gemma4_chat import gemma4_tokenizer
from hypothesis import HealthCheck, Phase, given, settings

from bezel.engine.checkpoint import Checkpoint
from bezel.engine.messages import EngineInfo, FinishReason, SequenceOutput, TokenLogprobs
from bezel.engine.metrics import Metrics
from bezel.engine.sampling_params import SamplingParams
from bezel.server.app import create_app
from bezel.server.config import ServerConfig
from bezel.server.responses.prompt import REFUSED
from bezel.server.state import ServerState
from bezel.server.unsupported import HARMLESS, NOT_YET

MODEL = "tiny"
VOCAB = 262_144
STOPS = [1, 106, 50]
WAYS = 4  # in which each body is sent
# How much of the cases each route gets.
SHARES = {
    "/v1/chat/completions": 0.3,
    "/v1/completions": 0.18,
    "/v1/responses": 0.18,
    "/v1/messages": 0.18,
    "/v1/messages/count_tokens": 0.05,
    "/tokenize": 0.06,
    "/detokenize": 0.05,
}
WITHOUT_BODY = {
    "/v1/embeddings": 404,
    "/v1/models": 200,
    "/v1/models/{model_id}": 404,
    "/health": 200,
    "/ready": 200,
    "/metrics": 200,
    "/version": 200,
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY")
ESSENTIAL = ("messages", "prompt", "input", "tokens", "max_tokens")
# Not in every schema, and yet looked at.
EXTRAS = (
    *HARMLESS,
    *NOT_YET,
    *REFUSED,
    *("include", "max_completion_tokens", "response_format", "seed", "stop", "thinking"),
    *("continue_final_message", "chat_template_kwargs", "documents", "reasoning_effort"),
)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": ["integer", "null"]}, "b": {"enum": ["x", "y"]}},
    "required": ["a"],
}


class BabblingEngine:
    """Says some random tokens of every kind, the same for the same prompt and seed."""

    is_ready, step_age_s, num_restarts = True, 0.0, 0
    info = EngineInfo(
        max_model_len=32_768,
        vocab_size=VOCAB,
        dtype="float32",
        device="cpu",
        num_parameters=1,
        eos_token_ids=STOPS,
        kv_cache_bytes=1,
        local_pages_total=1,
        global_pages_total=1,
        local_page_bytes=1,
        global_page_bytes=1,
    )

    async def start(self) -> None:
        """Always started."""

    async def shutdown(self) -> None:
        """Nothing to end."""

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """Its generator isn't iterated any further."""

    async def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[SequenceOutput, None]:
        rng = random.Random(f"{prompt_ids} {params.seed}")
        tokens = [rng.choice((rng.randrange(VOCAB), rng.randrange(46, 107))) for _ in range(12)]
        tokens = [token for token in tokens[: params.max_tokens] if token not in STOPS]
        is_cut = len(tokens) == params.max_tokens
        if params.prompt_logprobs is not None:
            entries = [told(i, params.prompt_logprobs) for i in prompt_ids[1:]]
            yield SequenceOutput(request_id=request_id, token_ids=[], prompt_logprobs=entries)
        for i, token in enumerate([*tokens, *([] if is_cut else [rng.choice(STOPS)])]):
            is_last = i == len(tokens) - is_cut
            reason = FinishReason.LENGTH if is_cut else FinishReason.STOP
            num_top = params.logprobs
            yield SequenceOutput(
                request_id=request_id,
                token_ids=[token],
                finish_reason=reason if is_last else None,
                logprobs=[] if num_top is None else [told(token, num_top)],
            )


def told(token_id: int, num_top: int) -> TokenLogprobs:
    ids = [(token_id + i) % VOCAB for i in range(num_top)]
    return TokenLogprobs(-0.5, ids, [-0.5 - i for i in range(num_top)])


@pytest.fixture(scope="module")
def app() -> Iterator[FastAPI]:
    state = ServerState(ServerConfig(), Metrics())
    checkpoint = Checkpoint(Path("tiny"), "safetensors", MODEL, {}, {})
    model = state.set_model(BabblingEngine(), gemma4_tokenizer(), checkpoint)
    yield create_app(state)
    model.grammars.close()


@pytest.fixture(scope="module")
def schema(app: FastAPI) -> Any:
    import schemathesis  # takes its time, which tests of other things need not wait for

    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.fixture(scope="module")
def num_cases(request: pytest.FixtureRequest) -> int:
    number: int = request.config.getoption("--openapi-cases")
    return number


def test_every_route_is_fuzzed(app: FastAPI) -> None:
    paths = app.openapi()["paths"]
    with_body = {path for path, item in paths.items() if "requestBody" in item.get("post", {})}
    assert with_body == set(SHARES)
    assert paths.keys() - with_body == set(WITHOUT_BODY)


@pytest.mark.parametrize("is_right", [True, False], ids=["right", "wrong"])
@pytest.mark.parametrize("path", SHARES)
def test_bodies(app: FastAPI, schema: Any, num_cases: int, path: str, is_right: bool) -> None:
    from schemathesis import GenerationMode, checks

    mode = GenerationMode.POSITIVE if is_right else GenerationMode.NEGATIVE
    statuses: dict[int, int] = {}

    @settings(
        max_examples=max(1, round(num_cases * SHARES[path] / 2 / WAYS)),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema[path]["post"].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        drawn = case.body
        for way in range(WAYS):
            if way > 0:
                case.body = tamed(drawn, random.Random(f"{way} {drawn!r}"))
            response = case.call()
            case.validate_response(
                response,
                checks=[
                    checks.not_a_server_error,
                    checks.status_code_conformance,
                    checks.content_type_conformance,
                    checks.response_schema_conformance,
                ],
            )
            check_answer(path, response.status_code, response.headers, response.content)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

    check()
    print(f"{path}, {'right' if is_right else 'wrong'}: {statuses}")
    assert {200, 400} & statuses.keys()


def tamed(drawn: Any, rng: random.Random) -> dict[str, Any]:
    """A body that gets further than most: little is asked for, and more of it is sound."""
    is_object = isinstance(drawn, dict)
    body = copy.deepcopy(drawn) if is_object else {rng.choice(ESSENTIAL): str(drawn)}
    kept = {name: v for name, v in body.items() if name in ESSENTIAL or rng.random() < 0.15}
    if "max_tokens" in kept:
        kept["max_tokens"] = rng.randrange(1, 20)
    for name in kept.keys() & {"n", "top_logprobs", "logprobs", "top_k", "min_tokens"}:
        if type(kept[name]) is int:
            kept[name] = rng.randrange(0, 4)
    if {"prompt", "messages"} <= kept.keys():
        del kept[rng.choice(("prompt", "messages"))]
    if "prompt" in kept and kept["prompt"] is None:
        kept["prompt"] = "Hi"
    if isinstance(kept.get("tokens"), list):
        kept["tokens"] = [1, *(i % VOCAB if type(i) is int else i for i in kept["tokens"])]
    for message in _dicts(kept.get("messages")):
        _tame_message(message, rng)
    if rng.random() < 0.2:
        kept |= _constraint(rng, body)
    if rng.random() < 0.2:
        kept[rng.choice(EXTRAS)] = rng.choice([*body.values(), True, [], {}, 1])
    if rng.random() < 0.3:
        kept["stream"] = True
    return kept | {"model": MODEL}


def _tame_message(message: dict[str, Any], rng: random.Random) -> None:
    if rng.random() < 0.9:
        message["content"] = json.dumps(message.get("content"), ensure_ascii=False)
    if rng.random() < 0.9:
        message.pop("tool_calls", None)
        if message.get("role") == "tool":
            message["role"] = "user"


def _constraint(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """Tools or a format, sound or made of what was drawn."""
    schema = rng.choice((SCHEMA, SCHEMA, rng.choice([*body.values(), True])))
    name = rng.choice(("f", "get_weather", "x" * 65))
    if "input" in body:
        form = {"type": "json_schema", "name": name, "schema": schema}
        tool = {"type": "function", "name": name, "parameters": schema, "strict": True}
        return rng.choice(({"text": {"format": form}}, {"tools": [tool]}))
    if "prompt" in body:
        return rng.choice(({"guided_json": schema}, {"guided_regex": r"\d{3}"}))
    function = {"name": name, "parameters": schema, "strict": rng.random() < 0.5}
    tool = {"type": "function", "function": function}
    form = {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}
    claude = {"name": name, "input_schema": schema}
    return rng.choice(
        (
            {"tools": [tool], "tool_choice": rng.choice(("auto", "required", "none"))},
            {"tools": [claude], "tool_choice": {"type": rng.choice(("auto", "any"))}},
            {"response_format": form},
        )
    )


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def check_answer(path: str, status: int, headers: Any, content: bytes) -> None:
    """Bodies are what they say they are, and errors have the form of the route's API."""
    kind = headers["content-type"]
    kind = (kind if isinstance(kind, str) else kind[0]).partition(";")[0]
    if kind == "text/event-stream":
        assert status == 200
        events = content.decode().split("\n\n")
        assert events[-1] == ""
        data = [event.rpartition("data: ")[2] for event in events[:-1]]
        parsed = [json.loads(item) for item in data if item != "[DONE]"]
        assert parsed and all("error" not in item or not item["error"] for item in parsed)
        return
    assert kind == ("text/plain" if path == "/metrics" and status == 200 else "application/json")
    if status < 400:
        return
    body = json.loads(content)
    if path.startswith("/v1/messages"):
        assert body.keys() == {"type", "error", "request_id"} and body["type"] == "error"
        assert body["error"].keys() == {"type", "message"}
    else:
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"]


async def _answer(app: FastAPI, method: str, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path)


@pytest.mark.anyio
@pytest.mark.parametrize("path", [*SHARES, *WITHOUT_BODY])
async def test_methods(app: FastAPI, path: str) -> None:
    declared = {method.upper() for method in app.openapi()["paths"][path]}
    for method in METHODS:
        answer = await _answer(app, method, path)
        if method in declared:
            assert answer.status_code == WITHOUT_BODY.get(path, 400)
        else:
            assert answer.status_code == 405
            assert {item.strip() for item in answer.headers["allow"].split(",")} == declared
        if method != "HEAD":
            check_answer(path, answer.status_code, answer.headers, answer.content)
