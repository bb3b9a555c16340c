"""Spans of requests: what they say, whose children they are, and that they cost no request."""

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from bezel.engine.errors import ConfigError
from bezel.engine.messages import FinishReason
from bezel.server import tracing as tracing_module
from bezel.server.app import create_app
from bezel.server.request_id import set_trace_id, trace_id
from bezel.server.state import ServerState
from bezel.server.tracing import Tracing, open_tracing

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def state(make_state: Any, exporter: InMemorySpanExporter) -> ServerState:
    """One whose spans go to the exporter as soon as they end."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    state: ServerState = make_state()
    state.tracing = Tracing(provider)
    return state


@pytest.fixture
def only_span(exporter: InMemorySpanExporter) -> Callable[[], ReadableSpan]:
    def get() -> ReadableSpan:
        (span,) = exporter.get_finished_spans()
        return span

    return get


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer(
    client: httpx.AsyncClient, engine: Any, chat: Any, only_span: Any, stream: bool
) -> None:
    engine.say("abc", FinishReason.LENGTH)
    engine.cached_tokens = [4]
    body = chat(stream=stream, temperature=0.5, top_p=0.75, max_tokens=9)
    response = await client.post(CHAT, json=body, headers={"x-request-id": "r-1"})
    span = only_span()
    told = dict(span.attributes)
    assert told.pop("gen_ai.response.id") in response.text
    assert 0 < told.pop("gen_ai.server.time_to_first_token") < 30
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "bezel",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.75,
        "gen_ai.request.choice.count": 1,
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 19,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.output_tokens": 3,
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "bezel.request.id": "r-1",
    }
    assert (span.name, span.kind) == ("chat tiny", SpanKind.SERVER)
    assert span.status.status_code is StatusCode.UNSET


async def test_other_operations(
    client: httpx.AsyncClient, engine: Any, completion: Any, exporter: InMemorySpanExporter
) -> None:
    engine.say("x")
    await client.post("/v1/completions", json=completion())
    await client.get("/v1/models")
    assert [span.name for span in exporter.get_finished_spans()] == [
        "text_completion tiny",
        "GET /v1/models",
    ]


async def test_probes_have_none(client: httpx.AsyncClient, exporter: InMemorySpanExporter) -> None:
    for path in ("/health", "/ready", "/metrics"):
        await client.get(path)
    assert exporter.get_finished_spans() == ()


async def test_the_callers_trace_goes_on(
    client: httpx.AsyncClient, only_span: Any, caplog: pytest.LogCaptureFixture
) -> None:
    traced: list[str] = []
    caplog.set_level(logging.INFO, "bezel")
    caplog.handler.addFilter(lambda _: traced.append(trace_id.get()) is None)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    await client.get("/v1/models", headers=headers)
    context, parent = only_span().get_span_context(), only_span().parent
    assert format(context.trace_id, "032x") == TRACE
    assert format(parent.span_id, "016x") == PARENT
    assert context.trace_state.get("vendor") == "1"
    assert traced == [TRACE]


async def test_without_a_caller_a_trace_begins(
    client: httpx.AsyncClient, only_span: Any, caplog: pytest.LogCaptureFixture
) -> None:
    traced: list[str] = []
    caplog.set_level(logging.INFO, "bezel")
    caplog.handler.addFilter(lambda _: traced.append(trace_id.get()) is None)
    await client.get("/v1/models", headers={"traceparent": f"00-{TRACE}-{'0' * 16}-01"})
    assert only_span().parent is None
    assert traced == [format(only_span().get_span_context().trace_id, "032x")]
    assert traced != [TRACE]


async def test_a_trace_that_is_not_sampled_gets_no_span(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    await client.get("/v1/models", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (f"00-{TRACE}-{PARENT}-01", TRACE),
        (f"01-{TRACE}-{PARENT}-01-more", TRACE),
        (f"00-{TRACE.upper()}-{PARENT}-01", ""),
        (f"ff-{TRACE}-{PARENT}-01", ""),
        (f"00-{'0' * 32}-{PARENT}-01", ""),
        (f"00-{TRACE}-{PARENT}-01\n", ""),
        ("", ""),
    ],
)
def test_trace_ids_without_spans(given: str, taken: str) -> None:
    set_trace_id(given)
    assert trace_id.get() == taken


@pytest.mark.parametrize(
    ("cause", "status", "error", "code"),
    [
        (None, 429, "slow_down", StatusCode.UNSET),
        (KeyError("ASKED"), 500, "internal_error", StatusCode.ERROR),
    ],
)
async def test_errors(
    client: httpx.AsyncClient,
    engine: Any,
    chat: Any,
    only_span: Any,
    state: ServerState,
    cause: Exception | None,
    status: int,
    error: str,
    code: StatusCode,
) -> None:
    if cause is None:
        state.admission.places.take("", 10_000)
    engine.refusal = cause
    assert (await client.post(CHAT, json=chat())).status_code == status
    span = only_span()
    assert (span.attributes["error.type"], span.status.status_code) == (error, code)
    assert "ASKED" not in span.to_json()


async def test_an_answer_that_breaks_off_is_an_error(
    client: httpx.AsyncClient, engine: Any, chat: Any, only_span: Any
) -> None:
    engine.script = [[65], FinishReason.ERROR]
    assert (await client.post(CHAT, json=chat(stream=True))).status_code == 200
    span = only_span()
    assert span.attributes["error.type"] == "generation_failed"
    assert span.attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert span.status.status_code is StatusCode.ERROR


async def test_spans_have_no_texts_and_no_keys(
    make_state: Any, client_for: Any, engine: Any, chat: Any, exporter: Any
) -> None:
    engine.say("ANSWERED", chunk=8)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    state = make_state(api_key=("sk-GIVEN",))
    state.tracing = Tracing(provider)
    body = chat(messages=[{"role": "user", "content": "ASKED"}], stop=["STOPPED"])
    async with client_for(create_app(state)) as client:
        for key in ("sk-GIVEN", "sk-WRONG"):
            await client.post(CHAT, json=body, headers={"Authorization": f"Bearer {key}"})
    spans = [span.to_json() for span in exporter.get_finished_spans()]
    assert len(spans) == 2
    for text in ("ASKED", "ANSWERED", "STOPPED", "sk-"):
        assert not any(text in span for span in spans)


class Collector:
    """An OTLP/HTTP receiver that notes what it gets."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, ExportTraceServiceRequest]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                spans = ExportTraceServiceRequest.FromString(body)
                collector.requests.append((self.path, spans))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@pytest.mark.parametrize("path", ["", "/", "/v1/traces", "/other/path"])
async def test_a_collector_gets_the_spans(
    make_state: Any, client_for: Any, engine: Any, chat: Any, collector: Collector, path: str
) -> None:
    engine.say("x")
    state = make_state(otlp_traces_endpoint=collector.url + path)
    async with client_for(create_app(state)) as client:
        await client.post(CHAT, json=chat())
    state.tracing.close()
    ((asked, request),) = collector.requests
    assert asked == ("/other/path" if "other" in path else "/v1/traces")
    (resource,) = request.resource_spans
    names = {item.key: item.value.string_value for item in resource.resource.attributes}
    assert names["service.name"] == "bezel"
    (span,) = resource.scope_spans[0].spans
    assert span.name == "chat tiny"


async def test_the_operators_name_of_the_service(
    make_state: Any, client_for: Any, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "gemma-eu")
    state = make_state(otlp_traces_endpoint=collector.url)
    async with client_for(create_app(state)) as client:
        await client.get("/version")
    state.tracing.close()
    resource = collector.requests[0][1].resource_spans[0].resource
    names = {item.key: item.value.string_value for item in resource.attributes}
    assert names["service.name"] == "gemma-eu"


async def test_a_collector_that_is_gone_costs_no_request(
    make_state: Any, client_for: Any, engine: Any, chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
    engine.say("x")
    state = make_state(otlp_traces_endpoint="http://127.0.0.1:1")
    async with client_for(create_app(state)) as client:
        assert (await client.post(CHAT, json=chat())).status_code == 200
    state.tracing.close()


def test_the_end_waits_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing_module, "CLOSE_TIMEOUT_S", 0.01)
    asked, answered = threading.Event(), threading.Event()

    class Stuck(TracerProvider):
        def shutdown(self) -> None:
            asked.set()
            answered.wait()

    Tracing(Stuck(shutdown_on_exit=False)).close()
    assert asked.wait(10)
    answered.set()


@pytest.mark.parametrize("endpoint", ["localhost:4317", "grpc://localhost:4317", "http://", "x"])
def test_addresses_that_are_none(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"--otlp-traces-endpoint must be an address such as"):
        open_tracing(endpoint)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError) as caught:
        open_tracing("http://127.0.0.1:4318")
    assert caught.value.message == (
        "--otlp-traces-endpoint needs OpenTelemetry: pip install 'bezel-serve[otel]'"
    )


def test_off_by_default(make_state: Any) -> None:
    assert make_state().tracing is None
