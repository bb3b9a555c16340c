"""Every range of a request's sampling options, and that NaN and infinity are in none."""

import math
from typing import Any

import msgspec
import pytest

from bezel.engine.errors import InvalidRequest
from bezel.engine.sampling_params import SamplingParams, ThinkingBudget

VOCAB_SIZE = 100


def budget(num_tokens: int, open_id: int = 7, close_id: int = 8) -> ThinkingBudget:
    return ThinkingBudget(num_tokens=num_tokens, open_id=open_id, close_id=close_id, is_open=False)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(max_tokens=1),
        dict(min_tokens=0),
        dict(min_tokens=10),
        dict(temperature=0.0),
        dict(temperature=2.0),
        dict(top_p=1e-9),
        dict(top_p=1.0),
        dict(top_k=0),
        dict(top_k=2**63 - 1),
        dict(min_p=0.0),
        dict(min_p=1.0),
        dict(presence_penalty=-2.0, frequency_penalty=2.0),
        dict(presence_penalty=2.0, frequency_penalty=-2.0),
        dict(repetition_penalty=1e-3),
        dict(repetition_penalty=50.0),
        dict(seed=-(2**63)),
        dict(seed=2**63 - 1),
        dict(stop_token_ids=(0, VOCAB_SIZE - 1)),
        dict(logit_bias={0: -100.0, VOCAB_SIZE - 1: 100.0}),
        dict(logprobs=0, prompt_logprobs=20),
        dict(logprobs=20, prompt_logprobs=0),
        dict(priority=-(2**31)),
        dict(priority=2**31 - 1),
        dict(thinking_budget=budget(0, 0, VOCAB_SIZE - 1)),
        dict(thinking_budget=budget(2**31 - 1, VOCAB_SIZE - 1, 0)),
    ],
    ids=str,
)
def test_values_on_the_bounds_are_fine(options: dict[str, Any]) -> None:
    SamplingParams(**(dict(max_tokens=10) | options)).validate(VOCAB_SIZE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 11),
        ("temperature", -0.01),
        ("temperature", 2.01),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("top_k", 2**63),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("min_p", math.nan),
        ("presence_penalty", -2.01),
        ("presence_penalty", 2.01),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.01),
        ("frequency_penalty", 2.01),
        ("frequency_penalty", -math.inf),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-50),
        ("repetition_penalty", 1e39),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", math.inf),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("stop_token_ids", (5, VOCAB_SIZE)),
        ("stop_token_ids", (-1,)),
        ("logit_bias", {VOCAB_SIZE: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {5: 100.5}),
        ("logit_bias", {5: -100.5}),
        ("logit_bias", {5: math.nan}),
        ("logprobs", -1),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 21),
        ("priority", 2**31),
        ("priority", -(2**31) - 1),
        ("thinking_budget", budget(-1)),
        ("thinking_budget", budget(2**31)),
        ("thinking_budget", budget(5, open_id=VOCAB_SIZE)),
        ("thinking_budget", budget(5, close_id=-1)),
    ],
)
def test_values_beyond_are_refused_by_name(field: str, value: Any) -> None:
    params = SamplingParams(**(dict(max_tokens=10) | {field: value}))
    with pytest.raises(InvalidRequest) as raised:
        params.validate(VOCAB_SIZE)
    assert raised.value.param == field
    assert raised.value.message.startswith(f"{field} must be ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=3.0), "temperature must be at least 0.0 and at most 2.0, got 3.0."),
        (dict(top_p=0.0), "top_p must be greater than 0.0 and at most 1.0, got 0.0."),
        (dict(max_tokens=-4), "max_tokens must be at least 1, got -4."),
        (
            dict(repetition_penalty=math.inf),
            "repetition_penalty must be at least 0.001 and at most 1000.0, got inf.",
        ),
    ],
    ids=["both-bounds", "open-bound", "lower-bound-only", "infinity"],
)
def test_message_says_the_range_and_the_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        SamplingParams(**(dict(max_tokens=10) | options)).validate(VOCAB_SIZE)
    assert raised.value.message == message


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    assert SamplingParams(max_tokens=1, temperature=0.0).is_greedy
    assert SamplingParams(max_tokens=1, temperature=1e-38).is_greedy
    assert not SamplingParams(max_tokens=1, temperature=0.01).is_greedy


def test_every_field_survives_the_way_to_the_engine_process() -> None:
    params = SamplingParams(
        max_tokens=7,
        min_tokens=1,
        temperature=0.3,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias={3: -5.0},
        seed=-9,
        stop_token_ids=(1, 106),
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=3,
        grammar="start: /x/",
        thinking_budget=budget(9),
        priority=-1,
        cache_salt="s",
        tenant="key 0",
        num_preamble_tokens=5,
    )
    defaults = SamplingParams(max_tokens=1)
    for name in SamplingParams.__struct_fields__:
        assert getattr(params, name) != getattr(defaults, name)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
