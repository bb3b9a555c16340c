"""What Gemma's chat templates get wrong, put right around them.

Checkpoints carry one of several revisions of Gemma 4's template. None is edited: messages and tools
are marked before they are rendered, and the marks acted upon in the text that comes out. Which
repairs a template needs is found out by having it render a small conversation.

| what a template does                                        | repair                             |
| ----------------------------------------------------------- | ---------------------------------- |
| text before a call comes after the tool's answer, closes    | the text goes into the call's name |
| the turn, and leaves out the opening of the next            | and is moved out in front of it    |
| a tool's answer gets a turn of its own, or takes time that  | it is put into the model's message |
| grows with the square of their number                       |                                    |
| the turn stays open when the user speaks after an answer,   | it is closed, and left open        |
| and is closed when the text was white space                 |                                    |
| null is Python's None in arguments                          | an object that prints as null      |
| parameters named "type" or "description" are left out       | names with a mark in front         |
| an undescribed object begins with a comma                   | a description that is erased       |

Marks are code points that Unicode reserves for such uses. `Tokenizer` takes them out of the texts
of requests, so none is anybody else's.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bezel.engine.errors import InvalidRequest

# Keeps what looks like a control token from being one; cut out when the text is tokenized.
BREAK = "\ufdd0"
_LEAD_OPEN, _LEAD_CLOSE = "\ufdd1", "\ufdd2"
_NOTHING = "\ufdd3"
MARKS = re.compile("[\ufdd0-\ufdd3]")

THOUGHT_OPEN, THOUGHT_CLOSE = "<|channel>thought\n", "<channel|>"
_CALL = "<|tool_call>call:"
_MISPLACED_LEAD = re.compile(f"({re.escape(_CALL)}){_LEAD_OPEN}(.*?){_LEAD_CLOSE}", re.DOTALL)
_ANY_LEAD = re.compile(f"{_LEAD_OPEN}.*?{_LEAD_CLOSE}", re.DOTALL)
# What some revisions look for among the keys of a schema, and then also among parameters' names.
_KEYWORDS = frozenset({"description", "type", "properties", "required", "nullable"})

_PROBED_CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "zq_user"},
    {
        "role": "assistant",
        "content": "zq_text",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "zq_call", "arguments": {}}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "name": "zq_call", "content": "zq_answer"},
]
_ANSWER = "<|tool_response>response:zq_call"
_PROBED_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "zq_call",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {
                "type": {"type": "string", "description": "zq_type"},
                "box": {"type": "object", "properties": {}},
            },
        },
    },
}


class _Null:
    """None in arguments: not every template knows it, all print what they don't know."""

    def __str__(self) -> str:
        return "null"


NULL = _Null()


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """What a template does with tools, and which repairs it needs."""

    renders_tools: bool
    puts_text_after_calls: bool
    embeds_tool_answers: bool
    garbles_declarations: bool

    @classmethod
    def of(cls, render: Callable[..., str]) -> "TemplateTraits":
        """Found by rendering: `render` takes messages and tools."""
        declared = _attempt(render, _PROBED_CONVERSATION[:1], [_PROBED_TOOL])
        called = _attempt(render, _PROBED_CONVERSATION, None)
        embedded = _attempt(render, _with_answers(_PROBED_CONVERSATION), None)
        is_gemma = f"{_CALL}zq_call" in called
        has_all_names, stray_comma = "zq_type" in declared, "{,properties" in declared
        return cls(
            renders_tools="zq_call" in declared,
            puts_text_after_calls=is_gemma and called.find("zq_text") > called.find(_CALL),
            embeds_tool_answers=_ANSWER in embedded
            and (_ANSWER not in called or called == embedded),
            garbles_declarations=is_gemma and (not has_all_names or stray_comma),
        )


def _attempt(render: Callable[..., str], *conversation: Any) -> str:
    try:
        return render(*conversation)
    except InvalidRequest:
        return ""


def marked_messages(
    messages: Sequence[dict[str, Any]], traits: TemplateTraits
) -> list[dict[str, Any]]:
    """Messages as the template needs them; `repaired` completes the work."""
    if traits.embeds_tool_answers:
        messages = _with_answers(messages)
    return [_marked_calls(m, traits) if m.get("tool_calls") else m for m in messages]


def _with_answers(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each tool's answer in the message that calls it, where Gemma's own format has it."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] != "tool" or not joined or "tool_calls" not in joined[-1]:
            joined.append(message)
            continue
        if "tool_responses" not in joined[-1]:
            joined[-1] = {**joined[-1], "tool_responses": []}
        answer = {"name": message.get("name") or "unknown", "response": message["content"]}
        joined[-1]["tool_responses"].append(answer)
    return joined


def _marked_calls(message: dict[str, Any], traits: TemplateTraits) -> dict[str, Any]:
    functions = [
        {**call["function"], "arguments": _printable(call["function"].get("arguments") or {})}
        for call in message["tool_calls"]
    ]
    text = message.get("content")
    marked = dict(message)
    if traits.puts_text_after_calls and isinstance(text, str):
        marked["content"] = ""
        lead = f"{_LEAD_OPEN}{text.strip()}{_LEAD_CLOSE}"
        functions[0]["name"] = lead + functions[0]["name"]
    marked["tool_calls"] = [
        {**call, "function": function}
        for call, function in zip(message["tool_calls"], functions, strict=True)
    ]
    return marked


def _printable(value: Any) -> Any:
    if value is None:
        return NULL
    if isinstance(value, Mapping):
        return {key: _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list) else value


def marked_tools(
    tools: Sequence[dict[str, Any]] | None, traits: TemplateTraits
) -> list[dict[str, Any]] | None:
    """Declarations as the template needs them."""
    if not tools:
        return None
    return [_marked_tool(tool) if traits.garbles_declarations else tool for tool in tools]


def _marked_tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = dict(tool["function"])
    if "parameters" in function:
        function["parameters"] = _marked_schema(function["parameters"])
    return {**tool, "function": function}


def _marked_schema(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    marked = dict(schema)
    if isinstance(schema.get("properties"), Mapping):
        properties = {name: _marked_property(item) for name, item in schema["properties"].items()}
        if _KEYWORDS & properties.keys():  # all of them, so that they sort as before
            properties = {_NOTHING + name: item for name, item in properties.items()}
        marked["properties"] = properties
    if "items" in schema:
        marked["items"] = _marked_schema(schema["items"])
    return marked


def _marked_property(schema: Any) -> Any:
    marked = _marked_schema(schema)
    if isinstance(marked, dict) and marked.get("type") in ("object", "array"):
        marked["description"] = marked.get("description") or _NOTHING
    return marked


def repaired(text: str, traits: TemplateTraits) -> str:
    """A rendered prompt without its marks, but for `BREAK`."""
    if traits.puts_text_after_calls:
        text = _MISPLACED_LEAD.sub(r"\2\1", text)
        text = _ANY_LEAD.sub("", text)  # where else the function's name went
    if traits.garbles_declarations:
        text = text.replace(f'description:<|"|>{_NOTHING}<|"|>,', "").replace(_NOTHING, "")
    if traits.embeds_tool_answers:
        # The turn goes on after the answer, and isn't opened again, or somebody else speaks.
        text = text.replace("<tool_response|><|turn>model\n", "<tool_response|>")
        text = text.replace("<tool_response|><|turn>", "<tool_response|><turn|>\n<|turn>")
    return text


def continued(prompt: str, reasoning: str, content: str) -> str:
    """A prompt that ends where the model answers, and the beginning of that answer.

    The prompt may end in an open thought, or in the empty one by which some templates turn thinking
    off; a thought without content after it stays open.
    """
    if reasoning:
        prompt = prompt.removesuffix(THOUGHT_OPEN + THOUGHT_CLOSE).removesuffix(THOUGHT_OPEN)
        prompt += THOUGHT_OPEN + reasoning
        return f"{prompt}\n{THOUGHT_CLOSE}{content}" if content else prompt
    if content and prompt.endswith(THOUGHT_OPEN):
        prompt += THOUGHT_CLOSE
    return prompt + content
