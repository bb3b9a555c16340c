"""`bezel bench serve` as a user meets it, against a small server of its own."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bezel.server.benchmarking.load import ServeRun
from bezel.server.benchmarking.measure import Measurement
from bezel.server.cli import main

USAGE = {"prompt_tokens": 11, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}


class Answers(BaseHTTPRequestHandler):
    """Two tokens to everybody; 429 to whose model is `busy`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        known = {"/version": {"version": "9"}, "/v1/models": {"data": [{"id": "tiny"}]}}
        self.send(200, json.dumps(known[self.path]).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body["model"] == "busy":
            return self.send(429, b"full")
        chunks: list[Any] = [{"choices": [{"delta": {"content": word}}]} for word in ("a", " b")]
        chunks.append({"choices": [], "usage": USAGE})
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        self.send(200, "".join([": hello\n\n", *lines, "data: [DONE]\n\n"]).encode())

    def send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def bench(url: str, *argv: str) -> int:
    return main(["bench", "serve", "--base-url", url, "--num-prompts", "5", *argv])


def test_a_report_for_people_and_a_file_for_programs(
    url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "out.json"
    flags = ["--slo-ttft", "60", "--workload", "chats", "--turns", "2", "--api-key", "secret"]
    assert bench(url, *flags, "--json", str(path)) == 0
    captured = capsys.readouterr()
    assert captured.err == "", "no bar where nobody looks"
    assert captured.out.startswith(f"tiny at {url}, chat\n")
    assert "requests    5 of 5 answered in " in captured.out
    assert "55 of prompts, 10 of answers; 9.1% of prompts from a cache\n" in captured.out
    assert "100.0% of all: first token within 60 s" in captured.out
    assert len(captured.out.splitlines()) <= 30
    text = path.read_text()
    assert "secret" not in text
    found = json.loads(text)
    assert found["server"] == {"model": "tiny", "version": {"version": "9"}}
    assert found["arguments"]["turns"] == 2 and found["arguments"]["base_url"] == url
    results = found["results"]
    assert (results["prompt_tokens"], results["output_tokens"]) == (55, 10)
    rows = found["requests"]
    assert [row["output_tokens"] for row in rows] == [2] * 5
    assert max(row["ttft_s"] for row in rows) == results["ttft_s"]["max"]


def test_json_on_standard_output_is_all_there(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(url, "--json", "-", "--num-warmups", "0", "--model", "mine") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["server"]["model"] == "mine"
    assert len(found["requests"]) == found["results"]["num_answered"] == 5


def test_nothing_answered_is_a_failure(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(url, "--model", "busy", "--num-warmups", "0") == 1
    printed = capsys.readouterr().out
    assert "requests    0 of 5 answered" in printed
    assert "error       5 × HTTP 429 full\n" in printed
    assert "to first token               -" in printed


def test_an_interrupted_run_prints_what_it_has(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(self: ServeRun) -> None:
        self.model = "tiny"
        started_s = self.load.started_s
        self.load.measurements.append(Measurement(sent_s=started_s, ended_s=started_s + 2.0))
        raise KeyboardInterrupt

    monkeypatch.setattr(ServeRun, "run", run)
    assert bench(url) == 130
    printed = capsys.readouterr().out
    assert "requests    1 of 5 answered in 2.0 s\n" in printed
    assert "interrupted 4 requests had not ended\n" in printed


def test_a_rate_that_the_client_held_back_is_told(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(self: ServeRun) -> None:
        for late_s in (0.0, 0.5):
            self.load.measurements.append(Measurement(sent_s=0.0, late_s=late_s))

    monkeypatch.setattr(ServeRun, "run", run)
    assert bench(url, "--request-rate", "3") == 0
    held_back = "late        --max-concurrency held requests back, for 0.25 s on average\n"
    assert held_back in capsys.readouterr().out
    assert bench(url) == 0
    assert held_back not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-prompts", "0"], "--num-prompts must be at least 1, got 0"),
        (["--request-rate", "0"], "--request-rate must be above 0, got 0.0"),
        (["--prefix-len", "-1"], "--prefix-len must be at least 0, got -1"),
        (["--workload", "trains"], "argument --workload: 'trains' is not one of random"),
        (["--json", "none/out.json"], "--json: there is no folder none"),
        (["--model", "busy"], "a warm-up failed: HTTP 429 full"),
        (["--base-url", "127.0.0.1"], "--base-url 127.0.0.1: Request URL is missing"),
        (["--base-url", "http://127.0.0.1:0"], "--base-url http://127.0.0.1:0: All connection"),
        (["--base-url", "http://["], "--base-url http://[: "),
    ],
    ids=str,
)
def test_mistakes_are_one_line(
    url: str, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(url, *argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"bezel: error: {message}")
    assert captured.err.count("\n") == 1


def test_a_kind_of_benchmark_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    assert capsys.readouterr().err == ("bezel: error: the following arguments are required: KIND\n")
