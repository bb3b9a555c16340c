"""What a real server and its engine write to standard error, and what they do if they can't."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import running, start

pytestmark = pytest.mark.weights

KEY = "sk-of-the-operator"
PROMPT = "A giraffe walked into"
TRACE = "0af7651916cd43dd8448eb211c80319c"


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "gemma-3-270m", "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | fields


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """What the requests below were told."""
    return {}


@pytest.fixture(scope="module")
def lines(
    tmp_path_factory: pytest.TempPathFactory, answers: dict[str, Any]
) -> list[dict[str, Any]]:
    """All that a server at its chattiest wrote, from its start to its end."""
    folder = tmp_path_factory.mktemp("logs")
    flags = ["--log-format", "json", "--log-level", "debug", "--api-key", KEY]
    with running(folder, *flags) as server:
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
            path = "/v1/completions"
            client.headers["traceparent"] = f"00-{TRACE}-b7ad6b7169203331-01"
            answers["whole"] = client.post(path, json=body()).json()
            client.headers["x-request-id"] = "the-one-who-leaves"
            with client.stream("POST", path, json=body(max_tokens=5000, stream=True)) as stream:
                next(stream.iter_lines())
        with httpx.Client(base_url=server.url) as stranger:
            wrong = {"Authorization": "Bearer sk-guessed"}
            stranger.post(f"{path}?key={KEY}", json=body(), headers=wrong)
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as raw:
            raw.sendall(b"this is not HTTP\r\n\r\n")
            while raw.recv(1 << 16):
                pass
        log = server.log
    answers["log"] = log.read_text(encoding="utf-8")
    return [json.loads(line) for line in answers["log"].splitlines()]


def test_every_line_is_json_and_says_whose_it_is(lines: list[dict[str, Any]]) -> None:
    assert {line["process"] for line in lines} == {"server", "engine"}
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert any(line["message"].startswith("loaded gemma") for line in lines)
    assert "Invalid HTTP request received." in [line["message"] for line in lines]


def test_each_request_has_one_line(lines: list[dict[str, Any]], answers: dict[str, Any]) -> None:
    told = [line for line in lines if line.get("route") == "/v1/completions"]
    whole, left, refused = told
    usage = answers["whole"]["usage"]
    assert whole["prompt_tokens"] == usage["prompt_tokens"]
    assert whole["output_tokens"] == usage["completion_tokens"] == 8
    assert (whole["finish"], whole["trace_id"]) == (["length"], TRACE)
    assert 0 < whole["ttft_s"] < whole["total_s"]
    assert (left["request_id"], left["finish"]) == ("the-one-who-leaves", ["abort"])
    assert (refused["status"], refused["error"]) == (401, "invalid_api_key")


def test_no_keys_and_no_texts(lines: list[dict[str, Any]], answers: dict[str, Any]) -> None:
    for text in (KEY, "sk-guessed", "giraffe", answers["whole"]["choices"][0]["text"].strip()):
        assert text not in answers["log"]


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "server.log").symlink_to("/dev/full")
    server = start(tmp_path, "--log-level", "debug")
    server.log = Path(os.devnull)  # what can be read of a full disk never ends
    try:
        server.wait_ready()
        for stream in (False, True):
            response = httpx.post(f"{server.url}/v1/completions", json=body(stream=stream))
            assert response.status_code == 200
        assert response.text.endswith("data: [DONE]\n\n")
        server.wait_idle()
    finally:
        server.process.terminate()
        assert server.process.wait(60) == 0
