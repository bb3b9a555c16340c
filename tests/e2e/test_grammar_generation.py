"""A model of random weights keeps to schemas and calls: outputs through the whole engine."""

import json
from typing import Any

import pytest
from gemma4_chat import gemma4_tokenizer
from gemma4_checkpoint import write_gemma4_checkpoint
from grammar_cases import PARAMETERS, SCHEMAS, calls_of, check
from grammar_walks import (
    CALL_CLOSE,
    CHANNEL_CLOSE,
    CHANNEL_OPEN,
    EOS_TOKEN_IDS,
    QUOTE,
    encode,
    text_of,
)

from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.messages import AddSequence, FinishReason
from bezel.engine.sampling_params import SamplingParams
from bezel.server.chat import Thinking
from bezel.server.control_tokens import ControlTokens
from bezel.server.grammars.structured_output import output_grammar
from bezel.server.schemas import ChatCompletionRequest

# Those whose outputs end soon without any sense of what they say.
NAMES = [
    *("object", "some of many", "list", "tuple", "text", "enum", "number", "multiple", "pattern"),
    *("optional", "tree", "kinds", "mixed", "joined", "nullable", "odd names"),
]
# Random logits are nearly all the same, and no text would end within thousands of tokens.
CLOSERS = [*(encode(text)[0] for text in ('"', "}", "]")), QUOTE, CALL_CLOSE, CHANNEL_CLOSE]
BIAS = dict.fromkeys([*CLOSERS, *EOS_TOKEN_IDS], 11.0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("gemma4") / "random"
    write_gemma4_checkpoint(path)
    return Engine(EngineConfig(model=str(path), device="cpu", kv_cache_memory_bytes=64 << 20))


def params_of(seed: int, thinking: Thinking, **fields: Any) -> SamplingParams:
    messages = [{"role": "user", "content": "?"}]
    request = ChatCompletionRequest(model="m", messages=messages, **fields)
    grammar = output_grammar(request, ControlTokens.of(gemma4_tokenizer()), thinking)
    assert grammar is not None
    return SamplingParams(max_tokens=1500, seed=seed, logit_bias=BIAS, grammar=grammar)


def outputs_of(engine: Engine, params: list[SamplingParams]) -> list[list[int]]:
    """All of them in one batch; without end tokens, and thoughts."""
    for i, own in enumerate(params):
        engine.add(AddSequence(str(i), [2, 105, 2364 + i, 106], own))
    outputs: list[list[int]] = [[] for _ in params]
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.finish_reason in (None, FinishReason.STOP)
            outputs[int(output.request_id)] += output.token_ids
    return [_answer(output) for output in outputs]


def _answer(token_ids: list[int]) -> list[int]:
    if token_ids[-1] in EOS_TOKEN_IDS:
        token_ids = token_ids[:-1]
    if token_ids[0] != CHANNEL_OPEN:
        return token_ids
    return token_ids[token_ids.index(CHANNEL_CLOSE) + 1 :]


def test_outputs_fit_their_schemas(engine: Engine) -> None:
    params = [
        params_of(
            seed,
            Thinking.ON if seed % 2 else Thinking.OFF,
            response_format={"type": "json_schema", "json_schema": {"schema": SCHEMAS[name]}},
        )
        for seed, name in enumerate(NAMES)
    ]
    for name, output in zip(NAMES, outputs_of(engine, params), strict=True):
        check(json.loads(text_of(output)), SCHEMAS[name])


def test_arguments_of_forced_calls_fit_their_schemas(engine: Engine) -> None:
    params = []
    for seed, name in enumerate(NAMES):
        function = {"name": "f", "parameters": PARAMETERS[name], "strict": True}
        tools = [{"type": "function", "function": function}]
        thinking = Thinking.ON if seed % 2 else Thinking.OFF
        params.append(params_of(seed, thinking, tools=tools, tool_choice="required"))
    for name, output in zip(NAMES, outputs_of(engine, params), strict=True):
        calls = calls_of(output)
        assert calls and {function for function, _ in calls} == {"f"}
        for _, arguments in calls:
            check(arguments, PARAMETERS[name])
