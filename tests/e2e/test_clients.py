"""Clients as people use them, against a real server with a tiny random Gemma 4.

The model babbles, so what is asserted is what grammars, limits and the wire format guarantee.
"""

import asyncio
import json
import socket
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel, Field
from server_process import Server

MODEL = "tiny-gemma-4"
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "A forecast.", "parameters": PARAMETERS}
TOOL: Any = {"type": "function", "function": FUNCTION}
# The model never ends by itself, and always says the same.
PLAIN: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
BOUNDED: dict[str, Any] = {"temperature": 0, "max_tokens": 200}
# Anthropic's client has no argument for it any more, its API has.
GREEDY: dict[str, Any] = {"extra_body": {"temperature": 0}}


class Forecast(BaseModel):
    """What the weather will be."""

    sky: Literal["clear", "cloudy"]
    degrees: int = Field(ge=-20, le=45)
    note: str = Field(max_length=12)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clients may look for nothing but this machine, and none may even try."""
    asked: list[Any] = []
    look_up = socket.getaddrinfo

    def local_only(host: Any, *rest: Any, **named: Any) -> Any:
        if host not in ("127.0.0.1", b"127.0.0.1", "localhost"):
            asked.append(host)
            raise socket.gaierror(f"{host} is not this machine")
        return look_up(host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", local_only)
    yield
    assert asked == []


@pytest.fixture
def client(gemma4_server: Server) -> Iterator[openai.OpenAI]:
    with gemma4_server.client as client:
        yield client


@pytest.fixture
def claude(gemma4_server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gemma4_server.url, api_key="none", max_retries=0) as client:
        yield client


def check_arguments(arguments: Any) -> None:
    """They fit `PARAMETERS`."""
    assert set(arguments) == {"city", "days"}
    assert arguments["city"] in ("Paris", "Rome")
    assert type(arguments["days"]) is int and 1 <= arguments["days"] <= 7


class TestOpenAI:
    def test_chat_streamed_and_not(self, client: openai.OpenAI) -> None:
        whole = client.chat.completions.create(model=MODEL, messages=QUESTION, **PLAIN)
        (choice,) = whole.choices
        assert choice.finish_reason == "length"
        assert whole.usage is not None and whole.usage.completion_tokens == 12
        *chunks, last = client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            stream=True,
            stream_options={"include_usage": True},
            **PLAIN,
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == choice.message.content != ""
        assert chunks[-1].choices[0].finish_reason == "length"
        assert last.usage == whole.usage

    def test_async_clients_at_once(self, gemma4_server: Server) -> None:
        async def ask(client: openai.AsyncOpenAI, seed: int) -> tuple[str, str]:
            options = PLAIN | {"temperature": 1, "seed": seed}
            whole = await client.chat.completions.create(model=MODEL, messages=QUESTION, **options)
            stream = await client.chat.completions.create(
                model=MODEL, messages=QUESTION, stream=True, **options
            )
            streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return whole.choices[0].message.content or "", streamed

        async def ask_all() -> list[tuple[str, str]]:
            url = f"{gemma4_server.url}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
                return await asyncio.gather(*(ask(client, seed) for seed in range(4)))

        answers = asyncio.run(ask_all())
        assert all(whole == streamed for whole, streamed in answers)
        assert len(dict(answers)) == 4, "each seed says something else"

    def test_parse(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.parse(
            model=MODEL, messages=QUESTION, response_format=Forecast, **BOUNDED
        )
        (choice,) = answer.choices
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Forecast)
        with client.chat.completions.stream(
            model=MODEL, messages=QUESTION, response_format=Forecast, **BOUNDED
        ) as stream:
            kinds = {event.type for event in stream}
            streamed = stream.get_final_completion()
        assert {"content.delta", "content.done"} <= kinds
        assert streamed.choices[0].message.parsed == choice.message.parsed

    def test_tools_there_and_back(self, client: openai.OpenAI) -> None:
        asked = client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            tools=[TOOL],
            tool_choice="required",
            parallel_tool_calls=False,
            **BOUNDED,
        )
        (choice,) = asked.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls or ()
        assert call.type == "function" and call.function.name == "get_weather"
        check_arguments(json.loads(call.function.arguments))
        result = {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 22}'}
        messages = [*QUESTION, choice.message, result]
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, tools=[TOOL], tool_choice="none", **PLAIN
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].message.tool_calls is None

    def test_named_tool_streamed(self, client: openai.OpenAI) -> None:
        other: Any = {"type": "function", "function": {"name": "other"}}
        with client.chat.completions.stream(
            model=MODEL,
            messages=QUESTION,
            tools=[other, TOOL],
            tool_choice={"type": "function", "function": {"name": "get_weather"}},
            **BOUNDED,
        ) as stream:
            pieces = [
                event.arguments_delta
                for event in stream
                if event.type == "tool_calls.function.arguments.delta"
            ]
            (choice,) = stream.get_final_completion().choices
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls or ()
        assert call.function.name == "get_weather"
        assert "".join(pieces) == call.function.arguments
        check_arguments(json.loads(call.function.arguments))

    def test_thought_within_its_budget_then_json(self, client: openai.OpenAI) -> None:
        begun = {"role": "assistant", "content": "", "reasoning_content": "The sky over Paris"}
        answer = client.chat.completions.parse(
            model=MODEL,
            messages=[*QUESTION, begun],
            response_format=Forecast,
            reasoning_effort="high",
            extra_body={"continue_final_message": True, "thinking_token_budget": 6},
            **BOUNDED,
        )
        message = answer.choices[0].message
        assert isinstance(message.parsed, Forecast)
        assert message.model_extra is not None and message.model_extra["reasoning_content"]
        assert answer.usage is not None and answer.usage.completion_tokens_details is not None
        assert answer.usage.completion_tokens_details.reasoning_tokens == 6

    def test_responses(self, client: openai.OpenAI) -> None:
        options: Any = {"temperature": 0, "max_output_tokens": 12}
        whole = client.responses.create(model=MODEL, input="Hello", **options)
        assert whole.status == "incomplete"
        assert whole.incomplete_details is not None
        assert whole.incomplete_details.reason == "max_output_tokens"
        events = list(client.responses.create(model=MODEL, input="Hello", stream=True, **options))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        assert text == whole.output_text != ""
        assert events[-1].type == "response.incomplete"
        assert events[-1].response.output_text == text

    def test_responses_parse_and_tools(self, client: openai.OpenAI) -> None:
        options: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": 200}
        parsed = client.responses.parse(input="The weather?", text_format=Forecast, **options)
        assert parsed.status == "completed"
        assert isinstance(parsed.output_parsed, Forecast)
        tool: Any = {"type": "function", **FUNCTION, "strict": True}
        asked = client.responses.create(
            input="The weather?",
            tools=[tool],
            tool_choice="required",
            parallel_tool_calls=False,
            **options,
        )
        (call,) = asked.output
        assert call.type == "function_call" and call.name == "get_weather"
        check_arguments(json.loads(call.arguments))
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "22 °C"}
        history: Any = [{"role": "user", "content": "The weather?"}, call, result]
        with client.responses.stream(input=history, text_format=Forecast, **options) as stream:
            kinds = [event.type for event in stream]
            answer = stream.get_final_response()
        assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
        assert isinstance(answer.output_parsed, Forecast)


class TestAnthropic:
    def test_message_streamed_and_not(self, claude: anthropic.Anthropic) -> None:
        options: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 12, **GREEDY}
        whole = claude.messages.create(**options)
        assert whole.stop_reason == "max_tokens"
        assert whole.usage.output_tokens == 12
        counted = claude.messages.count_tokens(model=MODEL, messages=QUESTION)
        assert counted.input_tokens == whole.usage.input_tokens
        with claude.messages.stream(**options) as stream:
            text = "".join(stream.text_stream)
            streamed = stream.get_final_message()
        (block,) = whole.content
        assert block.type == "text" and block.text == text != ""
        assert [block.type for block in streamed.content] == ["text"]
        assert streamed.usage.output_tokens == 12

    def test_forced_tool_and_its_result(self, claude: anthropic.Anthropic) -> None:
        tool: Any = {"name": "get_weather", "description": "", "input_schema": PARAMETERS}
        options: Any = {"model": MODEL, "tools": [tool], "max_tokens": 200, **GREEDY}
        asked = claude.messages.create(
            messages=QUESTION,
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
            **options,
        )
        assert asked.stop_reason == "tool_use"
        (call,) = asked.content
        assert call.type == "tool_use" and call.name == "get_weather"
        check_arguments(call.input)
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "22 °C"}
        history: Any = [
            *QUESTION,
            {"role": "assistant", "content": asked.content},
            {"role": "user", "content": [result]},
        ]
        with claude.messages.stream(
            messages=history, tool_choice={"type": "tool", "name": "get_weather"}, **options
        ) as stream:
            again = stream.get_final_message()
        (call,) = again.content
        assert call.type == "tool_use"
        check_arguments(call.input)

    def test_errors_have_their_classes(self, claude: anthropic.Anthropic) -> None:
        with pytest.raises(anthropic.NotFoundError) as not_found:
            claude.messages.create(model="other", messages=QUESTION, max_tokens=1)
        body: Any = not_found.value.body
        assert body["error"]["type"] == "not_found_error"
        with pytest.raises(anthropic.BadRequestError, match="temperature"):
            claude.messages.create(
                model=MODEL, messages=QUESTION, max_tokens=1, extra_body={"temperature": 3}
            )


class TestLangChain:
    @pytest.fixture
    def chat(self, gemma4_server: Server, monkeypatch: pytest.MonkeyPatch) -> Any:
        for name in ("LANGCHAIN_TRACING_V2", "LANGSMITH_TRACING"):
            monkeypatch.setenv(name, "false")
        langchain = pytest.importorskip("langchain_openai")
        return langchain.ChatOpenAI(
            base_url=f"{gemma4_server.url}/v1",
            api_key="none",
            model=MODEL,
            temperature=0,
            max_tokens=200,
            max_retries=0,
        )

    def test_invoke_and_stream(self, chat: Any) -> None:
        chat = chat.bind(max_tokens=12)
        whole = chat.invoke("Hello")
        assert whole.response_metadata["finish_reason"] == "length"
        assert whole.usage_metadata["output_tokens"] == 12
        text = "".join(chunk.content for chunk in chat.stream("Hello"))
        assert text == whole.content != ""

    def test_tools_there_and_back(self, chat: Any) -> None:
        bound = chat.bind_tools([TOOL], tool_choice="any", parallel_tool_calls=False)
        asked = bound.invoke("The weather?")
        (call,) = asked.tool_calls
        assert call["name"] == "get_weather"
        check_arguments(call["args"])
        result = {"role": "tool", "tool_call_id": call["id"], "content": "22 °C"}
        again = bound.invoke([{"role": "user", "content": "The weather?"}, asked, result])
        check_arguments(again.tool_calls[0]["args"])

    @pytest.mark.parametrize("method", ["json_schema", "function_calling"])
    def test_structured_output(self, chat: Any, method: str) -> None:
        forecast = chat.with_structured_output(Forecast, method=method).invoke("The weather?")
        assert isinstance(forecast, Forecast)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of its own types, on import
class TestLiteLLM:
    @pytest.fixture
    def litellm(self, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        # Read on import: it would fetch a list of prices.
        monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        module = pytest.importorskip("litellm")
        assert isinstance(module, ModuleType)
        return module

    @pytest.fixture
    def options(self, gemma4_server: Server) -> dict[str, Any]:
        return {
            "model": f"openai/{MODEL}",
            "api_base": f"{gemma4_server.url}/v1",
            "api_key": "none",
            "messages": QUESTION,
            "temperature": 0,
            "max_retries": 0,
        }

    def test_completion_streamed_and_not(
        self, litellm: ModuleType, options: dict[str, Any]
    ) -> None:
        whole = litellm.completion(**options, max_tokens=12)
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.completion_tokens == 12
        chunks = litellm.completion(**options, max_tokens=12, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.choices[0].message.content != ""

    def test_tools(self, litellm: ModuleType, options: dict[str, Any]) -> None:
        options |= {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
        (choice,) = litellm.completion(**options, max_tokens=200).choices
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        check_arguments(json.loads(call.function.arguments))

    def test_json_schema(self, litellm: ModuleType, options: dict[str, Any]) -> None:
        answer = litellm.completion(**options, response_format=Forecast, max_tokens=200)
        Forecast.model_validate_json(answer.choices[0].message.content)
