"""The ASGI app: routes, error handlers, middleware.

It can serve from the first moment: until `ServerState.set_model` is called, and again while
draining, `/ready` and the generating routes say 503 and why. It starts and ends nothing.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from bezel.engine.errors import BezelError, EngineUnavailable
from bezel.server.completions import create_chat_completion, create_completion
from bezel.server.errors import ClientDisconnected, handle_error, json_response
from bezel.server.middleware import ApiKey, BodyLimit, RequestContext
from bezel.server.state import ServedModel, ServerState, state_of
from bezel.server.version import VERSION


def create_app(state: ServerState) -> FastAPI:
    """Build the app around its state."""
    app = FastAPI(
        title="Bezel",
        version=VERSION,
        redirect_slashes=False,
        middleware=[
            Middleware(RequestContext, metrics=state.metrics),
            Middleware(ApiKey, keys=state.config.api_key),
            Middleware(BodyLimit, max_bytes=state.config.max_body_bytes),
        ],
    )
    app.state.server = state
    for error in (BezelError, ClientDisconnected, HTTPException, RequestValidationError):
        app.add_exception_handler(error, handle_error)
    app.add_api_route("/v1/chat/completions", create_chat_completion, methods=["POST"])
    app.add_api_route("/v1/completions", create_completion, methods=["POST"])
    app.add_api_route("/v1/models", list_models)
    app.add_api_route("/v1/models/{model_id:path}", show_model)
    app.add_api_route("/health", health)
    app.add_api_route("/ready", ready)
    app.add_api_route("/metrics", metrics)
    app.add_api_route("/version", version)
    return app


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


async def health(request: Request) -> Response:
    """Whether the process is worth keeping: 503 if the engine has stopped making progress."""
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
    if state.model is not None:
        state.metrics.observe_engine(state.model.engine.step_age_s, state.model.engine.num_restarts)
    text, content_type = state.metrics.render()
    return Response(text, media_type=content_type)


async def version() -> Response:
    """The version of the server."""
    return json_response({"version": VERSION})
