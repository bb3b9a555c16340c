"""The real server with the real 270M model, through sockets: complete, unmixed, leak-free."""

import asyncio
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

pytestmark = pytest.mark.weights

BEZEL = Path(sys.executable).parent / "bezel"
MODEL = "gemma-3-270m"
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
        """The child that runs the model; the other one only tracks shared resources."""
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


def start(folder: Path, *flags: str) -> Server:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    command = [str(BEZEL), "serve", "--port", str(port), "--kv-cache-memory-bytes", "1G", *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    return Server(process, port, log)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = start(tmp_path_factory.mktemp("server"))
    try:
        running.wait_ready()
        yield running
    finally:
        running.process.terminate()
        assert running.process.wait(60) == 0


def test_chat_streamed_and_not(server: Server) -> None:
    question = [{"role": "user", "content": "Name three colours."}]
    whole = server.client.chat.completions.create(
        model=MODEL, messages=question, max_tokens=24, temperature=0
    )
    pieces = server.client.chat.completions.create(
        model=MODEL,
        messages=question,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(pieces)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert re.search(r"[a-z]{3}", text), "real text, not noise"
    assert chunks[-1].usage == whole.usage
    assert server.client.models.list().data[0].id == MODEL


def test_64_streams_at_once_are_complete_and_unmixed(server: Server) -> None:
    """Every prompt repeats a number of its own, and the model goes on repeating it."""

    def ask(number: int) -> str:
        chunks = server.client.completions.create(
            model=MODEL,
            prompt=f" {number}," * 12,
            max_tokens=12,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        parts = [(c.choices[0].text, c.choices[0].finish_reason) for c in chunks]
        assert [reason for _, reason in parts if reason] == ["length"]
        return "".join(part for part, _ in parts)

    numbers = list(range(101, 165))
    with ThreadPoolExecutor(64) as pool:
        answers = dict(zip(numbers, pool.map(ask, numbers), strict=True))
    for number, answer in answers.items():
        assert answer.startswith(f" {number}, {number},"), f"{number} got {answer!r}"
    server.wait_idle()


def test_memory_is_flat_over_500_requests(server: Server) -> None:
    async def run(count: int, seed: int) -> None:
        rng = random.Random(seed)
        limit = asyncio.Semaphore(32)
        async with httpx.AsyncClient(timeout=300) as client:

            async def one() -> None:
                prompt = [rng.randrange(10, 200_000) for _ in range(rng.choice((5, 40, 120)))]
                body = {"model": MODEL, "prompt": prompt, "max_tokens": 3, "stream": True}
                async with (
                    limit,
                    client.stream("POST", f"{server.url}/v1/completions", json=body) as response,
                ):
                    lines = [line async for line in response.aiter_lines()]
                assert "data: [DONE]" in lines

            await asyncio.gather(*(one() for _ in range(count)))

    # Until the caches of compiled products are full.
    asyncio.run(run(500, seed=0))
    sizes = []
    for seed in range(1, 7):
        sizes.append((resident_kib(server.process.pid), resident_kib(server.engine_pid)))
        asyncio.run(run(100, seed))
    server.wait_idle()
    for which, kib in zip(("server", "engine"), zip(*sizes, strict=True), strict=True):
        growth_kib = [new - old for old, new in itertools.pairwise(kib)]
        # The heap may still take a step, for a larger batch than all before, or for another
        # compiled product; what leaks grows in every round.
        assert min(growth_kib) < 8192, f"{which} grew by {growth_kib} KiB"


def test_200_clients_that_vanish_leave_nothing_behind(server: Server) -> None:
    """Each reads a random part of its answer, or none of it, and drops the connection."""
    rng = random.Random(3)
    started = server.metric(r"bezel_request_success_total\{")

    async def vanish(stream: bool, num_bytes: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        body = json.dumps(
            {
                "model": MODEL,
                "prompt": [rng.randrange(10, 200_000) for _ in range(rng.choice((4, 60, 300)))],
                "max_tokens": 4000,
                "stream": stream,
                "ignore_eos": True,
            }
        )
        writer.write(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            f"Content-Type: application/json\r\n\r\n{body}".encode()
        )
        await writer.drain()
        if num_bytes:
            await reader.readexactly(num_bytes)
        writer.transport.abort()

    async def crowd() -> None:
        limit = asyncio.Semaphore(40)

        async def one() -> None:
            stream = rng.random() < 0.7
            async with limit:
                await vanish(stream, rng.choice((0, 1, 300, 900)) if stream else 0)

        await asyncio.gather(*(one() for _ in range(200)))

    asyncio.run(crowd())
    server.wait_idle()
    assert server.metric(r"bezel_request_success_total\{") > started
    answer = server.client.completions.create(
        model=MODEL, prompt=" 7," * 12, max_tokens=6, temperature=0
    )
    assert answer.choices[0].text.startswith(" 7, 7")


def test_a_killed_engine_is_an_error_for_its_clients_and_comes_back(server: Server) -> None:
    body = {
        "model": MODEL,
        "prompt": "Once",
        "max_tokens": 4000,
        "stream": True,
        "ignore_eos": True,
    }
    events = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(line)
            if len(events) == 3:
                os.kill(server.engine_pid, signal.SIGKILL)
    assert "error" in json.loads(events[-1].removeprefix("data: "))
    assert httpx.get(f"{server.url}/ready", timeout=10).status_code == 503
    server.wait_ready()
    answer = server.client.completions.create(
        model=MODEL, prompt=" 7," * 12, max_tokens=6, temperature=0
    )
    assert answer.choices[0].text.startswith(" 7, 7")
    assert server.metric(r"bezel_engine_restarts_total\{") == 1


def test_sigterm_lets_a_running_stream_finish(tmp_path: Path) -> None:
    server = start(tmp_path)
    try:
        server.wait_ready()
        chunks = server.client.completions.create(
            model=MODEL,
            prompt="Once upon a time",
            max_tokens=48,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        reasons = []
        for i, chunk in enumerate(chunks):
            if i == 2:
                server.process.send_signal(signal.SIGTERM)
            reasons.append(chunk.choices[0].finish_reason)
        assert reasons[-1] == "length"
        assert server.process.wait(30) == 0
    finally:
        server.process.kill()
