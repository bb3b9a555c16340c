"""Tokens to text, apart from HTTP: admission, order, errors, metrics."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from bezel.engine.errors import EngineUnavailable, Overloaded
from bezel.engine.messages import FinishReason
from bezel.engine.sampling_params import SamplingParams
from bezel.server.errors import GenerationFailed
from bezel.server.generation import TextRequest, generating
from bezel.server.parsing.parser import TextParser
from bezel.server.state import ServerState

pytestmark = pytest.mark.anyio


@pytest.fixture
def request_for(tokenizer: Any) -> Callable[..., TextRequest]:
    def make(request_id: str = "r", **fields: Any) -> TextRequest:
        params = SamplingParams(max_tokens=50, stop_token_ids=fields.pop("stop_token_ids", ()))
        parser = TextParser(
            tokenizer,
            stop=fields.pop("stop", ()),
            include_stop=fields.get("include_stop", False),
            skip_special_tokens=fields.pop("skip_special_tokens", True),
        )
        return TextRequest(
            request_id=request_id, prompt_ids=[1, 2], params=params, parser=parser, **fields
        )

    return make


async def text_of(state: ServerState, request: TextRequest) -> str:
    async with generating(state, [request]) as generation:
        return "".join([delta.parsed.content async for delta in generation.deltas() if delta])


async def test_in_flight_while_it_runs(state: ServerState, engine: Any, request_for: Any) -> None:
    engine.script = [asyncio.Event()]
    async with generating(state, [request_for()]):
        with pytest.raises(TimeoutError):
            await state.in_flight.wait_empty(0)
    await state.in_flight.wait_empty(0)
    assert engine.ended == {"r": FinishReason.ABORT}


async def test_nothing_begins_while_draining(
    state: ServerState, engine: Any, request_for: Any
) -> None:
    state.is_draining = True
    with pytest.raises(EngineUnavailable, match="shutting down"):
        async with generating(state, [request_for()]):
            pass
    assert engine.requests == []


async def test_refusal_is_known_on_entry(state: ServerState, engine: Any, request_for: Any) -> None:
    engine.refusal = EngineUnavailable("gone")
    with pytest.raises(EngineUnavailable):
        async with generating(state, [request_for()]):
            pytest.fail("must not be entered")
    await state.in_flight.wait_empty(0)


async def test_failing_comes_after_what_is_there(
    state: ServerState, engine: Any, request_for: Any
) -> None:
    rest = asyncio.Event()
    engine.script = [[65], rest, [66], FinishReason.STOP]
    async with generating(state, [request_for()]) as generation:
        deltas = generation.deltas()
        first = await anext(deltas)
        assert first is not None
        assert first.parsed.content == "A"
        generation.fail(EngineUnavailable("The server is shutting down."))
        with pytest.raises(EngineUnavailable, match="shutting down"):
            await anext(deltas)
    assert engine.ended == {"r": FinishReason.ABORT}


async def test_silence_is_told_and_nothing_is_lost(
    state: ServerState, engine: Any, request_for: Any
) -> None:
    token_comes = asyncio.Event()
    engine.script = [token_comes, [65], [66], FinishReason.LENGTH]
    async with generating(state, [request_for()]) as generation:
        deltas = generation.deltas(idle_s=0)
        assert [await anext(deltas) for _ in range(3)] == [None] * 3
        token_comes.set()
        text = "".join([delta.parsed.content async for delta in deltas if delta])
    assert text == "AB"
    assert engine.ended == {"r": FinishReason.LENGTH}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"skip_special_tokens": False}, "A"),
        ({"skip_special_tokens": False, "include_stop": True}, "A<eos>"),
        ({"include_stop": True}, "A"),
    ],
    ids=["hidden", "shown", "special"],
)
async def test_token_that_ends_the_sequence(
    state: ServerState, engine: Any, request_for: Any, fields: dict[str, Any], text: str
) -> None:
    engine.script = [[65], FinishReason.STOP]
    assert await text_of(state, request_for(**fields)) == text


async def test_stop_token_of_the_request_is_no_text(
    state: ServerState, engine: Any, request_for: Any
) -> None:
    engine.script = [[65], ([67, 66], FinishReason.STOP)]
    assert await text_of(state, request_for(stop_token_ids=(66,))) == "AC"


async def test_metrics_of_a_sequence(state: ServerState, engine: Any, request_for: Any) -> None:
    engine.say("Hello", FinishReason.LENGTH)
    await text_of(state, request_for())
    lines = state.metrics.render()[0].decode().splitlines()
    for line in (
        'bezel_request_success_total{finished_reason="length",model_name="tiny"} 1.0',
        'bezel_time_to_first_token_seconds_count{model_name="tiny"} 1.0',
        'bezel_inter_token_latency_seconds_count{model_name="tiny"} 4.0',
        'bezel_request_prompt_tokens_sum{model_name="tiny"} 2.0',
        'bezel_request_generation_tokens_sum{model_name="tiny"} 5.0',
        'bezel_e2e_request_latency_seconds_count{model_name="tiny"} 1.0',
    ):
        assert line in lines


@pytest.mark.parametrize(
    "failure", [EngineUnavailable("x"), FinishReason.ERROR], ids=["engine dies", "gives up"]
)
async def test_failures_are_counted(
    state: ServerState, engine: Any, request_for: Any, failure: Any
) -> None:
    engine.script = [[65], failure]
    with pytest.raises((EngineUnavailable, GenerationFailed)):
        await text_of(state, request_for())
    text = state.metrics.render()[0].decode()
    assert 'finished_reason="error",model_name="tiny"} 1.0' in text
    assert 'bezel_e2e_request_latency_seconds_count{model_name="tiny"} 1.0' in text


async def test_aborts_are_counted(state: ServerState, engine: Any, request_for: Any) -> None:
    engine.script = [[65], asyncio.Event()]
    async with generating(state, [request_for()]) as generation:
        await anext(generation.deltas())
    text = state.metrics.render()[0].decode()
    assert 'finished_reason="abort",model_name="tiny"} 1.0' in text
    assert 'bezel_request_generation_tokens_sum{model_name="tiny"} 1.0' in text


async def test_refused_sequences_are_no_sequences(
    state: ServerState, engine: Any, request_for: Any
) -> None:
    state.admission.places.take("", 10_000)
    with pytest.raises(Overloaded):
        await text_of(state, request_for())
    text = state.metrics.render()[0].decode()
    assert 'bezel_e2e_request_latency_seconds_count{model_name="tiny"} 0.0' in text
