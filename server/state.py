"""What the routes share: the served model once it is loaded, and the generations in flight.

    loading ──set_model──▶ ready ──SIGTERM──▶ leaving ──shutdown_grace──▶ draining

Everything here belongs to the event loop's thread.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request

from bezel.engine.checkpoint import Checkpoint
from bezel.engine.errors import BezelError, EngineUnavailable
from bezel.engine.metrics import Metrics
from bezel.engine.tokenizer import Tokenizer
from bezel.server.admission import Admission
from bezel.server.auth import read_api_keys
from bezel.server.config import ServerConfig
from bezel.server.control_tokens import ControlTokens
from bezel.server.engine_handle import EngineHandle
from bezel.server.errors import ModelNotFound, ShuttingDown
from bezel.server.grammars.checker import GrammarChecker
from bezel.server.tracing import open_tracing


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model with everything needed to serve it.

    `control` is None for models whose answers are text alone: they neither think nor call tools.
    """

    engine: EngineHandle
    tokenizer: Tokenizer
    control: ControlTokens | None
    template_kwargs: Mapping[str, Any]
    grammars: GrammarChecker
    checkpoint: Checkpoint
    names: tuple[str, ...]
    created: int


class Failable(Protocol):
    """Something in flight that can be ended with an error."""

    def fail(self, error: BezelError) -> None: ...


class InFlight:
    """The generations that clients are waiting for."""

    def __init__(self) -> None:
        self._members: set[Failable] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def member(self, generation: Failable) -> Iterator[None]:
        """Count a generation for as long as the block runs."""
        self._members.add(generation)
        self._empty.clear()
        try:
            yield
        finally:
            self._members.discard(generation)
            if not self._members:
                self._empty.set()

    async def wait_empty(self, timeout_s: float) -> None:
        """Wait until nothing is in flight.

        Raises:
            TimeoutError: after `timeout_s`.
        """
        async with asyncio.timeout(timeout_s):
            await self._empty.wait()

    def fail_all(self, error: BezelError) -> int:
        """End all of them with an error; returns how many there were."""
        for generation in self._members:
            generation.fail(error)
        return len(self._members)


class ServerState:
    """The one object behind all routes.

    A server that `is_leaving` says that it isn't ready, and still takes requests until it
    `is_draining`.

    Raises:
        ConfigError: the file with API keys can't be used.
    """

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self.config = config
        self.metrics = metrics
        self.model: ServedModel | None = None
        self.is_leaving = False
        self.is_draining = False
        self.api_keys = read_api_keys(config)
        self.admission = Admission(config, len(self.api_keys) > 1, metrics.observe_rejection)
        self.in_flight = InFlight()
        self.reported_fields: set[str] = set()
        self.tracing = open_tracing(config.otlp_traces_endpoint)

    def set_model(
        self, engine: EngineHandle, tokenizer: Tokenizer, checkpoint: Checkpoint
    ) -> ServedModel:
        """Begin to serve a model whose engine has started."""
        names = self.config.served_model_name or (checkpoint.name,)
        self.metrics.set_model(names[0], engine.info)
        self.model = ServedModel(
            engine=engine,
            tokenizer=tokenizer,
            control=ControlTokens.of(tokenizer),
            template_kwargs=self.config.default_chat_template_kwargs or {},
            grammars=GrammarChecker(tokenizer),
            checkpoint=checkpoint,
            names=names,
            created=int(time.time()),
        )
        return self.model

    def require_model(self, name: str) -> ServedModel:
        """The model, if it can generate now and goes by this name.

        Raises:
            EngineUnavailable: it can't generate now.
            ModelNotFound: it isn't called so.
        """
        self.require_serving()
        return self.loaded_model(name)

    def why_not_ready(self) -> EngineUnavailable | None:
        """Why requests should go elsewhere; None if they should come here."""
        return ShuttingDown() if self.is_leaving else self._why_not_serving()

    def _why_not_serving(self) -> EngineUnavailable | None:
        if self.is_draining:
            return ShuttingDown()
        if self.model is None:
            return EngineUnavailable("The model is still loading.")
        if not self.model.engine.is_ready:
            return EngineUnavailable("The engine is not running; it is being restarted.")
        return None

    def require_ready(self) -> None:
        """Tell those who ask whether to send requests here.

        Raises:
            EngineUnavailable: nothing can be generated now, or soon nothing can be.
        """
        if error := self.why_not_ready():
            raise error

    def require_serving(self) -> None:
        """Refuse what comes too early or too late.

        Raises:
            EngineUnavailable: nothing can be generated now.
        """
        if error := self._why_not_serving():
            raise error

    def loaded_model(self, name: str | None = None) -> ServedModel:
        """The model, even if it can't generate now.

        Raises:
            EngineUnavailable: it isn't loaded yet.
            ModelNotFound: it isn't called so.
        """
        if self.model is None:
            raise EngineUnavailable("The model is still loading.")
        if name is not None and name not in self.model.names:
            raise ModelNotFound(name)
        return self.model


def state_of(request: Request) -> ServerState:
    """The state of the app that a request came to."""
    state: ServerState = request.app.state.server
    return state
