"""The ASGI app: routes, error handlers, middleware.

It can serve from the first moment: until `ServerState.set_model` is called, and again while
draining, `/ready` and the generating routes say 503 and why. It starts and ends nothing.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from bezel.engine.errors import BezelError, EngineUnavailable
from bezel.engine.logs import num_dropped_lines
from bezel.engine.metric_families import Process
from bezel.server.admission import AdmissionGate
from bezel.server.anthropic.routes import count_tokens, create_message
from bezel.server.auth import ApiKey
from bezel.server.completions import create_chat_completion, create_completion
from bezel.server.config import ServerConfig
from bezel.server.connection import ConnectionRefusals
from bezel.server.deadlines import RequestTimeout
from bezel.server.errors import ClientDisconnected, handle_error, json_response
from bezel.server.middleware import BodyLimit, RequestContext
from bezel.server.openapi import (
    ANTHROPIC_PLAIN,
    ANTHROPIC_STREAMED,
    NOT_THERE,
    PLAIN,
    STREAMED,
    TEXT,
)
from bezel.server.page.routes import chat_page
from bezel.server.responses.routes import create_response
from bezel.server.state import ServedModel, ServerState, state_of
from bezel.server.tokenization import detokenize, tokenize
from bezel.server.version import VERSION

_GENERATING: Mapping[str, tuple[Callable[..., Any], Any]] = MappingProxyType(
    {
        "/v1/chat/completions": (create_chat_completion, STREAMED),
        "/v1/completions": (create_completion, STREAMED),
        "/v1/responses": (create_response, STREAMED),
        "/v1/messages": (create_message, ANTHROPIC_STREAMED),
    }
)


def create_app(state: ServerState) -> FastAPI:
    """Build the app around its state."""
    app = FastAPI(
        title="Bezel",
        version=VERSION,
        redirect_slashes=False,
        middleware=[
            Middleware(
                RequestContext,
                metrics=state.metrics,
                tracing=state.tracing,
                logs_requests=state.config.enable_log_requests,
            ),
            *_cors(state.config),
            Middleware(ConnectionRefusals),
            Middleware(ApiKey, keys=state.api_keys),
            Middleware(RequestTimeout),
            Middleware(AdmissionGate, admission=state.admission, paths=frozenset(_GENERATING)),
            Middleware(BodyLimit, max_bytes=state.config.max_body_bytes),
        ],
    )
    app.state.server = state
    for error in (BezelError, ClientDisconnected, HTTPException, RequestValidationError):
        app.add_exception_handler(error, handle_error)
    post = partial(app.add_api_route, methods=["POST"])
    for path, (endpoint, responses) in _GENERATING.items():
        post(path, endpoint, responses=responses)
    post("/v1/messages/count_tokens", count_tokens, responses=ANTHROPIC_PLAIN)
    post("/tokenize", tokenize, responses=PLAIN)
    post("/detokenize", detokenize, responses=PLAIN)
    post("/v1/embeddings", refuse_embeddings, status_code=404, responses=NOT_THERE)
    get = partial(app.add_api_route, methods=["GET"], responses=PLAIN)
    get("/v1/models", list_models)
    get("/v1/models/{model_id:path}", show_model)
    get("/health", health)
    get("/ready", ready)
    get("/metrics", metrics, response_class=Response, responses=TEXT)
    get("/version", version)
    if state.config.webui:
        app.add_api_route("/", chat_page(), methods=["GET"], include_in_schema=False)
    return app


def _cors(config: ServerConfig) -> list[Middleware]:
    """Off unless origins are named. Outside the check of keys: browsers ask first without one."""
    if not config.allowed_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_credentials=config.allow_credentials,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "x-ignored-params"],
        )
    ]


async def list_models(request: Request) -> Response:
    """The names that requests may put in `model`."""
    model = state_of(request).loaded_model()
    cards = [_model_card(name, model) for name in model.names]
    return json_response({"object": "list", "data": cards})


async def show_model(model_id: str, request: Request) -> Response:
    """One of those names."""
    model = state_of(request).loaded_model(model_id)
    return json_response(_model_card(model_id, model))


def _model_card(name: str, model: ServedModel) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "bezel",
        "root": model.checkpoint.name,
        "max_model_len": model.engine.info.max_model_len,
    }


async def refuse_embeddings(request: Request) -> Response:
    """There are none to be had: a causal model's hidden states weren't trained to be compared."""
    raise HTTPException(
        404, "This server generates text. For embeddings use an embedding model, such as Gemma's."
    )


async def health(request: Request) -> Response:
    """Whether the process is worth keeping: 503 if the engine has stopped making progress, or
    can't be started again."""
    state = state_of(request)
    age_s = state.model.engine.step_age_s if state.model else 0.0
    if age_s > state.config.health_timeout:
        raise EngineUnavailable(f"The engine has done nothing for {age_s:.0f} s.")
    return json_response({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether to send requests here now."""
    state_of(request).require_ready()
    return json_response({"status": "ready"})


async def metrics(request: Request) -> Response:
    """All series, for Prometheus."""
    state = state_of(request)
    state.metrics.observe_ready(state.why_not_ready() is None)
    state.metrics.observe_dropped_lines(Process.SERVER, num_dropped_lines())
    if state.model is not None:
        engine = state.model.engine
        state.metrics.observe_engine(engine.step_age_s, engine.num_restarts, engine.info)
    text, content_type = state.metrics.render(request.headers.get("accept", ""))
    return Response(text, media_type=content_type)


async def version() -> Response:
    """The version of the server."""
    return json_response({"version": VERSION})
