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


def test_undeclared_fields_are_kept_apart() -> None:
    request = CompletionRequest(model="m", prompt="x", n=2, colour="red", seed=1)
    assert request.model_extra == {"n": 2, "colour": "red"}


def test_openapi_tells_of_every_form_of_a_prompt(app: Any) -> None:
    schemas = app.openapi()["components"]["schemas"]
    forms = schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]
    assert [form.get("type") for form in forms] == ["string", "array", "array", "array"]
