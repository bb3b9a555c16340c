"""The engine's process is killed, or does nothing any more, while it has work of every kind."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from calm import CHAT, HUNG, MODEL, RESTARTED, Watch, body, until
from raw_http import events_in, terminal_events_in
from server_process import Server

ENDLESS = {"max_tokens": 1000, "ignore_eos": True, "stream": True}
REQUESTS = {
    CHAT: body(**ENDLESS),
    "/v1/completions": {"model": MODEL, "prompt": "a", **ENDLESS},
    "/v1/messages": body(max_tokens=1000, stream=True),
    "/v1/responses": {"model": MODEL, "input": "a", "max_output_tokens": 1000, "stream": True},
}


@pytest.mark.parametrize(
    ("number", "message", "explained"),
    [
        (signal.SIGKILL, "The engine stopped unexpectedly and is being restarted.", RESTARTED),
        (signal.SIGSTOP, "The engine hung and is being restarted.", HUNG),
    ],
    ids=["killed", "blocked"],
)
def test_an_engine_that_is_lost(
    server: Server, watch: Watch, number: signal.Signals, message: str, explained: list[str]
) -> None:
    pid, restarts = server.engine_pid, server.metric(r"bezel_engine_restarts_total\{")

    def ask(path: str) -> httpx.Response:
        return httpx.post(server.url + path, json=REQUESTS[path], timeout=120)

    def ask_in_one_piece() -> httpx.Response:
        return httpx.post(server.url + CHAT, json=body(max_tokens=1000), timeout=120)

    # Four APIs three times: more than the eight that can run.
    with ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(ask, path) for path in REQUESTS for _ in range(3)]
        whole = [pool.submit(ask_in_one_piece) for _ in range(4)]
        until(
            lambda: (
                server.metric(r"bezel_num_requests_running\{") == 8
                and server.metric(r"bezel_num_requests_waiting\{") >= 4
                and server.metric(r"bezel_generation_tokens_total\{") > 0
            )
        )
        os.kill(pid, number)
        answers = [future.result() for future in streams]
        refused = [future.result() for future in whole]

    num_broken = 0
    for answer in answers:
        events = events_in(answer.content)
        assert answer.status_code == 200
        assert terminal_events_in(events) == events[-1:], events[-3:]
        num_broken += message in events[-1]
    assert num_broken >= 8, "those that ran at that moment, at the least"
    for answer in refused:
        if answer.status_code != 200:
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert json.loads(answer.content)["error"]["message"] == message
    assert httpx.get(f"{server.url}/health").status_code == 200
    server.wait_ready()
    assert server.engine_pid != pid
    assert server.metric(r"bezel_engine_restarts_total\{") == restarts + 1
    watch.assert_calm(*explained)
