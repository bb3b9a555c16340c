"""Whatever a grammar lets through is right, be the draws as wild as they like."""

import json
from typing import Any

import jsonschema
import pytest
from gemma4_chat import gemma4_tokenizer
from grammar_cases import PARAMETERS, SCHEMAS, calls_of, check
from grammar_walks import CHANNEL_CLOSE, CHANNEL_OPEN, bytes_of, text_of, walk

from bezel.server.chat import Thinking
from bezel.server.control_tokens import ControlTokens
from bezel.server.grammars.structured_output import output_grammar
from bezel.server.parsing.parser import ChatParser
from bezel.server.schemas import ChatCompletionRequest

NUM_WALKS = 10  # with each of 20 schemas

CONTROL = ControlTokens.of(gemma4_tokenizer())
assert CONTROL is not None


def grammar_of(thinking: Thinking, **fields: Any) -> str:
    messages = [{"role": "user", "content": "?"}]
    request = ChatCompletionRequest(model="m", messages=messages, **fields)
    grammar = output_grammar(request, CONTROL, thinking)
    assert grammar is not None
    return grammar


def without_thought(token_ids: list[int], thinking: Thinking) -> list[int]:
    if thinking is Thinking.OPEN or token_ids[:1] == [CHANNEL_OPEN]:
        end = token_ids.index(CHANNEL_CLOSE)
        b"".join(map(bytes_of, token_ids[int(thinking is not Thinking.OPEN) : end])).decode()
        return token_ids[end + 1 :]
    return token_ids


def parsed_calls(token_ids: list[int], thinking: Thinking) -> list[tuple[str, Any]]:
    """As the server reads them."""
    assert CONTROL is not None
    prompt_ids = [CHANNEL_OPEN] if thinking is Thinking.OPEN else []
    parser = ChatParser(
        gemma4_tokenizer(), CONTROL, prompt_ids, parse_tools=True, new_call_id=lambda: "id"
    )
    calls: dict[int, list[str]] = {}
    for piece in (parser.push(token_ids), parser.flush()):
        assert piece.content == ""
        for call in piece.tool_calls:
            calls.setdefault(call.index, [call.name or "", ""])[1] += call.arguments
    return [(name, json.loads(arguments)) for name, arguments in calls.values()]


@pytest.mark.parametrize("name", SCHEMAS)
def test_outputs_fit_their_schema(name: str) -> None:
    for seed in range(NUM_WALKS):
        thinking = list(Thinking)[seed % 3]
        wrapper = {"name": "x", "schema": SCHEMAS[name]}
        response_format = {"type": "json_schema", "json_schema": wrapper}
        output = walk(grammar_of(thinking, response_format=response_format), seed)
        text = text_of(without_thought(output, thinking))
        check(json.loads(text), SCHEMAS[name])


@pytest.mark.parametrize("name", PARAMETERS)
def test_arguments_of_calls_fit_their_schema_and_are_read_as_they_are(name: str) -> None:
    functions = {"strict_one": (PARAMETERS[name], True), "loose-one": (PARAMETERS[name], False)}
    tools = [
        {"type": "function", "function": {"name": f, "parameters": schema, "strict": strict}}
        for f, (schema, strict) in functions.items()
    ]
    for seed in range(NUM_WALKS):
        thinking = list(Thinking)[seed % 3]
        output = walk(grammar_of(thinking, tools=tools, tool_choice="required"), seed)
        calls = calls_of(without_thought(output, thinking))
        assert calls and parsed_calls(output, thinking) == calls
        for function, arguments in calls:
            if functions[function][1]:
                check(arguments, PARAMETERS[name])


def test_the_judge_can_say_no() -> None:
    with pytest.raises(jsonschema.ValidationError):
        check({"a": 1}, SCHEMAS["object"])
    with pytest.raises(jsonschema.ValidationError):
        check({"date": "2024-02-30", "ipv4": "1.2.3", "ipv6": "", "uuid": ""}, SCHEMAS["formats"])
