"""A real `bezel serve`: its own process and its engine's, reached through sockets."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from openai import OpenAI

BEZEL = Path(sys.executable).parent / "bezel"
START_TIMEOUT_S = 120
SETTLE_TIMEOUT_S = 60


@dataclass
class Server:
    """A running `bezel serve`."""

    process: "subprocess.Popen[bytes]"
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    @property
    def engine_pid(self) -> int:
        """The child that runs the model; the others are small."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return max(map(int, children), key=resident_kib)

    def metric(self, pattern: str) -> float:
        """Sum of the samples whose name and labels match."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(pattern, line))

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready in {START_TIMEOUT_S} s: {self.log.read_text()}")

    def wait_idle(self) -> None:
        """Until nothing runs and no page is held, which must come to pass by itself."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        busy = r"bezel_(num_requests_(running|waiting)|kv_pages_used)\{"
        while time.monotonic() < deadline:
            if self.metric(busy) == 0:
                return
            time.sleep(0.1)
        raise AssertionError(f"still {self.metric(busy)} sequences and pages in use")


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    return int(found[1]) if found else 0


def start(folder: Path, *arguments: str) -> Server:
    """Start one on a free port, with the default model unless `arguments` name another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    command = [str(BEZEL), "serve", *arguments]
    command += ["--port", str(port), "--kv-cache-memory-bytes", "1G"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    return Server(process, port, log)


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[Server]:
    """One that is ready, and ends in order with the block."""
    server = start(folder, *arguments)
    try:
        server.wait_ready()
        yield server
    finally:
        server.process.terminate()
        assert server.process.wait(60) == 0
