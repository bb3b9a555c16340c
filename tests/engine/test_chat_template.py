"""The Jinja environment, and the plain templates for checkpoints that bring none."""

import re
from typing import Any

import pytest

from bezel.engine.chat_template import (
    PLAIN_GEMMA3_TEMPLATE,
    PLAIN_GEMMA4_TEMPLATE,
    ChatTemplate,
)
from bezel.engine.errors import CheckpointError, InvalidRequest

BOS = {"bos_token": "<bos>"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi\n"},
    {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]},
    {"role": "user", "content": "Bye"},
]


def render(source: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    return ChatTemplate(source, BOS).render(messages, True, kwargs)


def test_plain_gemma3_template() -> None:
    assert render(PLAIN_GEMMA3_TEMPLATE, CHAT) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
        "<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    )


def test_plain_gemma3_template_keeps_a_system_message_without_a_user() -> None:
    assert render(PLAIN_GEMMA3_TEMPLATE, CHAT[:1]) == (
        "<bos><start_of_turn>user\nBe brief.<end_of_turn>\n<start_of_turn>model\n"
    )


def test_plain_gemma4_template() -> None:
    assert render(PLAIN_GEMMA4_TEMPLATE, CHAT) == (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n"
        "<|turn>model\nHello.<turn|>\n<|turn>user\nBye<turn|>\n<|turn>model\n"
    )


@pytest.mark.parametrize("source", [PLAIN_GEMMA3_TEMPLATE, PLAIN_GEMMA4_TEMPLATE])
def test_plain_templates_end_without_a_generation_prompt(source: str) -> None:
    text = ChatTemplate(source, BOS).render(CHAT, False, {})
    assert re.search(r"Bye<(end_of_turn|turn\|)>\n\Z", text)


def test_the_environment_is_that_of_transformers() -> None:
    source = """\
{% set box = namespace(n=0) %}
{% for m in messages %}
    {% if loop.index > 2 %}{% break %}{% endif %}
    {%- set box.n = box.n + 1 %}
{{ m | tojson }}
{% endfor %}
{{ strftime_now("%Y") | length }} {{ box.n }} {{ tools }} {{ mood }}"""
    messages = [{"a": "<&'日"}, {"b": 1}, {"c": 2}]
    assert render(source, messages, mood="up") == """{"a": "<&'日"}\n{"b": 1}\n4 2 None up"""


def test_marks_for_training_leave_their_text() -> None:
    source = "a{% generation %}{{ messages[0].content }}{% endgeneration %}b"
    assert render(source, [{"content": "x"}]) == "axb"


SEARCHES = {
    "not found": (
        "{% if not ns.found %}{% if n == 3 %}{% set ns.found = true %}{% endif %}{% endif %}"
    ),
    "stopped": "{% if ns.found %}{% elif n == 3 %}{% set ns.found = true %}{% endif %}",
}


@pytest.mark.parametrize("body", SEARCHES.values(), ids=SEARCHES)
def test_searches_end_with_what_they_find(body: str) -> None:
    numbers = iter(range(9))
    source = "{% set ns = namespace(found=false) %}{% for n in numbers %}" + body + "{% endfor %}"
    assert render(source + "{{ ns.found }}", CHAT, numbers=numbers) == "True"
    assert next(numbers) == 4


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("{% if not m.content is string %}{% else %}{{ m.role }},{% endif %}", "system,user,user,"),
        ("{% if not m.hidden %}{{ m.role }},{% endif %}", "system,assistant,user,"),
        ("{% if not loop.first %}{{ m.role }},{% endif %}", "user,assistant,user,"),
        ("{% if loop.first %}{% else %}{{ m.role }},{% endif %}", "user,assistant,user,"),
        ("{% if not ns.stop %}{{ m.role }}{% else %}-{% endif %}", "----"),
        ("{% if not ns.stop %}{{ m.role }}{% endif %}+", "++++"),
        ("{% if ns.stop %}-{% endif %}", "----"),
    ],
)
def test_other_loops_go_to_their_end(body: str, expected: str) -> None:
    messages = [dict(message, hidden=i == 1) for i, message in enumerate(CHAT)]
    source = "{% set ns = namespace(stop=true) %}{% for m in messages %}" + body + "{% endfor %}"
    assert render(source, messages) == expected


def test_bottomless_values_are_the_requests_fault() -> None:
    value: list[Any] = []
    for _ in range(1000):
        value = [value]
    source = """\
{%- macro show(x) %}{% if x %}({{ show(x[0]) }}){% endif %}{% endmacro %}{{ show(deep) }}"""
    with pytest.raises(InvalidRequest, match="recursion"):
        render(source, CHAT, deep=value)


def test_messages_cannot_be_overridden() -> None:
    template = ChatTemplate("{{ messages | length }} {{ add_generation_prompt }} {{ tools }}", BOS)
    ours = {"messages": [], "add_generation_prompt": 0, "tools": [1]}
    assert template.render(CHAT, True, ours) == "4 True None"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].role }}", "has no element 9"),
        ("{{ 'x' + messages[0].content }}", "can only concatenate str"),
        ("{{ messages[0].content | int // 0 }}", "by zero"),
    ],
)
def test_what_a_template_makes_of_bad_messages_is_the_requests_fault(
    source: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        render(source, [{"role": "user", "content": None}])
    assert caught.value.param == "messages"


def test_templates_are_sandboxed() -> None:
    with pytest.raises(InvalidRequest, match="unsafe"):
        render("{{ messages.__class__.__mro__ }}", CHAT)
    with pytest.raises(InvalidRequest, match=r"not safely callable|unsafe"):
        render("{{ messages.append(1) }}", CHAT)


def test_a_broken_template_stops_the_start() -> None:
    with pytest.raises(CheckpointError, match="broken in line 2"):
        ChatTemplate("fine\n{% if %}", BOS)
