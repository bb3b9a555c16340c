"""What the output of a request must be, as a grammar for the engine.

    {"response_format": {"type": "json_schema", …}}, thinking on
    →   start: (<[100]> TEXT <[101]>)? body     a thought first, if the model wants one
        TEXT: /(?s:.*)/                         any text: control tokens aren't
        body: %json {…}

JSON has no whitespace but single spaces after `,` and `:`, so that no model fills its context with
blanks. `grammar` is in llguidance's dialect of Lark, or in llama.cpp's GBNF.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from bezel.engine.errors import InvalidRequest
from bezel.server.chat import Thinking
from bezel.server.control_tokens import ControlTokens
from bezel.server.grammars.enforced_schema import enforced_schema
from bezel.server.grammars.tool_grammar import ToolGrammar, tool_grammar
from bezel.server.schemas import ChatCompletionRequest, GenerationRequest

# `\u` could spell the name of a property a second way, and half of a surrogate pair.
_JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "json_allowed_escapes": 'nrbtf\\"',
}
# Other names of what `structured_outputs` holds.
_ALIASES = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "grammar": "grammar",
}
# Of structured_outputs: what only says how another server should go about it.
_HARMLESS = frozenset({"disable_fallback", "disable_any_whitespace"})
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
_MAX_LARK_CHARS = 200_000
# The converter's time grows with the square of it: 0.2 s for this many.
_MAX_GBNF_CHARS = 16_384


@dataclass(frozen=True, slots=True)
class _Constraint:
    """`rules` say what `body` is; where they refer to `@user`, that is the grammar `user`."""

    field: str
    rules: str
    user: str | None = None


def output_grammar(
    request: GenerationRequest, control: ControlTokens | None, thinking: Thinking
) -> str | None:
    """The grammar of the whole output, self-contained; None if it may be anything.

    `control` is None where the model has no control tokens for thoughts and calls.

    Raises:
        InvalidRequest: a constraint isn't one, can't be enforced, or contradicts another.
    """
    body, calls = _constraint(request), None
    if isinstance(request, ChatCompletionRequest) and control is not None:
        calls = tool_grammar(request, control, has_format=body is not None)
    if calls is not None and calls.is_forced and body is not None:
        if body.field != "response_format":
            raise InvalidRequest(f"{body.field} goes only with tool_choice 'auto'.", "tool_choice")
        # The format is that of an answer, and a call isn't one.
        body = None
    if body is None and calls is None:
        return None
    return _whole(body, calls, control, thinking)


def constrained_field(request: GenerationRequest) -> str:
    """The field that says what the output must be, for messages about its grammar."""
    body = _constraint(request)
    return "tools" if body is None else body.field


def _whole(
    body: _Constraint | None,
    calls: ToolGrammar | None,
    control: ControlTokens | None,
    thinking: Thinking,
) -> str:
    thought = ""
    if control is not None and thinking is Thinking.ON:
        thought = f"(<[{control.channel_open}]> TEXT <[{control.channel_close}]>)? "
    elif control is not None and thinking is Thinking.OPEN:
        thought = f"TEXT <[{control.channel_close}]> "
    answers = [] if body is None else ["body"]
    lines = [r"TEXT: /(?s:.*)/"]
    if body is not None:
        lines.append(body.rules)
    if calls is not None:
        answers.append(calls.start)
        lines += calls.rules
    lark = "\n".join([f"start: {thought}({' | '.join(answers)})", *lines])
    if body is None or body.user is None:
        return lark
    user = {"name": "user", "lark_grammar": body.user}
    return json.dumps({"grammars": [{"lark_grammar": lark}, user]})


def _constraint(request: GenerationRequest) -> _Constraint | None:
    """The one thing that is asked of the output, if any."""
    asked = [_of_response_format(request.response_format)]
    asked += _of_structured_outputs(request.structured_outputs)
    for field, kind in _ALIASES.items():
        value = getattr(request, field)
        asked.append(None if value is None else _of_kind(kind, value, field))
    given = [constraint for constraint in asked if constraint is not None]
    if len(given) > 1:
        first, second = given[0].field, given[1].field
        raise InvalidRequest(f"{second} can't be combined with {first}.", second)
    return given[0] if given else None


def _of_response_format(value: dict[str, Any] | None) -> _Constraint | None:
    if value is None:
        return None
    field = "response_format"
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            # OpenAI has no schema here; llama.cpp and others do.
            schema = value.get("schema")
            return _json({"type": "object"} if schema is None else schema, field)
        case "json_schema":
            wrapper = value.get("json_schema", value)
            schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
            if schema is None:
                path = f"{field}.json_schema.schema"
                raise InvalidRequest(f"{path} must be a JSON schema.", path)
            return _json(schema, field)
        case kind:
            raise InvalidRequest(
                f"{field}.type must be 'text', 'json_object' or 'json_schema', not {kind!r:.100}.",
                f"{field}.type",
            )


def _of_structured_outputs(value: dict[str, Any] | None) -> list[_Constraint]:
    given = {key: item for key, item in (value or {}).items() if item not in (None, False)}
    constraints = []
    for kind, item in given.items():
        field = f"structured_outputs.{kind}"
        if kind not in _HARMLESS:
            constraints.append(_of_kind(kind, item, field))
    return constraints


def _of_kind(kind: str, value: Any, field: str) -> _Constraint:
    match kind:
        case "json":
            return _json(_parsed(value, field) if isinstance(value, str) else value, field)
        case "json_object" if value is True:
            return _json({"type": "object"}, field)
        case "regex" if isinstance(value, str):
            # As JSON Schema and Python's `re` have it, but that the whole output must match.
            return _Constraint(field, f"body: /{regex_to_lark(value, 'd')}/")
        case "choice" if isinstance(value, list) and value:
            if all(isinstance(choice, str) for choice in value):
                # One terminal: thousands of alternatives are too many for a rule.
                choices = " | ".join(json.dumps(choice) for choice in value)
                return _Constraint(field, f"body: CHOICE\nCHOICE: {choices}")
        case "grammar" if isinstance(value, str):
            return _Constraint(field, "body: @user", _lark(value, field))
    wanted = {
        "json_object": "true",
        "regex": "a string",
        "choice": "a list of strings",
        "grammar": "a string",
    }
    if kind not in wanted:
        raise InvalidRequest(f"{field:.200} isn't supported.", field)
    raise InvalidRequest(f"{field} must be {wanted[kind]}.", field)


def _json(schema: Any, field: str) -> _Constraint:
    enforced = enforced_schema(schema, field)
    if isinstance(enforced, bool):
        enforced = {} if enforced else {"enum": []}
    return _Constraint(field, f"body: %json {json.dumps({**enforced, 'x-guidance': _JSON_STYLE})}")


def _parsed(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field} isn't valid JSON.", field) from error


def _lark(grammar: str, field: str) -> str:
    is_gbnf = _GBNF_RULE.search(grammar) is not None
    limit = _MAX_GBNF_CHARS if is_gbnf else _MAX_LARK_CHARS
    if len(grammar) > limit:
        raise InvalidRequest(f"{field} may have {limit} characters at most.", field)
    if not is_gbnf:
        return grammar
    try:
        return gbnf_to_lark(grammar)
    except Exception as error:  # of whatever kind the converter raises
        raise InvalidRequest(f"{field} isn't valid GBNF: {error!s:.300}", field) from error
