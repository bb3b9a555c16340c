"""The disk is full, and every line of the log is lost."""

import os
from pathlib import Path

import httpx
from calm import CHAT, Watch, body
from raw_http import connected, events_in, post
from server_process import start


def test_a_full_disk(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "server.log").symlink_to("/dev/full")
    server = start(tmp_path, *flags, "--log-level", "debug")
    server.log = Path(os.devnull)  # what can be read of a full disk never ends
    try:
        server.wait_ready()
        watch = Watch(server, None)
        before_kib = watch.grown_kib()
        with connected(server.port) as left:
            left.sendall(post(CHAT, body(max_tokens=1000, stream=True)))
            left.recv(100)
        with httpx.Client(base_url=server.url, timeout=60) as client:
            for _ in range(500):
                assert client.get("/nowhere").status_code == 404
            stream = client.post(CHAT, json=body(stream=True))
        assert events_in(stream.content)[-1] == "[DONE]"
        assert watch.grown_kib() - before_kib < 16_384
        watch.assert_calm()
    finally:
        server.process.terminate()
        assert server.process.wait(60) == 0
