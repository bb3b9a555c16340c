"""Which value wins: the request's, the checkpoint's or OpenAI's."""

from typing import Any

import pytest

from bezel.engine.errors import PromptTooLong
from bezel.engine.messages import EngineInfo
from bezel.engine.sampling_params import SamplingParams
from bezel.server.sampling import sampling_params
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
