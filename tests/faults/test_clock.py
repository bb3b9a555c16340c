"""The clock of the wall jumps, a day ahead and two back, while answers are on their way."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from calm import CHAT, Watch, body, until
from raw_http import events_in
from server_process import start

# Read by every process of the server before anything else: the seconds in a file are added to
# `time.time()`, at once.
CUSTOMIZE = """
import time
true_time = time.time
def shifted():
    with open({path!r}) as file:
        return true_time() + float(file.read() or 0)
time.time = shifted
"""
DAY_S = 86_400


def test_a_clock_that_jumps(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift = tmp_path / "shift"
    shift.write_text("0")
    (tmp_path / "sitecustomize.py").write_text(CUSTOMIZE.format(path=str(shift)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def jump(seconds: float) -> None:
        new = tmp_path / "new"
        new.write_text(str(seconds))
        os.replace(new, shift)

    server = start(tmp_path, *flags)
    try:
        server.wait_ready()
        watch = Watch(server, server.log)
        start_time = created(server.url)
        with ThreadPoolExecutor(10) as pool:
            asked = body(max_tokens=150, ignore_eos=True, stream=True, timeout=100)
            for shift_s in (DAY_S, -DAY_S, 0):
                asking = [
                    pool.submit(httpx.post, server.url + CHAT, json=asked, timeout=120)
                    for _ in range(10)
                ]
                until(lambda: server.metric(r"bezel_num_requests_waiting\{") > 0)
                jump(shift_s)
                for future in asking:
                    answer = future.result()
                    assert answer.status_code == 200
                    assert events_in(answer.content)[-1] == "[DONE]"
                assert httpx.get(f"{server.url}/ready").status_code == 200
                assert abs(created(server.url) - start_time - shift_s) < 600, "it has jumped"
                watch.assert_calm()
    finally:
        server.process.terminate()
        assert server.process.wait(60) == 0


def created(url: str) -> int:
    """When an answer says that it was made, in seconds since 1970."""
    seconds: int = httpx.post(url + CHAT, json=body(), timeout=60).json()["created"]
    return seconds
