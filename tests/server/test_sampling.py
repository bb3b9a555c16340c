"""Which value wins: the request's, the checkpoint's or OpenAI's."""

from typing import Any

import pytest

from bezel.engine.errors import InvalidRequest, PromptTooLong
from bezel.engine.messages import EngineInfo
from bezel.engine.sampling_params import SamplingParams, ThinkingBudget
from bezel.server.chat import Thinking
from bezel.server.control_tokens import ControlTokens
from bezel.server.sampling import sampling_params, seed_of_choice, thinking_budget
from bezel.server.schemas import ChatCompletionRequest, CompletionRequest

GEMMA = {"temperature": 1, "top_p": 0.95, "top_k": 64.0, "do_sample": True, "max_length": 20}


@pytest.fixture
def params_of(info: EngineInfo) -> Any:
    """The params of a completion request with a prompt of 10 tokens."""

    def make(generation_config: dict[str, Any], **fields: Any) -> SamplingParams:
        request = CompletionRequest(model="m", prompt="x", **fields)
        return sampling_params(request, 10, info, generation_config, "prompt")

    return make


def test_openai_defaults(params_of: Any) -> None:
    assert params_of({}) == SamplingParams(max_tokens=90, temperature=1.0, top_p=1.0, top_k=0)


def test_checkpoint_defaults(params_of: Any) -> None:
    expected = SamplingParams(max_tokens=90, temperature=1.0, top_p=0.95, top_k=64)
    params = params_of(GEMMA)
    assert params == expected
    assert (type(params.temperature), type(params.top_k)) == (float, int)


def test_checkpoint_without_sampling_has_no_say(params_of: Any) -> None:
    assert params_of(GEMMA | {"do_sample": False}) == SamplingParams(max_tokens=90)


def test_request_wins(params_of: Any) -> None:
    params = params_of(GEMMA, temperature=0, top_p=0.5, top_k=3)
    assert (params.temperature, params.top_p, params.top_k) == (0.0, 0.5, 3)
    assert params.is_greedy


@pytest.mark.parametrize(("given", "used"), [(-1, 0), (0, 0), (1, 1), (258, 258), (10**30, 258)])
def test_top_k(params_of: Any, given: int, used: int) -> None:
    assert params_of(GEMMA, top_k=given).top_k == used


@pytest.mark.parametrize(("max_tokens", "fits"), [(None, True), (90, True), (91, False)])
def test_context_length(params_of: Any, max_tokens: int | None, fits: bool) -> None:
    if fits:
        assert params_of({}, max_tokens=max_tokens).max_tokens == 90
        return
    with pytest.raises(PromptTooLong) as error:
        params_of({}, max_tokens=max_tokens)
    assert error.value.param == "prompt"
    assert error.value.code == "context_length_exceeded"


def test_prompt_that_fills_the_context(info: EngineInfo) -> None:
    messages = [{"role": "user", "content": "x"}]
    request = ChatCompletionRequest(model="m", messages=messages)
    assert sampling_params(request, 99, info, {}, "messages").max_tokens == 1
    with pytest.raises(PromptTooLong) as error:
        sampling_params(request, 100, info, {}, "messages")
    assert error.value.param == "messages"


def test_echoed_prompts_have_as_many_logprobs_as_outputs(params_of: Any) -> None:
    cases = [
        ({"logprobs": 2}, (2, None)),
        ({"logprobs": 2, "prompt_logprobs": 0}, (2, 0)),
        ({"echo": True}, (None, None)),
        ({"echo": True, "logprobs": 0}, (0, 0)),
        ({"echo": True, "logprobs": 2, "prompt_logprobs": 1}, (2, 2)),
        ({"echo": True, "logprobs": 2, "prompt_logprobs": 5}, (2, 5)),
    ]
    for fields, expected in cases:
        params = params_of({}, **fields)
        assert (params.logprobs, params.prompt_logprobs) == expected, fields


def test_echo_alone_still_makes_the_engine_generate(params_of: Any) -> None:
    assert params_of({}, echo=True, max_tokens=0).max_tokens == 1
    with pytest.raises(InvalidRequest, match="max_tokens"):
        params_of({}, max_tokens=0)


@pytest.mark.parametrize(
    ("seed", "number", "used"),
    [(None, 3, None), (7, 0, 7), (7, 3, 10), (-1, 1, 0), (2**63 - 1, 1, -(2**63))],
)
def test_choices_have_seeds_of_their_own(seed: int | None, number: int, used: int | None) -> None:
    assert seed_of_choice(seed, number) == used


@pytest.mark.parametrize(
    ("fields", "num_tokens"),
    [
        ({}, None),
        ({"reasoning_effort": "none"}, None),
        ({"reasoning_effort": "minimal"}, 512),
        ({"reasoning_effort": "low"}, 1024),
        ({"reasoning_effort": "medium"}, 8192),
        ({"reasoning_effort": "high"}, None),
        ({"reasoning_effort": "max"}, None),
        ({"thinking_token_budget": 0}, 0),
        ({"thinking_token_budget": 77, "reasoning_effort": "low"}, 77),
        ({"thinking_token_budget": -1, "reasoning_effort": "low"}, None),
    ],
    ids=str,
)
def test_thinking_budget(
    gemma4_tokenizer: Any, fields: dict[str, Any], num_tokens: int | None
) -> None:
    messages = [{"role": "user", "content": "x"}]
    request = ChatCompletionRequest(model="m", messages=messages, **fields)
    control = ControlTokens.of(gemma4_tokenizer)
    assert control is not None
    for thinking in Thinking:
        budget = thinking_budget(request, control, thinking)
        if num_tokens is None:
            assert budget is None
        else:
            assert budget == ThinkingBudget(
                num_tokens=num_tokens,
                open_id=258,
                close_id=259,
                is_open=thinking is Thinking.OPEN,
            )
    assert thinking_budget(request, None, Thinking.OFF) is None
