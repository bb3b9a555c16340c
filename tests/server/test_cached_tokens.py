"""What was found in the prefix cache, as each API tells it."""

from typing import Any

import pytest

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("path", "field"),
    [("/v1/chat/completions", "prompt_tokens_details"), ("/v1/responses", "input_tokens_details")],
)
async def test_what_was_found_in_the_cache_is_told(
    client: Any, engine: Any, chat: Any, path: str, field: str
) -> None:
    engine.say("ab")
    engine.cached_tokens = [4]
    body = chat() if "chat" in path else {"model": "tiny", "input": "hi"}
    usage = (await client.post(path, json=body)).json()["usage"]
    assert usage[field] == {"cached_tokens": 4}


async def test_choices_of_one_prompt_count_it_once(
    client: Any, engine: Any, chat: Any, events_of: Any
) -> None:
    engine.say("ab")
    engine.cached_tokens = [4, 8, 8] * 2
    body = chat(n=3, stream=True, stream_options={"include_usage": True})
    streamed = await client.post("/v1/chat/completions", json=body)
    told = events_of(streamed.text)[-2]["usage"]["prompt_tokens_details"]
    whole = (await client.post("/v1/chat/completions", json=chat(n=3))).json()
    assert told == whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


async def test_anthropic_counts_apart_what_was_found(client: Any, engine: Any) -> None:
    engine.say("ab")
    body = {"model": "tiny", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    cold = (await client.post("/v1/messages", json=body)).json()["usage"]
    engine.cached_tokens = [4]
    warm = (await client.post("/v1/messages", json=body)).json()["usage"]
    assert (cold["cache_read_input_tokens"], warm["cache_read_input_tokens"]) == (0, 4)
    assert cold["input_tokens"] == warm["input_tokens"] + 4
