"""Settings of the HTTP server; those of the engine ride along in `engine`.

Frozen: `server/cli.py` builds it once from flags and variables, everything else only reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bezel.engine.config import EngineConfig, option
from bezel.engine.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where the server listens, whom it lets in, and how long it waits.

    Raises:
        ConfigError: a value is out of range.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    host: str = option("127.0.0.1", "Address to listen on")
    port: int = option(8000, "TCP port to listen on; 0 takes any free one")
    api_key: tuple[str, ...] = option(
        (), "Key that clients must send as a Bearer token; may be repeated"
    )
    api_key_file: str | None = option(None, "File with more such keys, one per line")
    allowed_origins: tuple[str, ...] = option(
        (), "Web origins whose pages may call the server (CORS); * for all", nargs="+"
    )
    allow_credentials: bool = option(
        False, "Whether those pages may send cookies and HTTP authentication"
    )
    served_model_name: tuple[str, ...] = option(
        (), "Names clients may use for the model [default: the checkpoint's name]", nargs="+"
    )
    shutdown_timeout: int = option(
        30, "Seconds that running requests may take to finish after SIGTERM"
    )
    health_timeout: int = option(
        600, "Seconds the engine may be silent with work pending before /health answers 503"
    )
    request_timeout: int = option(
        3600, "Seconds an answer may take in all; a request's own `timeout` may only be shorter"
    )
    max_body_bytes: int = option(
        32 * 1024**2, "Largest request body; a larger one gets 413", type="bytes"
    )
    timeout_keep_alive: int = option(75, "Seconds that an idle connection stays open")
    sse_keep_alive_interval: int = option(
        15, "Seconds of silence after which a stream gets a comment line"
    )
    default_chat_template_kwargs: Mapping[str, Any] | None = option(
        None,
        "JSON object that the chat template gets where requests say nothing, such as "
        '{"enable_thinking": true}',
        type="json",
    )
    unknown_params: str = option(
        "warn",
        "Request fields that nobody has heard of: log and name them in a header, refuse the "
        "request, or say nothing",
        choices=("warn", "reject", "ignore"),
    )

    def __post_init__(self) -> None:
        _check("port", self.port, 0, 65535)
        _check("shutdown_timeout", self.shutdown_timeout, 0)
        _check("health_timeout", self.health_timeout, 1)
        _check("request_timeout", self.request_timeout, 1)
        _check("max_body_bytes", self.max_body_bytes, 1)
        _check("timeout_keep_alive", self.timeout_keep_alive, 1)
        _check("sse_keep_alive_interval", self.sse_keep_alive_interval, 1)
        for name in ("api_key", "served_model_name", "allowed_origins"):
            if "" in getattr(self, name):
                raise ConfigError(f"{name} must not be empty")
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ConfigError("allow_credentials goes only with named allowed_origins, not with *")


def _check(name: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" + ("" if high is None else f" and at most {high}")
        raise ConfigError(f"{name} must be {bounds}, got {value}")
