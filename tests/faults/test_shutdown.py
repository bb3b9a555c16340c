"""SIGTERM under 64 streams, while those in front go on asking."""

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import httpx
from calm import CHAT, body, unexplained_lines, until
from raw_http import events_in, terminal_events_in
from server_process import start

NUM_STREAMS = 64


def test_sigterm_under_64_streams(flags: list[str], tmp_path: Path) -> None:
    server = start(tmp_path, *flags, "--shutdown-timeout", "2")
    try:
        server.wait_ready()

        begun = Barrier(NUM_STREAMS + 1)

        def ask(number: int) -> list[str]:
            asked = body(max_tokens=4 if number % 4 == 0 else 1000, ignore_eos=True, stream=True)
            with httpx.stream("POST", server.url + CHAT, json=asked, timeout=120) as response:
                begun.wait(60)
                return events_in(response.read())

        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            asking = [pool.submit(ask, number) for number in range(NUM_STREAMS)]
            begun.wait(60)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
            late = httpx.post(server.url + CHAT, json=body(), timeout=60)
            assert late.status_code == 503
            assert late.headers["connection"] == "close"
            streams = [future.result() for future in asking]
        assert server.process.wait(30) == 0
    finally:
        server.process.kill()

    ends = [terminal_events_in(events) for events in streams]
    assert all(end == events[-1:] for end, events in zip(ends, streams, strict=True))
    num_errors = sum("The server is shutting down." in end for [end] in ends)
    assert 0 < num_errors < NUM_STREAMS
    assert [end for [end] in ends if "error" in end and "shutting down" not in end] == []
    lines = server.log.read_text(encoding="utf-8").splitlines()
    told = rf"WARNING server \[-\] ended {num_errors} requests that had not finished$"
    explained = [r"INFO server \[-\] SIGTERM: finishing running requests$", told]
    assert unexplained_lines(lines, explained) == []
    assert unexplained_lines(lines, explained[:1]) != []
