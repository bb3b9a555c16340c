"""Whether a grammar matches a text, byte by byte: quick, for no vocabulary has to be loaded."""

import functools
import re

from gemma4_chat import CONTROL_TOKENS
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from bezel.server.control_tokens import ControlTokens
from bezel.server.grammars.worker import ByteVocabulary

NAMES = {1: "<eos>"} | {i: name for i, name in CONTROL_TOKENS.items() if i < 256}
CONTROL = ControlTokens(
    eos=1,
    tool_open=46,
    tool_close=47,
    tool_call_open=48,
    tool_call_close=49,
    tool_response_open=50,
    tool_response_close=51,
    quote=52,
    think=98,
    channel_open=100,
    channel_close=101,
    turn_open=105,
    turn_close=106,
)
_MARKERS = {name: token_id for token_id, name in NAMES.items()}
_VOCABULARY = ByteVocabulary(NAMES, 400)


@functools.cache
def _tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_VOCABULARY), eos_token=_VOCABULARY.eos_token_id)


def flaw(grammar: str) -> str:
    """What llguidance has to say against it."""
    error: str = _matcher(grammar).get_error()
    return error


def accepts(grammar: str, text: str) -> bool:
    """Whether all of `text`, in which control tokens are spelled out, is a whole output."""
    matcher = _matcher(grammar)
    assert not matcher.is_error(), matcher.get_error()
    parts = re.split("(" + "|".join(map(re.escape, _MARKERS)) + ")", text)
    ids: list[int] = []
    for part in parts:
        ids += [_MARKERS[part]] if part in _MARKERS else _VOCABULARY(part.encode())
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def _matcher(grammar: str) -> LLMatcher:
    limits = LLParserLimits(verbose_errors=False)
    return LLMatcher(_tokenizer(), grammar, log_level=0, limits=limits)
