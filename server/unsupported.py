"""Request fields that Bezel knows but doesn't act on, and those it has never heard of.

Nothing is ignored in silence: what would change the answer and isn't there yet is refused by
name, what can't change the answer is accepted, and of the rest `--unknown-params` decides: it is
told in the log and in the response's header `x-ignored-params`, or refused.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from bezel.engine.errors import InvalidRequest

logger = logging.getLogger("bezel")

# Fields without influence on the answer.
HARMLESS = frozenset(
    {
        *("guided_decoding_backend", "metadata", "moderation", "parallel_tool_calls"),
        *("prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
        *("safety_identifier", "service_tier", "store", "stream_options.include_obfuscation"),
        *("user",),
    }
)
# Fields of features that aren't there, with the values that ask for nothing (null aside).
NOT_YET: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_whitespace_pattern": (),
    "length_penalty": (1, 1.0),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Names come from clients: their number, and so the log, must not grow for ever.
_MAX_REPORTED = 100
# Of a header that proxies may limit to some kilobytes.
_MAX_IN_HEADER = 20
_MAX_HEADER_NAME = 64

IGNORED_HEADER = "x-ignored-params"


def check_extra_fields(fields: Mapping[str, Any], policy: str, reported: set[str]) -> list[str]:
    """Judge the fields that the schemas don't declare, and return those that are ignored.

    With the policy "warn" they are also logged, each name once: `reported` holds those that were.

    Raises:
        InvalidRequest: a field asks for a feature that isn't there, or is unknown and the policy
            is "reject".
    """
    ignored = []
    for name, value in fields.items():
        if value is None or name in HARMLESS:
            continue
        if name in NOT_YET:
            _check_neutral(name, value, NOT_YET[name])
        elif policy == "reject":
            name = _encodable(name)
            raise InvalidRequest(f"Unknown parameter: {name:.100}.", name, "unknown_parameter")
        elif policy == "warn":
            ignored.append(name)
            _report(name, reported)
    return ignored


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """The header that names ignored fields, percent-encoded; none if there are none."""
    shown = [_encodable(name)[:_MAX_HEADER_NAME] for name in list(names)[:_MAX_IN_HEADER]]
    quoted = [quote(name, safe="[]") for name in shown]
    return {IGNORED_HEADER: ", ".join(quoted)} if quoted else {}


def _encodable(name: str) -> str:
    """JSON can spell half of a surrogate pair, UTF-8 can't."""
    return name.encode("utf-8", "replace").decode()


def _report(name: str, reported: set[str]) -> None:
    if name not in reported and len(reported) < _MAX_REPORTED:
        reported.add(name)
        logger.warning("ignoring the unknown request field %.100r", name)


def _check_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    # Types must agree too: to Python `best_of: true` would be `best_of: 1`.
    if any(type(value) is type(item) and value == item for item in neutral):
        return
    raise InvalidRequest(f"{name} isn't supported.", name, "unsupported_parameter")
