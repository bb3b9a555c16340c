"""Who may use the server: API keys, as plain ASGI.

Without keys everyone may. With keys nothing but the two probes and the chat page is open, whatever
the path. Who uses the same key is one *tenant*, and the scheduler is fair between tenants.
"""

import secrets
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from bezel.engine.errors import ConfigError
from bezel.server.config import ServerConfig
from bezel.server.errors import error_response

# Of the HTTP request being served: the number of its key, never the key.
tenant: ContextVar[str] = ContextVar("tenant", default="")

PUBLIC_PATHS = frozenset({"/health", "/ready"})
# The chat page holds no secret, and asks for the key that its requests need.
_OPEN_PATHS = PUBLIC_PATHS | {"/"}


def read_api_keys(config: ServerConfig) -> list[str]:
    """The keys of `--api-key` and those in `--api-key-file`, a line each.

    Raises:
        ConfigError: the file can't be read or has no key. An empty file must not open the server.
    """
    if config.api_key_file is None:
        return list(config.api_key)
    try:
        text = Path(config.api_key_file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"api_key_file can't be read: {error}") from error
    keys = [line.strip() for line in text.splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise ConfigError(f"api_key_file {config.api_key_file} holds no key")
    return [*config.api_key, *keys]


class ApiKey:
    """Refuses whoever brings none of the keys.

    A key comes as `Authorization: Bearer …`, or as `x-api-key`, which is where clients of
    Anthropic's API put it.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = not self._keys or scope["type"] == "lifespan" or scope["path"] in _OPEN_PATHS
        number = None if is_open else self._number_of(_token(Headers(scope=scope)))
        if is_open or number is not None:
            tenant.set("" if number is None else f"key {number}")
            await self._app(scope, receive, send)
            return
        error = HTTPException(
            401,
            "This server wants an API key: Authorization: Bearer <key>.",
            {"WWW-Authenticate": "Bearer"},
        )
        await error_response(error, scope["path"])(scope, receive, send)

    def _number_of(self, token: str) -> int | None:
        """Which of the keys it is, or None."""
        # Every key is compared, each in constant time: the time taken tells nothing.
        matches = [secrets.compare_digest(token.encode("latin-1"), key) for key in self._keys]
        return matches.index(True) if True in matches else None


def _token(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return headers.get("x-api-key", "").strip()
