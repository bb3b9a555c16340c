"""Clients that leave, send nothing, or read nothing, many at once."""

import asyncio
import json
import socket
from collections import Counter
from contextlib import ExitStack
from random import Random

from calm import CHAT, MODEL, Scale, Watch, body, until
from raw_http import answers_in, connected, post, read_all
from server_process import Server

ENDLESS = {"max_tokens": 1000, "ignore_eos": True}
CUT_OFF = r"INFO server \[\S+\] closed a connection: its client read nothing for 2 s$"
MOMENTS = ("while connecting", "in the head", "in the body", "after sending", "at a byte")


async def leave(port: int, random: Random) -> str:
    """Ask for something and disconnect at a random moment; returns which one it was."""
    asked = body(random.choice((1, 50, 800)), stream=random.random() < 0.7, **ENDLESS)
    asked["max_tokens"] = random.choice((1, 30, 200))
    data = post(CHAT, asked)
    head = data.index(b"\r\n\r\n") + 4
    moment = random.choice(MOMENTS)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        match moment:
            case "in the head":
                writer.write(data[: random.randrange(1, head)])
            case "in the body":
                writer.write(data[: random.randrange(head, len(data))])
            case "after sending" | "at a byte":
                writer.write(data)
        await writer.drain()
        if moment == "at a byte":
            await reader.read(random.choice((1, 200, 1000, 3000)))
        elif moment != "while connecting":
            await asyncio.sleep(random.choice((0, 0, 0.01, 0.1)))
        if random.random() < 0.5:
            writer.transport.abort()  # a reset; otherwise in order
    finally:
        writer.close()
    return moment


async def crowd(port: int, num: int, seconds: float) -> Counter[str]:
    """So many over so long a time, thirty at once: most of them have to wait for a place."""
    random = Random(1)
    moments: Counter[str] = Counter()

    async def one(start_s: float) -> None:
        await asyncio.sleep(start_s)
        moments[await leave(port, random)] += 1

    await asyncio.gather(*(one(seconds * (i // 30 * 30) / num) for i in range(num)))
    return moments


def test_random_disconnects(server: Server, watch: Watch, scale: Scale) -> None:
    aborted = [
        rf'bezel_request_aborts_total\{{.*phase="{phase}",reason="client"'
        for phase in ("waiting", "decode")
    ]
    before = [server.metric(pattern) for pattern in aborted]
    moments = asyncio.run(crowd(server.port, scale.num_disconnects, scale.disconnects_s))
    assert all(moments[moment] > 0 for moment in MOMENTS), moments
    watch.assert_calm()
    for pattern, num in zip(aborted, before, strict=True):
        assert server.metric(pattern) > num, pattern
    assert watch.grown_kib() < 65_536


def test_half_open_connections(server: Server, watch: Watch, scale: Scale) -> None:
    """Others are served while they are there, and each gets an end."""
    begun = [
        b"",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Le",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
    ]
    with ExitStack() as stack:
        half_open = [
            stack.enter_context(connected(server.port)) for _ in range(scale.num_half_open)
        ]
        for number, sock in enumerate(half_open):
            sock.sendall(begun[number % len(begun)])
        watch.assert_answers()
        open_fds = server.metric(r"process_open_fds")
        assert open_fds > scale.num_half_open, "they are open still"
        for number, sock in enumerate(half_open):
            told = [answer.status for answer in answers_in(read_all(sock))]
            assert told == ([] if number % len(begun) == 0 else [408]), number
    watch.assert_calm()
    until(lambda: server.metric(r"process_open_fds") < open_fds - scale.num_half_open / 2)


def test_slow_readers(server: Server, watch: Watch) -> None:
    """Six take nothing of long answers; they are cut off, and what is kept for them is bounded."""
    asked = body(stream=True, logprobs=True, top_logprobs=20, n=1, **ENDLESS)

    def num_cut_off() -> int:
        return server.log.read_text(encoding="utf-8").count("its client read nothing for 2 s")

    before = num_cut_off()
    with ExitStack() as stack:
        for _ in range(6):
            sock = stack.enter_context(connected(server.port, receive_buffer_bytes=4096))
            sock.sendall(post(CHAT, asked))
        until(lambda: server.metric(r"bezel_num_requests_running\{") == 6)
        watch.assert_answers()
        until(lambda: num_cut_off() == before + 6)
    watch.assert_calm(CUT_OFF)
    assert watch.grown_kib() < 65_536


def test_a_hundred_megabytes_of_body(server: Server, watch: Watch) -> None:
    """Refused by its declared length before it comes, and chunked as soon as there is too much."""
    before_kib = watch.grown_kib()
    size = 100_000_000
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    piece = json.dumps({"model": MODEL, "prompt": "a" * 999_000}).encode()
    for framing in (f"Content-Length: {size}\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n"):
        with connected(server.port) as sock:
            sock.sendall(head.encode() + framing.encode())
            is_chunked = "chunked" in framing
            num_sent = send_while_wanted(sock, piece, size, is_chunked)
            answers = answers_in(read_all(sock))
        assert num_sent < size, "it was cut off before the end"
        # A client that goes on sending may lose the answer to the reset that stops it.
        assert [answer.status for answer in answers] in ([413], []), answers
    # One that waits for the answer gets it.
    with connected(server.port) as sock:
        sock.sendall(head.encode() + f"Content-Length: {size}\r\n\r\n".encode())
        [answer] = answers_in(read_all(sock))
    assert (answer.status, answer.code) == (413, "request_too_large")
    assert watch.grown_kib() - before_kib < 65_536
    watch.assert_calm()


def send_while_wanted(sock: socket.socket, piece: bytes, size: int, is_chunked: bool) -> int:
    framed = b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece
    num_sent = 0
    try:
        while num_sent < size:
            sock.sendall(framed)
            num_sent += len(piece)
    except ConnectionError:
        pass
    return num_sent
