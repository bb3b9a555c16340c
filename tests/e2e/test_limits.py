"""A real server that is asked for too much, or whose engine says nothing any more."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from gemma4_checkpoint import write_gemma4_checkpoint
from server_process import SETTLE_TIMEOUT_S, Server, running

CHAT = "/v1/chat/completions"
ENDLESS = {"max_tokens": 8000, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("limits")
    write_gemma4_checkpoint(folder / "tiny")
    settings = ["--engine-hang-timeout", "5", "--receive-timeout", "2", "--send-timeout", "2"]
    settings += ["--max-num-seqs", "1", "--max-num-queued-tokens", "3000"]
    with running(folder, str(folder / "tiny"), *settings) as server:
        yield server


def body(words: int = 1, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "a " * words}]
    return {"model": "tiny", "messages": messages, "max_tokens": 4} | fields


def request(asked: dict[str, Any]) -> bytes:
    data = json.dumps(asked).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_fine(server: Server) -> None:
    """Nothing is left of what was, and the next request is answered."""
    server.wait_idle()
    assert httpx.post(server.url + CHAT, json=body(), timeout=60).status_code == 200


def test_an_engine_that_hangs(server: Server) -> None:
    pid = server.engine_pid
    with httpx.stream(
        "POST", server.url + CHAT, json=body(stream=True, **ENDLESS), timeout=60
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        os.kill(pid, signal.SIGSTOP)
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert [event for event in events[:-1] if '"error"' in event] == []
    error = json.loads(events[-1])["error"]
    assert error["code"] == "server_is_overloaded"
    assert error["message"] == "The engine hung and is being restarted."
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/ready").status_code == 503
    server.wait_ready()
    assert server.engine_pid != pid
    assert server.metric(r"bezel_engine_restarts_total\{") == 1
    is_fine(server)


def test_prompts_that_wait_have_too_many_tokens(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as busy:
        busy.sendall(request(body(n=4, **ENDLESS)))
        until(lambda: server.metric(r"bezel_num_requests_running\{") == 1)
        with httpx.Client(timeout=120) as client, ThreadPoolExecutor(8) as pool:
            asking = [
                pool.submit(client.post, server.url + CHAT, json=body(1000)) for _ in range(8)
            ]
            until(lambda: server.metric(r"bezel_admission_rejections_total\{.*tokens") == 6)
            busy.close()
            answers = [future.result() for future in asking]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert [answer.status_code for answer in answers if answer not in refused] == [200, 200]
    for answer in refused:
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["code"] == "slow_down"
    is_fine(server)


def test_clients_that_send_or_read_nothing(server: Server) -> None:
    address = ("127.0.0.1", server.port)
    half_open = [socket.create_connection(address) for _ in range(200)]
    for sock in half_open[::2]:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(address)
        # A token with twenty others beside it is a kilobyte.
        slow.sendall(request(body(stream=True, n=4, logprobs=True, top_logprobs=20, **ENDLESS)))
        until(lambda: server.metric(r"bezel_num_requests_running\{") == 1)
        for number, sock in enumerate(half_open):
            sock.settimeout(SETTLE_TIMEOUT_S)
            answer = sock.recv(1000)
            assert answer[:12] == (b"" if number % 2 else b"HTTP/1.1 408"), number
            sock.close()
        server.wait_idle()
    assert "its client read nothing for 2 s" in server.log.read_text()
    is_fine(server)


def test_a_hundred_megabytes_of_headers(server: Server) -> None:
    def resident_kib() -> int:
        status = open(f"/proc/{server.process.pid}/status").read()
        found = re.search(r"VmRSS:\s+(\d+)", status)
        assert found is not None
        return int(found[1])

    before = resident_kib()
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nX-Bomb: ")
        with pytest.raises(ConnectionError):
            for _ in range(100):
                sock.sendall(b"a" * 1_000_000)
    assert resident_kib() - before < 10_000
    is_fine(server)
