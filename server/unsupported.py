"""Request fields that Bezel knows but doesn't act on, and those it has never heard of.

Nothing is ignored in silence: what would change the answer and isn't there yet is refused by
name, what can't change the answer is accepted, and the rest is reported in the log.
"""

import logging
from collections.abc import Mapping
from typing import Any

from bezel.engine.errors import InvalidRequest

logger = logging.getLogger("bezel")

# Fields without influence on the answer.
_HARMLESS = frozenset(
    {
        *("cache_salt", "metadata", "moderation", "parallel_tool_calls", "prediction"),
        *("prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier"),
        *("store", "user"),
    }
)
# Fields of features that aren't there yet, with the values that ask for nothing (null aside).
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": (),
    "length_penalty": (1, 1.0),
    "logprobs": (False,),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "n": (1,),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "regex": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Names come from clients: their number, and so the log, must not grow for ever.
_MAX_REPORTED = 100


def check_extra_fields(fields: Mapping[str, Any], reported: set[str]) -> None:
    """Judge the fields that the schemas don't declare; unknown ones are logged once by name.

    Raises:
        InvalidRequest: a field asks for a feature that isn't there yet.
    """
    for name, value in fields.items():
        if value is None or name in _HARMLESS:
            continue
        if name in _NOT_YET:
            _check_neutral(name, value, _NOT_YET[name])
        elif name not in reported and len(reported) < _MAX_REPORTED:
            reported.add(name)
            logger.warning("ignoring the unknown request field %.100r", name)


def _check_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    # Types must agree too: `logprobs: 0` asks for something, `logprobs: false` doesn't.
    if any(type(value) is type(item) and value == item for item in neutral):
        return
    raise InvalidRequest(f"{name} isn't supported yet.", name, "unsupported_parameter")
