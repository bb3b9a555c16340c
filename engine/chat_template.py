"""Rendering chat templates, as the Jinja code in checkpoints expects it.

The environment is the one of `transformers.apply_chat_template`, without transformers: sandboxed,
block whitespace trimmed, `tojson` without HTML escapes, and `raise_exception` for messages a
template refuses. What Gemma's own templates get wrong is mended (`template_repair`). Checkpoints
without a template (base models, most GGUF files of them) get a plain one in Gemma's format.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from bezel.engine.errors import CheckpointError, InvalidRequest
from bezel.engine.template_repair import (
    NULL,
    TemplateTraits,
    marked_messages,
    marked_tools,
    repaired,
)

# What Jinja code raises on values it wasn't written for: the messages are at fault, not Bezel.
_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)

_TEXT_MACRO = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content | trim }}
{%- else -%}
{%- for part in content or [] if part.type == 'text' -%}{{ part.text | trim }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

# Gemma 3 has no turn for a system message: its text opens the next user turn.
PLAIN_GEMMA3_TEMPLATE = (
    _TEXT_MACRO
    + """\
{{- bos_token -}}
{%- set state = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role in ['system', 'developer'] -%}
{%- set state.system = state.system ~ text_of(message.content) ~ '\\n\\n' -%}
{%- else -%}
{%- set role = 'model' if message.role == 'assistant' else message.role -%}
{{- '<start_of_turn>' ~ role ~ '\\n' -}}
{%- if role == 'user' -%}{{- state.system -}}{%- set state.system = '' -%}{%- endif -%}
{{- text_of(message.content) ~ '<end_of_turn>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if state.system -%}
{{- '<start_of_turn>user\\n' ~ state.system | trim ~ '<end_of_turn>\\n' -}}
{%- endif -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
)

PLAIN_GEMMA4_TEMPLATE = (
    _TEXT_MACRO
    + """\
{{- bos_token -}}
{%- for message in messages -%}
{%- set roles = {'assistant': 'model', 'developer': 'system'} -%}
{{- '<|turn>' ~ roles.get(message.role, message.role) ~ '\\n' -}}
{{- text_of(message.content) ~ '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""
)


class ChatTemplate:
    """A compiled template.

    Raises:
        CheckpointError: the template isn't valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            environment = _environment()
            tree = _EndSearches().visit(environment.parse(source))
            self._template = environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template is broken in line {error.lineno}: {error.message}"
            ) from error
        self._special_tokens = dict(special_tokens)
        self._traits = TemplateTraits.of(
            lambda messages, tools: self._render(messages, tools, True, {})
        )

    @property
    def renders_tools(self) -> bool:
        """Whether it tells the model of tools."""
        return self._traits.renders_tools

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, Any],
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> str:
        """The prompt as text, control tokens spelled out.

        Raises:
            InvalidRequest: the template refuses the messages, or fails on them.
        """
        text = self._render(
            marked_messages(messages, self._traits),
            marked_tools(tools, self._traits),
            add_generation_prompt,
            template_kwargs,
        )
        return repaired(text, self._traits)

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, Any],
    ) -> str:
        values = {"documents": None, **self._special_tokens, **template_kwargs}
        values |= {
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(values)
        except _TEMPLATE_FAILURES as error:
            raise InvalidRequest(
                f"The model's chat template can't render these messages: {error}", param="messages"
            ) from error


class _EndSearches(NodeTransformer):
    """Makes loops that look for something end when they have found it.

    Jinja as such has no `break`, so Gemma's templates go on through all messages, for each message:

        {% for j in range(…) %}{% if not next.found %}…{% endif %}{% endfor %}
        {% for k in range(…) %}{% if scan.stopped %}{% elif … %}…{% endif %}{% endfor %}

    The text stays the same; a thousand messages take milliseconds and not seconds.
    """

    def visit_For(self, loop: nodes.For) -> nodes.For:
        self.generic_visit(loop)
        match loop.body:
            case [nodes.If(test=nodes.Not(node=flag), elif_=[], else_=[])]:
                self._end(loop, flag)
            case [nodes.If(test=flag, body=[])]:
                self._end(loop, flag)
        return loop

    def _end(self, loop: nodes.For, flag: nodes.Node) -> None:
        """Once the flag is up nothing happens any more, unless the loop itself lowers it."""
        if not isinstance(flag, nodes.Getattr) or not isinstance(flag.node, nodes.Name):
            return
        changing = {"loop"} | {name.name for name in _names(loop.target)}
        if flag.node.name not in changing:
            loop.body.append(nodes.If(flag, [nodes.Break()], [], [], lineno=flag.lineno))


def _names(target: nodes.Node) -> list[nodes.Name]:
    return [target] if isinstance(target, nodes.Name) else list(target.find_all(nodes.Name))


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks text for training; here it is just its text."""

    tags = {"generation"}  # noqa: RUF012 (declared by Jinja)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=_null_or_fail,
    )


def _null_or_fail(value: Any) -> None:
    if value is not NULL:
        raise TypeError(f"{type(value).__name__} can't be written as JSON")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
