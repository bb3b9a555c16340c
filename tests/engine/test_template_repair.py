"""Repairs around templates: which one needs what, and that the others are left alone."""

from typing import Any

import pytest
from gemma4_chat import TEMPLATES, template_source

from bezel.engine.chat_template import ChatTemplate
from bezel.engine.template_repair import continued

BOS = {"bos_token": "<bos>"}


def call(name: str, arguments: dict[str, Any], call_id: str = "1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def answer(name: str, content: str, call_id: str = "1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "name": name, "content": content}


USER = {"role": "user", "content": "2 + 3?"}
CALLS = {"role": "assistant", "content": " Let me see.\n", "tool_calls": [call("add", {"a": None})]}
TURN = (
    "<|turn>model\nLet me see.<|tool_call>call:add{a:null}<tool_call|><|tool_response>response:add"
)
BEGIN = "<bos><|turn>user\n2 + 3?<turn|>\n" + TURN + '{value:<|"|>5<|"|>}<tool_response|>'


@pytest.fixture(params=TEMPLATES)
def template(request: pytest.FixtureRequest) -> ChatTemplate:
    return ChatTemplate(template_source(request.param), BOS)


def test_text_stays_before_its_calls_and_the_answer_in_the_turn(template: ChatTemplate) -> None:
    messages = [USER, CALLS, answer("add", "5")]
    assert template.render(messages, True, {}) == BEGIN
    messages += [{"role": "assistant", "content": "It is 5."}, {"role": "user", "content": "Ah."}]
    assert template.render(messages, True, {}) == (
        f"{BEGIN}It is 5.<turn|>\n<|turn>user\nAh.<turn|>\n<|turn>model\n"
    )


@pytest.mark.parametrize("role", ["user", "system"])
def test_answers_end_the_turn_when_somebody_else_speaks(template: ChatTemplate, role: str) -> None:
    messages = [USER, CALLS, answer("add", "5"), {"role": role, "content": "Stop."}]
    assert template.render(messages, True, {}) == (
        f"{BEGIN}<turn|>\n<|turn>{role}\nStop.<turn|>\n<|turn>model\n"
    )


def test_calls_follow_on_answers_within_the_turn(template: ChatTemplate) -> None:
    second = {"role": "assistant", "content": "", "tool_calls": [call("mul", {"b": [None, True]})]}
    messages = [USER, CALLS, answer("add", "5"), second, answer("mul", "6")]
    assert template.render(messages, True, {}) == (
        BEGIN + "<|tool_call>call:mul{b:[null,true]}<tool_call|>"
        '<|tool_response>response:mul{value:<|"|>6<|"|>}<tool_response|>'
    )


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_white_space_before_calls_is_no_text(template: ChatTemplate, content: str) -> None:
    messages = [USER, {**CALLS, "content": content}, answer("add", "5")]
    assert template.render(messages, True, {}) == BEGIN.replace("Let me see.", "")


def test_calls_at_once_have_one_text_before_them(template: ChatTemplate) -> None:
    calls = [call("add", {}, "1"), call("mul", {}, "2")]
    messages = [
        USER,
        {"role": "assistant", "content": "Both.", "tool_calls": calls},
        answer("add", "5", "1"),
        answer("mul", "6", "2"),
    ]
    assert template.render(messages, True, {}) == (
        "<bos><|turn>user\n2 + 3?<turn|>\n<|turn>model\nBoth."
        "<|tool_call>call:add{}<tool_call|><|tool_call>call:mul{}<tool_call|>"
        '<|tool_response>response:add{value:<|"|>5<|"|>}<tool_response|>'
        '<|tool_response>response:mul{value:<|"|>6<|"|>}<tool_response|>'
    )


def test_parameters_may_have_any_name_and_no_description(template: ChatTemplate) -> None:
    text = {"type": "string"}
    properties = {
        "type": {"type": "object", "properties": {"required": text, "s": text}},
        "a_b": {"type": "array", "items": {"type": "object", "properties": {"nullable": text}}},
        "a": text,
    }
    tool = {
        "type": "function",
        "function": {
            "name": "f",
            "description": "",
            "parameters": {"type": "object", "properties": properties},
        },
    }
    string = '{type:<|"|>STRING<|"|>}'
    assert template.render([USER], False, {}, [tool]) == (
        '<bos><|turn>system\n<|tool>declaration:f{description:<|"|><|"|>,parameters:{properties:{'
        f"a:{string},"
        f'a_b:{{items:{{properties:{{nullable:{string}}},type:<|"|>OBJECT<|"|>}},'
        'type:<|"|>ARRAY<|"|>},'
        f'type:{{properties:{{required:{string},s:{string}}},type:<|"|>OBJECT<|"|>}}'
        '},type:<|"|>OBJECT<|"|>}}<tool|><turn|>\n<|turn>user\n2 + 3?<turn|>\n'
    )


def test_messages_and_tools_are_not_changed(template: ChatTemplate) -> None:
    calls = [call("add", {"a": None})]
    messages = [
        USER,
        {"role": "assistant", "content": "x", "tool_calls": calls},
        answer("add", "5"),
    ]
    before = repr(messages)
    template.render(messages, True, {})
    assert repr(messages) == before


OTHER = """\
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor -%}
{%- for message in messages -%}
[{{ message.role }}]{{ message.content }}
{%- for call in message.tool_calls or [] %}<{{ call.function | tojson }}>{% endfor -%}
{%- endfor -%}"""


def test_templates_of_other_formats_are_left_alone() -> None:
    template = ChatTemplate(OTHER, BOS)
    assert template.renders_tools
    tool = {"function": {"parameters": {"properties": {"type": {"type": "object"}}}}}
    messages = [USER, CALLS, answer("add", "5")]
    assert template.render(messages, True, {}, [tool]) == (
        '{"function": {"parameters": {"properties": {"type": {"type": "object"}}}}}'
        '[user]2 + 3?[assistant] Let me see.\n<{"name": "add", "arguments": {"a": null}}>[tool]5'
    )


NATIVE = """\
{%- for message in messages -%}
{%- if message.role == 'tool' -%}<|tool_response>response:{{ message.name }}!<tool_response|>
{%- else -%}{{ message.content }}
{%- for call in message.tool_calls or [] -%}<|tool_call>call:{{ call.function.name }}{% endfor -%}
{%- for answer in message.tool_responses -%}<|tool_response>response:{{ answer.name }}{% endfor -%}
{%- endif -%}
{%- endfor -%}"""


def test_messages_of_tools_are_left_to_templates_that_render_them_otherwise() -> None:
    assert ChatTemplate(NATIVE, BOS).render([USER, CALLS, answer("add", "5")], True, {}) == (
        "2 + 3? Let me see.\n<|tool_call>call:add<|tool_response>response:add!<tool_response|>"
    )


def test_answers_have_the_bare_names_of_their_functions() -> None:
    """Where the template looks them up, and so finds them with the text before the call."""
    source = template_source().replace("tool_responses", "answers_of_nobody")
    template = ChatTemplate(source, BOS)
    assert template.render([USER, CALLS, answer("add", "5")], True, {}) == BEGIN


@pytest.mark.parametrize(
    ("source", "renders"),
    [
        (template_source(), True),
        ("{{ messages[0].content }}", False),
        ("{{ raise_exception('no tools') if tools }}{{ messages[0].content }}", False),
        ("{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
         "{{ raise_exception('no calls') if messages[1:] }}", True),
    ],
    ids=["gemma 4", "mentions none", "refuses them", "refuses calls"],
)  # fmt: skip
def test_whether_a_template_renders_tools(source: str, renders: bool) -> None:
    assert ChatTemplate(source, BOS).renders_tools is renders


OPEN, EMPTY = "<|channel>thought\n", "<|channel>thought\n<channel|>"


@pytest.mark.parametrize(
    ("prompt", "reasoning", "content", "expected"),
    [
        ("p", "", "It ", "pIt "),
        ("p", "", "", "p"),
        ("p", "Hm", "", f"p{OPEN}Hm"),
        ("p", "Hm", "It", f"p{OPEN}Hm\n<channel|>It"),
        (f"p{EMPTY}", "", "It", f"p{EMPTY}It"),
        (f"p{EMPTY}", "Hm", "", f"p{OPEN}Hm"),
        (f"p{OPEN}", "", "It", f"p{EMPTY}It"),
        (f"p{OPEN}", "", "", f"p{OPEN}"),
        (f"p{OPEN}", "Hm", "It", f"p{OPEN}Hm\n<channel|>It"),
    ],
)
def test_an_answer_begun(prompt: str, reasoning: str, content: str, expected: str) -> None:
    assert continued(prompt, reasoning, content) == expected
