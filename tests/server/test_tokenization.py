"""What a prompt is to the model, and back."""

from typing import Any

import pytest

pytestmark = pytest.mark.anyio


async def test_text_there_and_back(client: Any) -> None:
    answer = (await client.post("/tokenize", json={"prompt": "hi"})).json()
    assert answer == {
        "count": 3,
        "max_model_len": 100,
        "tokens": [256, 104, 105],
        "token_strs": None,
    }
    text = (await client.post("/detokenize", json={"tokens": answer["tokens"]})).json()
    assert text == {"prompt": "<bos>hi"}


async def test_without_bos_and_with_the_tokens_spelled(client: Any) -> None:
    body = {"prompt": "hi", "add_special_tokens": False, "return_token_strs": True}
    answer = (await client.post("/tokenize", json=body)).json()
    assert answer["tokens"] == [104, 105]
    assert answer["token_strs"] == ["h", "i"]


async def test_messages_are_those_of_the_chat(client: Any, engine: Any, chat: Any) -> None:
    engine.say("x")
    await client.post("/v1/chat/completions", json=chat())
    answer = (await client.post("/tokenize", json={"messages": chat()["messages"]})).json()
    assert answer["tokens"] == engine.requests[0][0]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"messages": [{"role": "nobody", "content": "a"}]}, "messages"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/detokenize", {"tokens": [10_000]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ],
)
async def test_mistakes_are_named(client: Any, path: str, body: Any, param: str) -> None:
    response = await client.post(path, json=body)
    assert 400 <= response.status_code < 500
    assert response.json()["error"]["param"] == param
