"""Spans of requests for OpenTelemetry, sent over OTLP/HTTP; off without `--otlp-traces-endpoint`.

A span begins where the request comes in, under the trace that its `traceparent` header names, and
gets all its attributes at its end, from the `RequestSummary`. Their names are those of
OpenTelemetry's semantic conventions for HTTP and generative AI (version 1.41); texts aren't among
them. Ended spans wait in a bounded queue for a thread that sends them, so a collector that is slow
or gone costs spans and never a request.

The SDK reads its own variables, such as `OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER` and
`OTEL_EXPORTER_OTLP_HEADERS`.
"""

import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from bezel.engine.errors import ConfigError
from bezel.server.request_id import request_id
from bezel.server.request_summary import RequestSummary
from bezel.server.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

# How long the end of the server may wait for the last spans to be sent.
CLOSE_TIMEOUT_S = 3.0
_TRACES_PATH = "/v1/traces"

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
}


class Tracing:
    """Makes the spans, and sends them as the provider was set up to."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("bezel", VERSION)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, method: str, headers: Headers) -> "Span":
        """Begin the span of a request, a child of the caller's if the headers name one."""
        from opentelemetry.trace import SpanKind

        names = ("traceparent", "tracestate")
        carrier = {name: headers[name] for name in names if name in headers}
        context = self._propagator.extract(carrier)
        return self._tracer.start_span(method, context, SpanKind.SERVER)

    def end(self, span: "Span", summary: RequestSummary) -> None:
        """End it, saying what became of the request."""
        from opentelemetry.trace import Status, StatusCode

        operation = _OPERATIONS.get(summary.route)
        if operation is None or summary.model is None:
            span.update_name(f"{summary.method} {summary.route}")
        else:
            span.update_name(f"{operation} {summary.model}")
            span.set_attributes(_known(_gen_ai_attributes(operation, summary)))
        span.set_attributes(_known(_http_attributes(summary)))
        if has_failed(summary):
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Send what is left, for as long as that may take, and stop."""
        # The SDK itself would go on trying for half a minute.
        closing = threading.Thread(target=self._provider.shutdown, name="otel-close", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)


def open_tracing(endpoint: str | None) -> Tracing | None:
    """Begin to send spans to a collector; None if there is none.

    Raises:
        ConfigError: the extra `otel` isn't installed, or it isn't an HTTP address.
    """
    if endpoint is None:
        return None
    address = urlsplit(endpoint)
    if address.scheme not in ("http", "https") or not address.netloc:
        raise ConfigError(
            "--otlp-traces-endpoint must be an address such as "
            f"http://localhost:4318{_TRACES_PATH}, got {endpoint!r}"
        )
    if address.path in ("", "/"):
        endpoint = address._replace(path=_TRACES_PATH).geturl()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError(
            "--otlp-traces-endpoint needs OpenTelemetry: pip install 'bezel-serve[otel]'"
        ) from None
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "bezel"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    return Tracing(provider)


def has_failed(summary: RequestSummary) -> bool:
    """Whether the server is at fault, also where the status had been sent before."""
    is_cut_off = summary.abort_reason not in (None, "client", "slow_reader")
    return is_cut_off or (summary.status or 0) >= 500


def _http_attributes(summary: RequestSummary) -> dict[str, Any]:
    return {
        "http.request.method": summary.method,
        "http.route": summary.route,
        "http.response.status_code": summary.status,
        "error.type": summary.error or summary.abort_reason,
        "bezel.request.id": request_id.get(),
    }


def _gen_ai_attributes(operation: str, summary: RequestSummary) -> dict[str, Any]:
    params = summary.params
    assert params is not None, "what has a model has parameters"
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "bezel",
        "gen_ai.request.model": summary.model,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k or None,
        "gen_ai.request.choice.count": summary.num_choices,
        "gen_ai.response.id": summary.answer_id,
        "gen_ai.response.model": summary.model,
        "gen_ai.response.finish_reasons": summary.reasons,
        "gen_ai.usage.input_tokens": summary.num_prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": summary.num_cached_tokens,
        "gen_ai.usage.output_tokens": summary.num_output_tokens,
        # The convention has this name for a metric; no attribute tells the same.
        "gen_ai.server.time_to_first_token": summary.ttft_s,
    }


def _known(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}
