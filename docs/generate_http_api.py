"""Writes the generated parts of docs/http-api.md: `make docs`.

The page is written by hand but for what stands between `<!-- generated: … -->` and `<!-- end -->`.
Tables come from the schemas and from the OpenAPI document; what Bezel answers to a request is found
out by sending it to the app. A test fails while the page is older than the code.
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from bezel.engine.checkpoint import Checkpoint
from bezel.engine.errors import (
    EngineUnavailable,
    GrammarError,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
)
from bezel.engine.messages import EngineInfo, FinishReason, SequenceOutput
from bezel.engine.metrics import Metrics
from bezel.engine.sampling_params import SamplingParams
from bezel.server.app import create_app
from bezel.server.chat import Thinking
from bezel.server.config import ServerConfig
from bezel.server.control_tokens import ControlTokens
from bezel.server.errors import (
    DeadlineExceeded,
    GenerationFailed,
    ModelNotFound,
    ReaderTooSlow,
    ShuttingDown,
    TooManyConnections,
    problem_of,
)
from bezel.server.grammars.enforced_schema import FORMATS
from bezel.server.responses.prompt import REFUSED
from bezel.server.sampling import thinking_budget
from bezel.server.schemas import ChatCompletionRequest, ChatMessage, Effort
from bezel.server.state import ServerState
from bezel.server.unsupported import HARMLESS, NOT_YET

PAGE = Path(__file__).with_name("http-api.md")
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SCHEMAS = {
    "chat": ("ChatCompletionRequest", "CompletionRequest", True),
    "chat_only": ("ChatCompletionRequest", "CompletionRequest", False),
    "completions_only": ("CompletionRequest", "ChatCompletionRequest", False),
    "chat_message": ("ChatMessage", None, False),
    "stream_options": ("StreamOptions", None, False),
    "responses": ("ResponsesRequest", None, False),
    "messages": ("MessagesRequest", None, False),
    "tokenize": ("TokenizeRequest", None, False),
    "detokenize": ("DetokenizeRequest", None, False),
}
ERRORS: tuple[tuple[Exception, str], ...] = (
    (InvalidRequest("", "temperature"), "a field is wrong; `param` names it"),
    (InvalidRequest("", "audio", "unsupported_parameter"), "it asks for what isn't there"),
    (InvalidRequest("", "colour", "unknown_parameter"), "with `--unknown-params reject`"),
    (PromptTooLong(0, 0, 0), "prompt and output don't fit the context"),
    (GrammarError("", "response_format"), "what the output must be can't be enforced"),
    (HTTPException(400), "the body isn't UTF-8, or is nested too deeply"),
    (HTTPException(401), "the API key is missing or wrong"),
    (HTTPException(408), "the request didn't come within `--receive-timeout`"),
    (ModelNotFound("x"), "`model` is none of the served names"),
    (HTTPException(404), "there is no such route"),
    (HTTPException(405), "the route has other methods, which `Allow` names"),
    (HTTPException(413), "the body is larger than `--max-body-bytes`"),
    (Overloaded("", 1), "the queue is full; come back after `Retry-After` seconds"),
    (Overloaded("", 1, "rate_limit_exceeded"), "this API key's share of it is full"),
    (HTTPException(431), "URL and headers are larger than `--max-header-bytes`"),
    (ReaderTooSlow(), "only as an event: the stream was read too slowly"),
    (TooManyConnections(2000), "more connections than `--max-connections`"),
    (GenerationFailed(""), "the engine gave up on the answer"),
    (EngineUnavailable(""), "loading, restarting or shutting down; see `Retry-After`"),
    (ShuttingDown(), "it was shut down before the answer was done"),
    (DeadlineExceeded(1), "the answer took longer than `timeout` or `--request-timeout`"),
)
INTERNAL = ("500", "server_error", "internal_error", "api_error", "a mistake of the server's")

# What asks for each field that is refused, where that isn't a chat completion's `true`.
EXAMPLES: dict[str, Any] = {
    "allowed_token_ids": [1],
    "audio": {"voice": "alloy", "format": "mp3"},
    "bad_words": ["no"],
    "best_of": 2,
    "chat_template": "{{ messages }}",
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "guided_whitespace_pattern": " *",
    "length_penalty": 0.5,
    "mm_processor_kwargs": {"fps": 1},
    "modalities": ["text", "audio"],
    "prompt_embeds": "AAAA",
    "reasoning_effort": "low",
    "suffix": "the end",
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "top_logprobs": 2,
    "verbosity": "low",
    "web_search_options": {},
    "conversation": "conv_1",
    "max_tool_calls": 3,
    "previous_response_id": "resp_1",
    "prompt": {"id": "pmpt_1"},
}
ONLY_CHAT = ("reasoning_effort", "tool_choice", "tools", "top_logprobs")
# Fields of vLLM's, which OpenAI's API doesn't have.
NOT_OPENAI = frozenset(
    {
        *("allowed_token_ids", "bad_words", "chat_template", "guided_whitespace_pattern"),
        *("length_penalty", "mm_processor_kwargs", "prompt_embeds", "use_beam_search"),
    }
)
IMAGE = {"type": "image_url", "image_url": {"url": "data:…"}}
SOUND = {"type": "input_audio", "input_audio": {"data": "…", "format": "wav"}}
FILE = {"type": "file", "file": {"file_id": "file-1"}}
MORE_REFUSALS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((CHAT, {"messages": [{"role": "user", "content": [part]}]}) for part in (IMAGE, SOUND, FILE)),
    (CHAT, {"tools": [{"type": "custom", "custom": {"name": "f"}}]}),
    (CHAT, {"tool_choice": {"type": "allowed_tools"}}),
    (CHAT, {"logprobs": True, "top_logprobs": 21}),
    (CHAT, {"n": 129}),
    (RESPONSES, {"tools": [{"type": "web_search"}]}),
    (RESPONSES, {"input": [{"type": "item_reference", "id": "msg_1"}]}),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
    (RESPONSES, {"include": ["message.output_text.logprobs"]}),
    ("/v1/embeddings", {}),
    ("/v1/images/generations", {}),
    ("/v1/files", {}),
)
_TEXT, _LIST, _OBJECT = {"type": "string"}, {"type": "array"}, {"type": "object"}
_A = {"a": {"type": "integer"}}
# Of each keyword of JSON Schema, a schema that says something by it.
KEYWORDS: dict[str, Any] = {
    "type": {"type": ["integer", "null"]},
    "enum": {"enum": ["a", 1, None]},
    "const": {"const": "a"},
    "properties": _OBJECT | {"properties": _A},
    "required": _OBJECT | {"properties": _A, "required": ["a"]},
    "additionalProperties": _OBJECT | {"additionalProperties": {"type": "integer"}},
    "patternProperties": _OBJECT | {"patternProperties": {"^a": {"type": "integer"}}},
    "propertyNames": _OBJECT | {"propertyNames": {"maxLength": 3}},
    "minProperties": _OBJECT | {"minProperties": 2},
    "maxProperties": _OBJECT | {"maxProperties": 2},
    "dependentRequired": _OBJECT | {"dependentRequired": {"a": ["b"]}},
    "dependentSchemas": _OBJECT | {"dependentSchemas": {"a": {}}},
    "unevaluatedProperties": _OBJECT | {"unevaluatedProperties": False},
    "items": _LIST | {"items": {"type": "integer"}},
    "prefixItems": _LIST | {"prefixItems": [{"type": "integer"}]},
    "minItems": _LIST | {"minItems": 1},
    "maxItems": _LIST | {"maxItems": 3},
    "uniqueItems": _LIST | {"uniqueItems": True},
    "contains": _LIST | {"contains": {"const": 1}},
    "unevaluatedItems": _LIST | {"unevaluatedItems": False},
    "minLength": _TEXT | {"minLength": 1},
    "maxLength": _TEXT | {"maxLength": 9},
    "pattern": _TEXT | {"pattern": "^[a-z]+$"},
    "format": _TEXT | {"format": "date"},
    "contentSchema": _TEXT | {"contentSchema": {}},
    "minimum": {"type": "integer", "minimum": 0},
    "maximum": {"type": "integer", "maximum": 9},
    "exclusiveMinimum": {"type": "number", "exclusiveMinimum": 0},
    "exclusiveMaximum": {"type": "number", "exclusiveMaximum": 9},
    "multipleOf": {"type": "integer", "multipleOf": 5},
    "anyOf": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "null"}]},
    "allOf": {"allOf": [_OBJECT | {"properties": _A}]},
    "not": {"not": {"type": "integer"}},
    "if": {"if": {"type": "integer"}, "then": {"minimum": 0}},
    "$ref": {"$ref": "#/$defs/a", "$defs": _A},
    "$dynamicRef": {"$dynamicRef": "#a"},
    "nullable": {"type": "string", "nullable": True},
}


class IdleEngine:
    """Ends every answer at once."""

    is_ready, step_age_s, num_restarts = True, 0.0, 0
    info = EngineInfo(
        max_model_len=8192,
        vocab_size=1000,
        dtype="float32",
        device="cpu",
        num_parameters=1,
        eos_token_ids=[1],
        kv_cache_bytes=1,
        local_pages_total=1,
        global_pages_total=1,
        local_page_bytes=1,
        global_page_bytes=1,
    )

    async def start(self) -> None:
        """Always started."""

    async def shutdown(self) -> None:
        """Nothing to end."""

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """Its generator isn't iterated any further."""

    async def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[SequenceOutput, None]:
        yield SequenceOutput(request_id=request_id, token_ids=[1], finish_reason=FinishReason.STOP)


class NamesOnly:
    """A tokenizer of Gemma 4's control tokens; texts don't matter here."""

    bos_token_id = 2
    vocab_size = 1000
    renders_tools = True
    byte_token_ids: frozenset[int] = frozenset()

    def __init__(self) -> None:
        self._names: dict[str, int] = {}
        self.special_token_ids = frozenset(range(100))

    def token_id(self, text: str) -> int:
        return self._names.setdefault(text, len(self._names))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [2, 3]

    def render_chat(self, messages: Any, **_: Any) -> list[int]:
        return [2, 3]

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return "".join(f"<{i}>" for i in token_ids)


def ask(app: FastAPI, path: str, fields: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and body of what the app answers to a POST."""
    body: dict[str, Any] = {"model": "gemma"}
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": "Hi"}]
    else:
        body["input" if path == RESPONSES else "prompt"] = "Hi"
    content = json.dumps(body | fields).encode()
    messages: list[Any] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }

    async def send(message: Any) -> None:
        messages.append(message)

    async def call() -> None:
        incoming: asyncio.Queue[Any] = asyncio.Queue()
        incoming.put_nowait({"type": "http.request", "body": content})
        await app(scope, incoming.get, send)

    asyncio.run(call())
    return messages[0]["status"], json.loads(messages[1]["body"])


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    lines = [names, ["---"] * len(names), *rows]
    return "".join("| " + " | ".join(c.replace("|", r"\|") for c in row) + " |\n" for row in lines)


def code(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"`{text}`"


def routes(document: dict[str, Any]) -> Iterator[list[str]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            kinds = operation["responses"].get("200", {}).get("content", {})
            purpose = operation["description"].split("\n")[0]
            yield [code(f"{method.upper()} {path}"), purpose, ", ".join(kinds) or "404"]


def errors() -> Iterator[list[str]]:
    for error, when in ERRORS:
        problem = problem_of(error)
        anthropic = problem.as_object("/v1/messages")["error"]["type"]
        name = code(problem.code) if problem.code else "null"
        yield [str(problem.status), code(problem.type), name, code(anthropic), when]
    status, *names, when = INTERNAL
    yield [status, *map(code, names), when]


def parameters(document: dict[str, Any], name: str) -> Iterator[list[str]]:
    """Of a schema; without those of another schema, or only those that both have."""
    schema, other, wants_common = SCHEMAS[name]
    components = document["components"]["schemas"]
    rest = components[other]["properties"] if other else {}
    required = components[schema].get("required", ())
    for field, spec in components[schema]["properties"].items():
        is_common = spec.get("description") == rest.get(field, {}).get("description", "")
        if is_common == wants_common:
            kind = type_of(spec) + (", required" if field in required else "")
            yield [code(field), kind, spec["description"]]


def type_of(spec: dict[str, Any]) -> str:
    if "$ref" in spec:
        return "object"
    if "enum" in spec or "const" in spec:
        return ", ".join(code(value) for value in spec.get("enum", [spec.get("const")]))
    if variants := spec.get("anyOf", spec.get("oneOf")):
        kinds = [type_of(item) for item in variants if item.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if spec.get("type") == "array":
        return f"list of {_plural(type_of(spec['items']))}"
    return str(spec.get("type", "anything"))


def _plural(kind: str) -> str:
    if kind == "anything":
        return kind
    return kind.replace("list", "lists", 1) if kind.startswith("list ") else f"{kind}s"


def efforts() -> Iterator[list[str]]:
    control = ControlTokens.of(NamesOnly())
    for effort in get_args(Effort):
        chat = ChatCompletionRequest(
            model="gemma",
            messages=[ChatMessage(role="user", content="Hi")],
            reasoning_effort=effort,
        )
        if effort == "none":
            yield [code(effort), "no", ""]
        else:
            budget = thinking_budget(chat, control, Thinking.ON)
            limit = f"{budget.num_tokens:,} tokens" if budget else "no limit"
            yield [code(effort), "yes", limit]


def refusals(app: FastAPI) -> Iterator[list[str]]:
    asked = [(CHAT if name not in ONLY_CHAT else COMPLETIONS, name) for name in NOT_YET]
    asked += [(RESPONSES, name) for name in REFUSED if name != "n"]  # which nobody has there
    bodies = [(path, {name: EXAMPLES.get(name, True)}) for path, name in asked]
    for path, fields in [*bodies, *MORE_REFUSALS]:
        status, answer = ask(app, path, fields)
        assert status >= 400, f"{path} takes {fields}"
        error = answer["error"]
        origin = "vLLM" if fields.keys() & NOT_OPENAI else "OpenAI"
        name = f" {code(error['code'])}" if error["code"] else ""
        asked_for = f"{code(path)} {code(fields)}" if fields else code(path)
        yield [origin, asked_for, f"{status}{name}", error["message"]]


def keywords(app: FastAPI) -> Iterator[list[str]]:
    for name, schema in KEYWORDS.items():
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        status, answer = ask(app, CHAT, {"response_format": form})
        verdict = "yes" if status == 200 else answer["error"]["message"]
        yield [code(name), code(schema), verdict]


def parts() -> dict[str, str]:
    """The generated parts of the page, by their names."""
    state = ServerState(ServerConfig(), Metrics())
    checkpoint = Checkpoint(Path("gemma"), "safetensors", "gemma", {}, {})
    model = state.set_model(IdleEngine(), NamesOnly(), checkpoint)
    app = create_app(state)
    document = app.openapi()
    try:
        refused = table(["Who has it", "Asked for", "Status", "Message"], refusals(app))
        schema = table(["Keyword", "Such as", "Enforced"], keywords(app))
    finally:
        model.grammars.close()
    fields = {
        name: table(["Field", "Type", "Meaning"], parameters(document, name)) for name in SCHEMAS
    }
    return fields | {
        "routes": table(["Route", "What it does", "Answers"], routes(document)),
        "errors": table(["Status", "`type`", "`code`", "Anthropic's", "When"], errors()),
        "refusals": refused,
        "keywords": schema,
        "formats": ", ".join(code(name) for name in FORMATS) + ".\n",
        "efforts": table(["`reasoning_effort`", "Thinks", "At most"], efforts()),
        "harmless": ", ".join(code(name) for name in sorted(HARMLESS)) + ".\n",
    }


def render(page: str) -> str:
    """The page with its generated parts made anew.

    Raises:
        KeyError: the page wants a part that there isn't.
    """
    made = parts()
    return PART.sub(lambda found: f"{found[1]}\n{made[found[2]]}\n{found[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
