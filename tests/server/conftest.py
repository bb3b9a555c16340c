"""A scripted engine, a byte-level tokenizer, and the app around them.

Nothing here waits for time to pass: engine and client are driven by events.
"""

import asyncio
import json
import math
import os
import re
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI

from bezel.engine.checkpoint import Checkpoint
from bezel.engine.errors import InvalidRequest
from bezel.engine.messages import (
    AddSequence,
    EngineInfo,
    FailureCause,
    FinishReason,
    SequenceOutput,
    TokenLogprobs,
)
from bezel.engine.metrics import Metrics
from bezel.engine.sampling_params import SamplingParams
from bezel.server.app import create_app
from bezel.server.config import ServerConfig
from bezel.server.state import ServerState

BOS, EOS = 256, 257
SPECIAL = {BOS: "<bos>", EOS: "<eos>"}
# Gemma 4's, after the bytes.
CONTROL = dict(
    enumerate(
        (
            *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<|turn>"),
            *("<turn|>", "<|tool>", "<tool|>", "<|tool_response>", "<tool_response|>", "<|think|>"),
        ),
        start=258,
    )
)


class ByteTokenizer:
    """Token ids are bytes; those of ASCII are characters, the others parts of characters.

    With `control` there are Gemma 4's control tokens too.
    """

    bos_token_id = BOS
    byte_tokens: Mapping[int, int] = {byte: byte for byte in range(128, 256)}
    byte_token_ids = frozenset(byte_tokens)

    def __init__(self, control: Mapping[int, str] = MappingProxyType({})) -> None:
        self._special = SPECIAL | dict(control)
        self.vocab_size = 256 + len(self._special)
        self.special_token_ids = frozenset(self._special)
        self.renders_tools = bool(control)
        self.template_kwargs: Mapping[str, Any] | None = None

    def token_id(self, text: str) -> int | None:
        return next((i for i, name in self._special.items() if name == text), None)

    def ids(self, text: str) -> list[int]:
        """The tokens of an output in which control tokens are spelled out."""
        ids: list[int] = []
        names = "|".join(map(re.escape, self._special.values()))
        for piece in re.split(f"({names})", text):
            token_id = self.token_id(piece)
            ids += list(piece.encode()) if token_id is None else [token_id]
        return ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            ids = list(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest("The text isn't valid Unicode.") from error
        return [BOS, *ids] if add_special_tokens else ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        pieces = [
            bytes([i]) if i < 256 else b"" if skip_special_tokens else self._special[i].encode()
            for i in token_ids
        ]
        return b"".join(pieces).decode(errors="replace")

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        self.template_kwargs = template_kwargs
        if messages[0]["role"] == "assistant":
            raise InvalidRequest("The assistant can't begin.", param="messages")
        text = "".join(f"{message['role']}:{message['content']}\n" for message in messages)
        return self.encode(text + "assistant:" * add_generation_prompt)


def entry(token_id: int, num_top: int, num_tokens: int = 256) -> TokenLogprobs:
    """Log-probabilities as the fake engine tells them; those of "~" can't be told in JSON."""
    tops = [(token_id + i) % num_tokens for i in range(num_top)]
    logprob = -math.inf if token_id == ord("~") else -token_id / 64
    return TokenLogprobs(logprob, tops, [logprob - i for i in range(num_top)])


@dataclass
class FakeEngine:
    """Plays a script for every sequence, and notes how each of them ended.

    A script is a list of token ids to output together, events to wait for, exceptions to raise
    and reasons to finish with, alone or together with the last token ids, or the cause of a
    failure. `scripts` are those of the first sequences, and `cached_tokens` what they find in the
    prefix cache.
    """

    info: EngineInfo
    script: list[Any] = field(default_factory=list)
    scripts: list[list[Any]] = field(default_factory=list)
    scripts_by_prompt: dict[tuple[int, ...], list[Any]] = field(default_factory=dict)
    refusal: Exception | None = None
    is_ready: bool = True
    step_age_s: float = 0.0
    num_restarts: int = 0
    cached_tokens: list[int] = field(default_factory=list)
    requests: list[tuple[list[int], SamplingParams]] = field(default_factory=list)
    request_ids: list[str] = field(default_factory=list)
    ended: dict[str, FinishReason] = field(default_factory=dict)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    on_abort: Callable[[], None] = lambda: None

    def say(self, text: str, reason: FinishReason = FinishReason.STOP, chunk: int = 1) -> None:
        """Make the answer of every sequence this text, some tokens at a time."""
        ids = list(text.encode())
        self.script = [ids[i : i + chunk] for i in range(0, len(ids), chunk)] + [reason]

    async def start(self) -> None:
        """Always started."""

    async def shutdown(self) -> None:
        """Nothing to end."""

    async def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[SequenceOutput, None]:
        if self.refusal is not None:
            raise self.refusal
        # What can't be sent to another process must not get this far.
        sent = msgspec.msgpack.encode(AddSequence(request_id, prompt_ids, params))
        assert msgspec.msgpack.decode(sent, type=AddSequence).params == params
        self.requests.append((prompt_ids, params))
        self.request_ids.append(request_id)
        self.begun.set()
        script = self.scripts_by_prompt.get(tuple(prompt_ids), self.script)
        if len(self.requests) <= len(self.scripts):
            script = self.scripts[len(self.requests) - 1]
        num_cached = self.cached_tokens.pop(0) if self.cached_tokens else 0
        try:
            for output in self._prompt_logprobs(request_id, prompt_ids, params):
                yield output
            for item in script:
                if isinstance(item, asyncio.Event):
                    await item.wait()
                    continue
                await asyncio.sleep(0)
                if isinstance(item, Exception):
                    raise item
                # A stop comes with the token that caused it.
                if item is FinishReason.STOP:
                    item = ([EOS], item)
                failure = item if isinstance(item, FailureCause) else None
                if failure is not None:
                    item = FinishReason.ERROR
                ids, reason = item if isinstance(item, tuple) else (item, None)
                if isinstance(item, FinishReason):
                    ids, reason = [], item
                if reason is not None:
                    self.ended[request_id] = reason
                num_top = params.logprobs
                yield SequenceOutput(
                    request_id=request_id,
                    token_ids=ids,
                    finish_reason=reason,
                    failure=failure,
                    logprobs=[] if num_top is None else [entry(i, num_top) for i in ids],
                    num_cached_tokens=num_cached,
                )
                num_cached = 0
        finally:
            if self.ended.setdefault(request_id, FinishReason.ABORT) is FinishReason.ABORT:
                self.on_abort()

    def _prompt_logprobs(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams
    ) -> Iterator[SequenceOutput]:
        """In pieces of three, as the chunks of a long prompt would bring them."""
        if params.prompt_logprobs is None:
            return
        entries = [entry(token_id, params.prompt_logprobs) for token_id in prompt_ids[1:]]
        for i in range(0, len(entries), 3):
            yield SequenceOutput(
                request_id=request_id, token_ids=[], prompt_logprobs=entries[i : i + 3]
            )

    def finish(self, request_id: str, reason: FinishReason) -> None:
        self.ended[request_id] = reason


class FakeGrammars:
    """Takes every grammar, or none."""

    def __init__(self) -> None:
        self.checked: list[str] = []
        self.refuses = False

    async def check(self, grammar: str) -> None:
        if self.refuses:
            raise InvalidRequest("The grammar is too large.")
        self.checked.append(grammar)


class Connection:
    """One HTTP request, spoken to the app directly as ASGI messages."""

    def __init__(
        self,
        app: FastAPI,
        path: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        body_parts: Sequence[bytes] | None = None,
    ) -> None:
        parts = [json.dumps(body).encode()] if body_parts is None else body_parts
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._outgoing: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for number, part in enumerate(parts, start=1):
            more = number < len(parts)
            self._incoming.put_nowait({"type": "http.request", "body": part, "more_body": more})
        fields = {"content-type": "application/json"} | dict(headers or {})
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in fields.items()],
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }
        self.task = asyncio.create_task(app(scope, self._incoming.get, self._outgoing.put))

    async def next(self) -> dict[str, Any]:
        """The next message of the app."""
        return await self._outgoing.get()

    async def status(self) -> int:
        """The status, once the response has started."""
        status: int = (await self.next())["status"]
        return status

    async def response(self) -> tuple[int, dict[str, Any]]:
        """Status and JSON body of a response that isn't streamed."""
        status = await self.status()
        return status, json.loads((await self.next())["body"])

    def disconnect(self) -> None:
        """Go away."""
        self._incoming.put_nowait({"type": "http.disconnect"})


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("BEZEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _patience() -> Iterator[None]:
    """A test that waits for what never comes fails, and shows where it waited."""

    def give_up(*_: Any) -> None:
        raise TimeoutError("the test hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def grammars(monkeypatch: pytest.MonkeyPatch) -> FakeGrammars:
    """In place of the checker, which would need a real vocabulary."""
    fake = FakeGrammars()
    monkeypatch.setattr("bezel.server.state.GrammarChecker", lambda *_: fake)
    return fake


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def info() -> EngineInfo:
    return EngineInfo(
        max_model_len=100,
        vocab_size=258,
        dtype="float32",
        device="cpu",
        num_parameters=1_000_000,
        eos_token_ids=[EOS],
        kv_cache_bytes=1000,
        local_pages_total=10,
        global_pages_total=5,
        local_page_bytes=100,
        global_page_bytes=200,
    )


@pytest.fixture(scope="session")
def new_engine(info: EngineInfo) -> Callable[[], FakeEngine]:
    """Make a further engine, for those who need more than one."""
    return lambda: FakeEngine(info)


@pytest.fixture
def engine(new_engine: Callable[[], FakeEngine]) -> FakeEngine:
    return new_engine()


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def gemma4_tokenizer() -> ByteTokenizer:
    """One with the control tokens of thoughts and tools."""
    return ByteTokenizer(CONTROL)


@pytest.fixture
def gemma4_app(engine: FakeEngine, gemma4_tokenizer: ByteTokenizer, new_app: Any) -> FastAPI:
    """An app whose model thinks and calls tools."""
    stops = [EOS, *map(gemma4_tokenizer.token_id, ("<turn|>", "<|tool_response>"))]
    engine.info = msgspec.structs.replace(
        engine.info, vocab_size=gemma4_tokenizer.vocab_size, eos_token_ids=stops
    )
    app: FastAPI = new_app(engine, gemma4_tokenizer)
    return app


@pytest.fixture
async def gemma4_client(gemma4_app: FastAPI, client_for: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with client_for(gemma4_app) as client:
        yield client


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return Checkpoint(Path("tiny"), "safetensors", "tiny", {}, {})


@pytest.fixture
def make_state(
    engine: FakeEngine, tokenizer: ByteTokenizer, checkpoint: Checkpoint
) -> Callable[..., ServerState]:
    """A state with the model loaded, from settings of the server."""

    def make(**settings: Any) -> ServerState:
        state = ServerState(ServerConfig(**settings), Metrics())
        state.set_model(engine, tokenizer, checkpoint)
        return state

    return make


@pytest.fixture
def state(make_state: Callable[..., ServerState]) -> ServerState:
    return make_state()


@pytest.fixture
def app(state: ServerState) -> FastAPI:
    return create_app(state)


@pytest.fixture(scope="session")
def new_app(checkpoint: Checkpoint) -> Callable[..., FastAPI]:
    """Make a further app, around an engine."""

    def make(engine: FakeEngine, tokenizer: ByteTokenizer | None = None) -> FastAPI:
        state = ServerState(ServerConfig(), Metrics())
        state.set_model(engine, tokenizer or ByteTokenizer(), checkpoint)
        return create_app(state)

    return make


@pytest.fixture
def connect(app: FastAPI) -> Callable[..., Connection]:
    """Open a connection to the app."""

    def open_connection(path: str, body: Mapping[str, Any] | None = None, **more: Any) -> Any:
        return Connection(more.pop("app", app), path, body, **more)

    return open_connection


@pytest.fixture(scope="session")
def client_for() -> Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]:
    """A client of an app; it sees a response only when it is complete."""

    @asynccontextmanager
    async def open_client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client

    return open_client


@pytest.fixture
async def client(app: FastAPI, client_for: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with client_for(app) as client:
        yield client


@pytest.fixture
def chat() -> Callable[..., dict[str, Any]]:
    """The body of a chat request."""

    def body(**fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": "hi"}]
        return {"model": "tiny", "messages": messages} | fields

    return body


@pytest.fixture
def completion() -> Callable[..., dict[str, Any]]:
    """The body of a completion request."""

    def body(**fields: Any) -> dict[str, Any]:
        return {"model": "tiny", "prompt": "hi"} | fields

    return body


@pytest.fixture(scope="session")
def events_of() -> Callable[[str], list[Any]]:
    """The data of each event of a stream; JSON is parsed."""

    def parse(text: str) -> list[Any]:
        assert text.endswith("\n\n")
        blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
        data = [block.removeprefix("data: ") for block in blocks]
        return [item if item == "[DONE]" else json.loads(item) for item in data]

    return parse


@pytest.fixture
def say(engine: Any, gemma4_tokenizer: Any) -> Callable[..., None]:
    """Make the engine output tokens; the last of them ends the sequence, if it is to stop."""

    def script(text: str, reason: FinishReason = FinishReason.STOP) -> None:
        *ids, last = gemma4_tokenizer.ids(text)
        engine.script = [*([i] for i in ids), ([last], reason)]

    return script
