"""Chat templates come with checkpoints: they may be anything, and reach nothing."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bezel.engine.chat_template import ChatTemplate
from bezel.engine.errors import CheckpointError, InvalidRequest

MESSAGES = [{"role": "user", "content": "hi"}]

# Known ways from a value to Python's internals; each would print what it found.
WAYS_OUT = {
    "attribute": "{{ ''.__class__.__mro__ }}",
    "item": "{{ ''['__class__']['__mro__'] }}",
    "filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "map": "{{ [''] | map(attribute='__class__') | list }}",
    "method": "{{ messages.__init__.__globals__ }}",
    "function": "{{ raise_exception.__globals__ }}",
    "clock": "{{ strftime_now.__globals__ }}",
    "builtin": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.environ }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "itself": "{{ self.__init__.__globals__ }}",
    "context": "{{ self._TemplateReference__context }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format_map": "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "generator": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m.__call__.__func__.__globals__ }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
}
CHANGES = {
    "append": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update({'role': 'system'}) }}",
    "clear": "{% set _ = messages[0].clear() %}",
    "pop": "{% do messages.pop() %}",
}


def render(source: str) -> str:
    return ChatTemplate(source, {}).render([dict(m) for m in MESSAGES], True, {})


@pytest.mark.parametrize("source", WAYS_OUT.values(), ids=WAYS_OUT)
def test_there_is_no_way_out(source: str) -> None:
    """It is refused, or there is nothing where it looks."""
    try:
        assert render(source) in ("", "[Undefined]")
    except InvalidRequest as error:
        assert re.search("unsafe|no loader", error.message), error.message


@pytest.mark.parametrize("source", CHANGES.values(), ids=CHANGES)
def test_messages_can_not_be_changed(source: str) -> None:
    messages: list[dict[str, Any]] = [dict(m) for m in MESSAGES]
    with pytest.raises((InvalidRequest, CheckpointError)):
        ChatTemplate(source, {}).render(messages, True, {})
    assert messages == MESSAGES


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(1000000000000) %}x{% endfor %}",
        "{{ range(1000000000) | list | length }}",
        "{{ range(0, 1000000000, 2) | sum }}",
    ],
)
def test_ranges_have_an_end(source: str) -> None:
    with pytest.raises(InvalidRequest, match="Range too big"):
        render(source)


def test_a_template_that_calls_itself_ends() -> None:
    with pytest.raises(InvalidRequest, match="recursion"):
        render("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")


def test_nothing_is_read_from_the_folder_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "secret.jinja").write_text("secret", encoding="utf-8")
    code = (
        "from bezel.engine.chat_template import ChatTemplate\n"
        "try: print(ChatTemplate('{% include \"secret.jinja\" %}', {}).render([], True, {}))\n"
        "except Exception as error: print('refused', type(error).__name__)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "refused InvalidRequest\n", done.stderr
