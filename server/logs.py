"""The log of the server process: how it begins, and its one line for each request."""

import logging
from typing import Any

from bezel.engine.logs import LogSettings, start_logging
from bezel.server.config import ServerConfig
from bezel.server.request_id import RequestIdFilter, trace_id
from bezel.server.request_summary import RequestSummary

logger = logging.getLogger("bezel")

# Asked every few seconds by machines; the metrics tell of them. They have no spans either.
PROBES = frozenset({"/health", "/ready", "/metrics"})


def start_server_logging(config: ServerConfig) -> LogSettings:
    """Begin to log as configured; returns the settings, for the engine process."""
    settings = LogSettings(config.log_format, config.log_level)
    start_logging("server", settings, RequestIdFilter())
    return settings


def log_request(summary: RequestSummary) -> None:
    """Log the end of a request, to be called once; of probes only at level debug."""
    level = logging.DEBUG if summary.route in PROBES else logging.INFO
    if logger.isEnabledFor(level):
        fields = {n: v for n, v in _fields(summary).items() if v is not None}
        logger.log(level, "request", extra={"fields": fields})


def _fields(summary: RequestSummary) -> dict[str, Any]:
    """By name; None is what isn't known, or isn't there."""
    fields = {
        "method": summary.method,
        "route": summary.route,
        "status": summary.status,
        "error": summary.error,
        "key": summary.key,
        "total_s": round(summary.total_s, 4),
        "trace_id": trace_id.get() or None,
    }
    if summary.model is None:
        return fields
    return fields | {
        "model": summary.model,
        "id": summary.answer_id,
        "finish": list(dict.fromkeys(summary.reasons)) or None,
        "abort_reason": summary.abort_reason,
        "choices": summary.num_choices,
        "prompt_tokens": summary.num_prompt_tokens,
        "cached_tokens": summary.num_cached_tokens,
        "output_tokens": summary.num_output_tokens,
        "ttft_s": _rounded(summary.ttft_s, 4),
        "tokens_per_s": _rounded(summary.tokens_per_s, 2),
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
