"""`bezel doctor`: servers that run, hang or aren't there; settings; and what it prints."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from served import served

from bezel.engine.diagnostics import checks
from bezel.engine.diagnostics.checks import Finding, Status
from bezel.server.app import create_app
from bezel.server.cli import main
from bezel.server.doctor_command import check_server, check_settings
from bezel.server.version import VERSION


def look(url: str) -> list[Finding]:
    with httpx.Client(base_url=url, timeout=5, trust_env=False) as client:
        return list(check_server(client))


def test_a_server_that_is_well(app: FastAPI) -> None:
    with served(app) as url:
        [finding] = look(url)
    assert finding.status is Status.OK
    assert finding.text == f"{url} answers; its version is {VERSION}"


def test_a_server_with_keys_is_looked_at_too(make_state: Any) -> None:
    with served(create_app(make_state(api_key=("k",)))) as url:
        [finding] = look(url)
    assert finding.status is Status.OK and "its version is for those with a key" in finding.text


def test_an_engine_that_hangs_and_a_server_that_is_not_ready(
    app: FastAPI, state: Any, engine: Any
) -> None:
    engine.step_age_s = 10_000.0
    state.is_draining = True
    with served(app) as url:
        _, health, ready = look(url)
    assert health.status is Status.FAIL
    assert health.text == "/health says 503: The engine has done nothing for 10000 s."
    assert ready.status is Status.WARN and ready.text.startswith("/ready says 503: ")


def test_a_port_that_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    [finding] = look(f"http://127.0.0.1:{port}")
    assert finding.status is Status.OK and "its port is free" in finding.text


def test_a_port_that_somebody_has_bound() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # and doesn't listen
        [finding] = look(f"http://127.0.0.1:{sock.getsockname()[1]}")
    assert finding.status is Status.FAIL
    assert finding.text.startswith("can't listen on port") and finding.hint == "take another --port"


@pytest.fixture
def stranger() -> Iterator[str]:
    """Something that answers 404 to all, and not in JSON."""

    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_of_somebody_else(stranger: str) -> None:
    found = look(stranger)
    assert [finding.status for finding in found] == [Status.OK, Status.FAIL, Status.WARN]


def test_a_server_elsewhere_that_is_not_there() -> None:
    [finding] = look("http://127.1.2.3:9")
    assert finding.status is Status.FAIL and finding.hint == "is its URL right?"


@pytest.mark.parametrize(
    ("environ", "status", "text"),
    [
        ({}, Status.OK, "given: none"),
        ({"BEZEL_PORT": "1", "OTHER": "x"}, Status.OK, "given: port"),
        ({"BEZEL_PORT": "x"}, Status.FAIL, "BEZEL_PORT: 'x' is not a whole number"),
        ({"BEZEL_CONFIG": "none.yaml"}, Status.FAIL, "none.yaml: No such file or directory"),
        ({"BEZEL_PROT": "1"}, Status.WARN, "unknown variable BEZEL_PROT; did you mean BEZEL_PORT?"),
    ],
)
def test_settings(environ: dict[str, str], status: Status, text: str) -> None:
    [finding] = check_settings(environ)
    assert (finding.status, finding.text) == (status, text)


def findings(*found: Finding) -> Any:
    return lambda: iter(found)


def test_what_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    found = [Finding("numba", Status.WARN, "own threads", "install libgomp1")]
    monkeypatch.setattr(checks, "run_checks", findings(*found))
    assert main(["doctor", "--url", url]) == 0
    assert capsys.readouterr().out == (
        "WARN  numba           own threads\n"
        "                      → install libgomp1\n"
        "OK    settings        given: none\n"
        f"OK    server          none at {url}, its port is free\n"
    )
    monkeypatch.setattr(checks, "run_checks", findings(Finding("x", Status.FAIL, "y"), *found))
    assert main(["doctor", "--url", url]) == 1


def test_a_url_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--url", "http://a:b"]) == 2
    assert capsys.readouterr().err.startswith("bezel: error: --url http://a:b: ")
