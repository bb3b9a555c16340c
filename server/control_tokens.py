"""The tokens by which Gemma 4 marks turns, thoughts and calls of tools.

    <|turn>model ⏎ <|channel>thought ⏎ … <channel|>Let me see.
    <|tool_call>call:f{city:<|"|>Paris<|"|>}<tool_call|><|tool_response> …

A marker is one token. The same characters spelled by other tokens are text.
"""

from dataclasses import dataclass, fields

from bezel.engine.tokenizer import Tokenizer

_SPELLINGS = {
    "eos": "<eos>",
    "tool_open": "<|tool>",
    "tool_close": "<tool|>",
    "tool_call_open": "<|tool_call>",
    "tool_call_close": "<tool_call|>",
    "tool_response_open": "<|tool_response>",
    "tool_response_close": "<tool_response|>",
    "quote": '<|"|>',
    "think": "<|think|>",
    "channel_open": "<|channel>",
    "channel_close": "<channel|>",
    "turn_open": "<|turn>",
    "turn_close": "<turn|>",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlTokens:
    """Their ids. `quote` stands around strings in calls; `think` in a prompt turns thoughts on."""

    eos: int
    tool_open: int
    tool_close: int
    tool_call_open: int
    tool_call_close: int
    tool_response_open: int
    tool_response_close: int
    quote: int
    think: int
    channel_open: int
    channel_close: int
    turn_open: int
    turn_close: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ControlTokens | None":
        """Those of a vocabulary; None if it lacks any, as Gemma 3's does."""
        ids = {}
        for field in fields(cls):
            token_id = tokenizer.token_id(_SPELLINGS[field.name])
            if token_id is None:
                return None
            ids[field.name] = token_id
        return cls(**ids)
