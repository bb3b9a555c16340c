"""What the wire types make of JSON."""

from typing import Any

import pytest

from bezel.server.schemas import ChatCompletionRequest, CompletionRequest


@pytest.mark.parametrize(
    ("given", "normal"),
    [(None, ()), ("a", ("a",)), ([], ()), (["a", "b", "c", "d"], ("a", "b", "c", "d"))],
)
def test_stop_is_always_several(given: Any, normal: tuple[str, ...]) -> None:
    assert CompletionRequest(model="m", prompt="x", stop=given).stop == normal


@pytest.mark.parametrize(
    ("given", "normal"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])],
)
def test_prompt_is_always_several(given: Any, normal: list[Any]) -> None:
    assert CompletionRequest(model="m", prompt=given).prompt == normal


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, None),
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 4),
    ],
    ids=str,
)
def test_newer_name_of_the_limit_wins(fields: dict[str, int], limit: int | None) -> None:
    messages = [{"role": "user", "content": "x"}]
    request = ChatCompletionRequest(model="m", messages=messages, **fields)
    assert request.output_limit == limit


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
    ],
    ids=str,
)
def test_number_of_logprobs_in_chats(fields: dict[str, Any], number: int | None) -> None:
    messages = [{"role": "user", "content": "x"}]
    request = ChatCompletionRequest(model="m", messages=messages, **fields)
    assert request.num_logprobs == number


@pytest.mark.parametrize(
    ("given", "number"), [(None, None), (False, None), (0, 0), (True, 1), (5, 5)]
)
def test_number_of_logprobs_in_completions(given: Any, number: int | None) -> None:
    assert CompletionRequest(model="m", prompt="x", logprobs=given).num_logprobs == number


def test_undeclared_fields_are_kept_apart() -> None:
    request = CompletionRequest(model="m", prompt="x", n=2, colour="red", tools=[])
    assert request.model_extra == {"colour": "red", "tools": []}


def test_openapi_tells_of_every_form_of_a_prompt(app: Any) -> None:
    schemas = app.openapi()["components"]["schemas"]
    forms = schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]
    assert [form.get("type") for form in forms] == ["string", "array", "array", "array"]
