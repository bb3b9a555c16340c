"""Fields that are accepted, refused or reported; none is ignored in silence."""

import logging
from typing import Any

import httpx
import pytest

from bezel.engine.errors import InvalidRequest
from bezel.server.app import create_app
from bezel.server.unsupported import check_extra_fields, ignored_header


@pytest.mark.parametrize("policy", ["warn", "reject", "ignore"])
@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"a": "b"}, "store": True, "user": "u", "service_tier": "auto"},
        {"safety_identifier": "s", "prompt_cache_key": "k", "prediction": {}},
        {"stream_options.include_obfuscation": False},
        {"best_of": 1, "echo": False, "top_logprobs": 0, "functions": []},
        {"tools": [], "tool_choice": "none", "modalities": ["text"], "suffix": ""},
        {"timeout": None, "functions": None, "whatever": None},
    ],
    ids=["no influence", "none either", "of streams", "neutral", "no tools", "null"],
)
def test_accepted(fields: dict[str, Any], policy: str, caplog: pytest.LogCaptureFixture) -> None:
    reported: set[str] = set()
    assert check_extra_fields(fields, policy, reported) == []
    assert reported == set()
    assert caplog.records == []


@pytest.mark.parametrize("policy", ["warn", "reject", "ignore"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 2),
        ("best_of", True),
        ("echo", True),
        ("top_logprobs", 5),
        ("top_logprobs", False),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", {"type": "function"}),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("suffix", "."),
        ("reasoning_effort", "high"),
        ("use_beam_search", True),
    ],
)
def test_refused_by_name(name: str, value: Any, policy: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name} isn't supported\.$") as error:
        check_extra_fields({name: value}, policy, set())
    assert error.value.param == name
    assert error.value.code == "unsupported_parameter"


def test_unknown_names_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    reported: set[str] = set()
    first = check_extra_fields({"tempreature": 1, "evil\nname": 2}, "warn", reported)
    second = check_extra_fields({"tempreature": 1, "third": 3}, "warn", reported)
    assert (first, second) == (["tempreature", "evil\nname"], ["tempreature", "third"])
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert [record.getMessage().split()[-1] for record in caplog.records] == [
        "'tempreature'",
        r"'evil\nname'",
        "'third'",
    ]


def test_made_up_names_do_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    reported: set[str] = set()
    for i in range(1000):
        check_extra_fields({f"field{i}": i}, "warn", reported)
    assert len(reported) == len(caplog.records) == 100


def test_unknown_names_can_be_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^Unknown parameter: tempreature\.$") as error:
        check_extra_fields({"user": "u", "tempreature": 1}, "reject", set())
    assert error.value.param == "tempreature"
    assert error.value.code == "unknown_parameter"


def test_unknown_names_can_be_ignored(caplog: pytest.LogCaptureFixture) -> None:
    assert check_extra_fields({"tempreature": 1}, "ignore", set()) == []
    assert caplog.records == []


@pytest.mark.parametrize(
    ("names", "value"),
    [
        (["a", "b_c-d.e"], "a, b_c-d.e"),
        (["x\r\nset-cookie: y"], "x%0D%0Aset-cookie%3A%20y"),
        (["a,b", "é"], "a%2Cb, %C3%A9"),
        (["\ud800"], "%3F"),
        (["x" * 100], "x" * 64),
        ([f"f{i}" for i in range(30)], ", ".join(f"f{i}" for i in range(20))),
    ],
    ids=["plain", "line break", "comma", "surrogate", "long", "many"],
)
def test_names_fit_into_a_header(names: list[str], value: str) -> None:
    assert ignored_header(names) == {"x-ignored-params": value}


def test_nothing_ignored_is_no_header() -> None:
    assert ignored_header([]) == {}


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
async def test_ignored_fields_are_named_in_the_response(
    client: httpx.AsyncClient, engine: Any, route: str, stream: bool
) -> None:
    engine.say("x")
    body = {"model": "tiny", "prompt": "a", "stream": stream, "user": "u", "colour": "red"}
    if route == "chat/completions":
        del body["prompt"]
        body["messages"] = [{"role": "user", "content": "a"}]
    expected = "colour"
    if stream:
        body["stream_options"] = {"include_usage": True, "speed": 9}
        expected = "colour, stream_options.speed"
    response = await client.post(f"/v1/{route}", json=body)
    assert response.status_code == 200
    assert response.headers["x-ignored-params"] == expected
    del body["colour"]
    body.pop("stream_options", None)
    response = await client.post(f"/v1/{route}", json=body)
    assert "x-ignored-params" not in response.headers


@pytest.mark.anyio
async def test_policy_of_the_server(
    make_state: Any, client_for: Any, engine: Any, completion: Any
) -> None:
    engine.say("x")
    async with client_for(create_app(make_state(unknown_params="reject"))) as client:
        response = await client.post("/v1/completions", json=completion(colour=1))
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "colour"
    async with client_for(create_app(make_state(unknown_params="ignore"))) as client:
        response = await client.post("/v1/completions", json=completion(colour=1))
        assert response.status_code == 200
        assert "x-ignored-params" not in response.headers
