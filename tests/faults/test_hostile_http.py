"""Bytes that no honest client sends: each gets a 4xx, an answer or a closed connection, soon."""

import asyncio
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from random import Random

from calm import CHAT, MODEL, Scale, Watch, body
from mutations import damage, damage_json, dumps
from raw_http import Answer, answers_in, connected, is_whole, post, read_all
from server_process import Server

# uvicorn's line for what isn't HTTP, and ours for a field that nobody knows.
TOLD = [
    r"WARNING server \[\S+\] Invalid HTTP request received\.$",
    r"WARNING server \[\S+\] ignoring the unknown request field ",
]
END = b"\r\n\r\n"
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2
LIMIT_KIB = 65_536


def asking(text: str) -> bytes:
    """A request whose message has this text, as it is, between quotes."""
    asked = f'{{"model": "{MODEL}", "max_tokens": 2, "messages": [{{"role": "user", "content": '
    return post(CHAT, f'{asked}"{text}"}}]}}'.encode())


def with_fields(text: str) -> bytes:
    """A good request and more members, as they are."""
    return post(CHAT, json.dumps(body(max_tokens=2)).encode()[:-1] + f", {text}}}".encode())


def framed(lines: bytes, sent: bytes) -> bytes:
    return HEAD + lines + END + sent


GOOD = json.dumps(body(max_tokens=2)).encode()
DEPTH = 100_000
# What is sent → the statuses of the answers.
CASES: dict[str, tuple[bytes, list[int]]] = {
    "arrays in arrays": (post(CHAT, b"[" * DEPTH), [400]),
    "closed arrays in arrays": (post(CHAT, b"[" * DEPTH + b"]" * DEPTH), [400]),
    "objects in objects": (post(CHAT, b'{"a":' * DEPTH + b"1" + b"}" * DEPTH), [400]),
    "nested in a field": (with_fields('"tools": ' + "[" * DEPTH + "]" * DEPTH), [400]),
    "nested in an unknown field": (with_fields('"x": ' + "[" * DEPTH + "]" * DEPTH), [400]),
    "an integer of 100,000 digits": (with_fields('"seed": ' + "9" * DEPTH), [400]),
    "a huge float": (with_fields('"temperature": 1e999'), [400]),
    "not a number": (with_fields('"temperature": NaN'), [400]),
    "more than a token can count": (with_fields('"max_tokens": 1' + "0" * 400), [400]),
    "half a surrogate pair": (asking("\\ud800"), [400]),
    "escaped zero": (asking("a\\u0000b"), [200]),
    "a zero byte": (asking("a\0b"), [400]),
    "not UTF-8": (post(CHAT, GOOD.replace(b"a ", b"\xff\xfe")), [400]),
    "surrogates as bytes": (post(CHAT, GOOD.replace(b"a ", b"\xed\xa0\x80")), [400]),
    "too long for its bytes": (post(CHAT, GOOD.replace(b"a ", b"\xc0\x80")), [400]),
    "UTF-16": (post(CHAT, GOOD.decode().encode("utf-16")), [200]),
    "a byte order mark": (post(CHAT, b"\xef\xbb\xbf" + GOOD), [200]),
    "keys twice": (with_fields('"model": "x", "model": "y"'), [404]),
    "keys a thousand times": (with_fields(", ".join(['"max_tokens": 2'] * 1000)), [200]),
    "100,000 unknown fields": (with_fields(", ".join(f'"x{i}": 0' for i in range(DEPTH))), [200]),
    "no object": (post(CHAT, b"7"), [400]),
    "nothing": (post(CHAT, b""), [400]),
    "a length that is none": (framed(b"Content-Length: seven", GOOD), [400]),
    "a negative length": (framed(b"Content-Length: -7", GOOD), [400]),
    "a length of 10^40": (framed(b"Content-Length: 1" + b"0" * 40, GOOD), [400]),
    "two lengths": (framed(b"Content-Length: 7\r\nContent-Length: 8", GOOD), [400]),
    "a length that is too long": (framed(b"Content-Length: 1000", GOOD), [408]),
    "length and chunked": (
        framed(b"Content-Length: 4\r\nTransfer-Encoding: chunked", b"0" + END),
        [400],
    ),
    "chunks that are none": (framed(b"Transfer-Encoding: chunked", b"zz\r\n" + GOOD), [400]),
    "a chunk of 2^64": (framed(b"Transfer-Encoding: chunked", b"1" + b"0" * 16 + b"\r\na"), [400]),
    "an endless size of a chunk": (
        framed(b"Transfer-Encoding: chunked", b"5;" + b"a" * 200_000),
        [431],
    ),
    "chunked twice": (framed(b"Transfer-Encoding: chunked, chunked", b"0" + END), [400]),
    "a coding nobody knows": (framed(b"Transfer-Encoding: gzip", GOOD), [400]),
    "10,000 headers": (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 10_000 + b"\r\n", [431]),
    "a header of 1 MB": (b"GET / HTTP/1.1\r\na: " + b"b" * 1_000_000 + END, [431]),
    "a header without a name": (b"GET / HTTP/1.1\r\n: a" + END, [400]),
    "a header of two lines": (b"GET /health HTTP/1.1\r\nHost: x\r\na: b\r\n c" + END, [400]),
    "a header with a zero byte": (b"GET / HTTP/1.1\r\na: b\0c" + END, [400]),
    "a request line of 1 MB": (b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1" + END, [431]),
    "a method of 1 MB": (b"A" * 1_000_000, [400]),
    "half of it escaped wrongly": (b"GET /%zz%\xff HTTP/1.1\r\nHost: x" + END, [400]),
    "a path that climbs": (b"GET /../../etc/passwd HTTP/1.1\r\nHost: x" + END, [404]),
    "a path with zero bytes": (b"GET /%00%0a%0d HTTP/1.1\r\nHost: x" + END, [404]),
    "a path to elsewhere": (b"GET http://example.com/health HTTP/1.1\r\nHost: x" + END, [200]),
    "a tunnel": (b"CONNECT example.com:443 HTTP/1.1\r\nHost: x" + END, [400]),
    "all of it": (b"OPTIONS * HTTP/1.1\r\nHost: x" + END, [404]),
    "an id with line ends": (b"GET /health HTTP/1.1\r\nX-Request-Id: a\rb" + END, [400]),
    "HTTP/0.9": (b"GET /\r\n", [408]),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
    "HTTP/9.9": (b"GET / HTTP/9.9\r\n\r\n", [400]),
    "TLS": (HELLO, [400]),
    "SSH": (b"SSH-2.0-OpenSSH_9.6\r\n", [400]),
    "a request and garbage": (GET + b"\0\xff garbage" + END, [400]),
    "hundreds at once": (GET * 300, [200] * 300),
    "an upgrade": (
        b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket" + END,
        [200],
    ),
}


def answers_to(port: int, sent: bytes) -> list[Answer]:
    """All that come until the server closes, as it does with idle connections too."""
    with connected(port) as sock:
        try:
            sock.sendall(sent)
        except ConnectionError:
            pass  # it has seen enough
        return answers_in(read_all(sock))


def test_crafted_bytes(server: Server, watch: Watch) -> None:
    with ThreadPoolExecutor(len(CASES)) as pool:
        asking = {
            case: pool.submit(answers_to, server.port, sent) for case, (sent, _) in CASES.items()
        }
        answers = {case: future.result() for case, future in asking.items()}
    told = {case: [answer.status for answer in answers[case]] for case in CASES}
    # Where it closes with bytes unread, the reset may overtake the answer.
    expected = {
        case: [] if told[case] == [] and len(sent) > LIMIT_KIB else statuses
        for case, (sent, statuses) in CASES.items()
    }
    assert told == expected
    errors = [answer for case in CASES for answer in answers[case] if answer.status >= 400]
    assert all(is_an_error(answer) for answer in errors)
    watch.assert_calm(*TOLD)
    assert watch.grown_kib() < LIMIT_KIB


def is_an_error(answer: Answer) -> bool:
    error = json.loads(answer.body)["error"]
    return set(error) == {"message", "type", "param", "code"} and bool(error["message"])


REQUESTS: list[tuple[str, dict[str, object]]] = [
    (CHAT, body(max_tokens=2, stream=True, stream_options={"include_usage": True})),
    (CHAT, body(max_tokens=2, temperature=0, logprobs=True, top_logprobs=2, stop=["a"], n=2)),
    (
        CHAT,
        body(
            max_tokens=2,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
            response_format={"type": "text"},
        ),
    ),
    ("/v1/completions", {"model": MODEL, "prompt": [2, 3], "max_tokens": 2, "echo": True}),
    ("/v1/messages", body(max_tokens=2, system="a", stop_sequences=["b"])),
    ("/v1/responses", {"model": MODEL, "input": "a", "max_output_tokens": 2, "stream": True}),
    ("/tokenize", {"model": MODEL, "prompt": "a"}),
    ("/v1/messages/count_tokens", body()),
]


def hostile(random: Random) -> bytes:
    """A real request with damage: to all of its bytes, to its JSON, or one that is noise."""
    path, asked = random.choice(REQUESTS)
    match random.randrange(4):
        case 0:
            return random.randbytes(random.choice((1, 20, 500, 5000)))
        case 1:
            return post(path, dumps(damage_json(random, json.loads(json.dumps(asked)))))
        case 2:
            return post(path, damage(random, json.dumps(asked).encode()))
    return damage(random, post(path, asked))


async def send(port: int, data: bytes) -> bytes:
    """What comes back, until the first answer is whole or the server closes, as it must."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    try:
        writer.write(data)
        await writer.drain()
        while not is_whole(received) and (piece := await reader.read(1 << 16)):
            received += piece
    except ConnectionError:
        pass
    finally:
        writer.close()
    return received


async def send_all(port: int, num: int) -> Counter[int]:
    """So many with damage, 64 at once; returns how often each status came, 0 where none did."""
    random = Random(7)
    statuses: Counter[int] = Counter()
    places = asyncio.Semaphore(64)

    async def one(data: bytes) -> None:
        async with places, asyncio.timeout(120):
            answers = answers_in(await send(port, data))
        status = answers[0].status if answers else 0
        statuses[status] += 1
        assert status in (0, 200) or 400 <= status < 500, (status, data, answers)
        if status == 200 and answers[0].headers["content-type"].startswith("text/event-stream"):
            assert b"internal_error" not in answers[0].body, data

    async with asyncio.TaskGroup() as group:
        for _ in range(num):
            group.create_task(one(hostile(random)))
    return statuses


def test_random_damage(server: Server, watch: Watch, scale: Scale) -> None:
    statuses = asyncio.run(send_all(server.port, scale.num_hostile))
    assert statuses[200] > scale.num_hostile / 20, "some damage does no harm"
    assert statuses[400] > scale.num_hostile / 4
    watch.assert_calm(*TOLD)
    assert watch.grown_kib() < LIMIT_KIB
