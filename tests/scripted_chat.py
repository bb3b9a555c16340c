"""A server whose model says what it is told to: the real app and tokenizer around a script."""

import asyncio
import functools
import threading
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from gemma4_chat import gemma4_backend, gemma4_tokenizer

from bezel.engine.checkpoint import Checkpoint
from bezel.engine.messages import EngineInfo, FinishReason, SequenceOutput
from bezel.engine.metrics import Metrics
from bezel.engine.sampling_params import SamplingParams
from bezel.server.app import create_app
from bezel.server.config import ServerConfig
from bezel.server.state import ServerState

STOPS = [1, 106, 50]  # <eos>, <turn|> and <|tool_response>
INFO = EngineInfo(
    max_model_len=8192,
    vocab_size=262_144,
    dtype="float32",
    device="cpu",
    num_parameters=1,
    eos_token_ids=STOPS,
    kv_cache_bytes=100_000,
    local_pages_total=1000,
    global_pages_total=500,
    local_page_bytes=100,
    global_page_bytes=200,
)


@dataclass
class ScriptedEngine:
    """Gives its `answers` in turn, a token every `pace_s`.

    The pieces of an answer are texts, with control tokens spelled out, events to wait for, and
    exceptions to raise. Instead of an answer there may be an exception, which refuses the request.
    """

    answers: list[Any] = field(default_factory=list)
    pace_s: float = 0.0
    is_ready: bool = True
    prompts: list[str] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    num_tokens: int = 0
    num_aborted: int = 0
    info: EngineInfo = INFO
    step_age_s: float = 0.0
    num_restarts: int = 0

    async def start(self) -> None:
        """Always started."""

    async def shutdown(self) -> None:
        """Nothing to end."""

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """Its generator isn't iterated any further."""

    async def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[SequenceOutput, None]:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        text = gemma4_tokenizer().decode(prompt_ids, skip_special_tokens=False)
        self.prompts.append(text)
        self.params.append(params)
        self.num_tokens = 0
        has_ended = False
        try:
            async for token_id in self._tokens(answer):
                self.num_tokens += 1
                has_ended = token_id in STOPS
                yield SequenceOutput(
                    request_id=request_id,
                    token_ids=[token_id],
                    finish_reason=FinishReason.STOP if has_ended else None,
                )
        finally:
            self.num_aborted += not has_ended

    async def _tokens(self, answer: Iterable[Any]) -> AsyncGenerator[int, None]:
        for piece in [answer] if isinstance(answer, str) else answer:
            if isinstance(piece, Exception):
                raise piece
            while isinstance(piece, threading.Event) and not piece.is_set():
                await asyncio.sleep(0.005)
            if isinstance(piece, str):
                for token_id in _ids(piece):
                    await asyncio.sleep(self.pace_s)
                    yield token_id
        yield STOPS[1]


@functools.cache
def _ids(text: str) -> list[int]:
    ids: list[int] = gemma4_backend().encode(text, add_special_tokens=False).ids
    return ids


def scripted_state(
    engine: ScriptedEngine, model: str = "gemma-4-E2B-it", **settings: Any
) -> ServerState:
    """A server's state with the engine behind it, from settings of the server."""
    state = ServerState(ServerConfig(**settings), Metrics())
    serve_script(state, engine, model)
    return state


def serve_script(state: ServerState, engine: ScriptedEngine, model: str = "gemma-4-E2B-it") -> None:
    """Be done with loading."""
    checkpoint = Checkpoint(Path(model), "safetensors", model, {}, {})
    state.set_model(engine, gemma4_tokenizer(), checkpoint)


def scripted_app(engine: ScriptedEngine, **settings: Any) -> FastAPI:
    """The app around such a state."""
    return create_app(scripted_state(engine, **settings))
