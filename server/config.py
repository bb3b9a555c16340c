"""Settings of the HTTP server; those of the engine ride along in `engine`.

Frozen: `server/settings.py` builds it once, everything else only reads it.
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
        (), "Key that clients must send as a Bearer token; may be repeated", secret=True
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
    shutdown_grace: int = option(
        0,
        "Seconds after SIGTERM in which /ready says no and requests are still taken, for a load "
        "balancer to notice",
    )
    shutdown_timeout: int = option(
        30, "Seconds that running requests may take to finish after SIGTERM and the grace"
    )
    health_timeout: int = option(
        600, "Seconds the engine may be silent with work pending before /health answers 503"
    )
    request_timeout: int = option(
        3600, "Seconds an answer may take in all; a request's own `timeout` may only be shorter"
    )
    max_num_reqs_per_key: int | None = option(
        None,
        "Requests of one API key that may run and wait; more get 429 with Retry-After [default: "
        "none fixed; with several keys one may have four times as much as is left over]",
    )
    max_connections: int = option(
        2000, "Connections that may be open; requests on further ones get 503, but for probes"
    )
    receive_timeout: int = option(
        30,
        "Seconds that the head of a request may take, and each piece of its body after the one "
        "before",
    )
    send_timeout: int = option(
        60, "Seconds that a client may read nothing of its answer before it is cut off"
    )
    max_header_bytes: int = option(
        64 * 1024, "Most bytes of a request's URL and headers; more get 431", type="bytes"
    )
    max_body_bytes: int = option(
        32 * 1024**2, "Largest request body; a larger one gets 413", type="bytes"
    )
    timeout_keep_alive: int = option(75, "Seconds that an idle connection stays open")
    sse_keep_alive_interval: int = option(
        15, "Seconds of silence after which a stream gets a comment line"
    )
    webui: bool = option(True, "Whether / is a page to chat on; it needs no key, its requests do")
    metrics_compat: str = option(
        "none",
        "Whose names /metrics has besides Bezel's own, for dashboards made for it",
        choices=("none", "vllm"),
    )
    log_format: str = option(
        "text", "Lines of the log for people, or as JSON objects", choices=("text", "json")
    )
    log_level: str = option(
        "info", "Least level that is logged", choices=("debug", "info", "warning", "error")
    )
    enable_log_requests: bool = option(
        True, "Log a line for each request when it ends, with its numbers and without its texts"
    )
    otlp_traces_endpoint: str | None = option(
        None,
        "Address of an OpenTelemetry collector that gets a span of each request over OTLP/HTTP; "
        "needs the extra `otel`",
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
        _check("shutdown_grace", self.shutdown_grace, 0)
        _check("shutdown_timeout", self.shutdown_timeout, 0)
        if self.max_num_reqs_per_key is not None:
            _check("max_num_reqs_per_key", self.max_num_reqs_per_key, 1)
        _check("max_connections", self.max_connections, 1)
        _check("receive_timeout", self.receive_timeout, 1)
        _check("send_timeout", self.send_timeout, 1)
        _check("max_header_bytes", self.max_header_bytes, 1024)
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
