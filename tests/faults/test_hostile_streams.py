"""A server gone mad: our own clients get to an end or say what is wrong, whatever it streams."""

import asyncio
import io
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

import httpx
import pytest
from calm import Scale
from mutations import damage, damage_json, dumps

from bezel.server.benchmarking.measure import Asker
from bezel.server.benchmarking.results import results_of
from bezel.server.benchmarking.settings import ServeBenchmark
from bezel.server.chatting.answering import Outcome
from bezel.server.chatting.chat import Chat
from bezel.server.chatting.connection import Connection
from bezel.server.chatting.conversation import Conversation
from bezel.server.chatting.display import Display
from bezel.server.chatting.settings import ChatSettings
from bezel.server.cli import main

CALL = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
DELTAS: list[dict[str, Any]] = [
    {"role": "assistant", "content": ""},
    {"reasoning_content": "hm"},
    {"content": "héllo\u2028"},
    {"tool_calls": [CALL]},
    {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
]
DETAILS = {"prompt_tokens_details": {"cached_tokens": 1}}
USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8, **DETAILS}
ERROR = {"error": {"message": "no more", "type": "server_error", "param": None, "code": None}}


class MadServer:
    """Answers each connection with the bytes it was given for it, and closes it."""

    def __init__(self, listening: socket.socket) -> None:
        self._socket = listening
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.answer = b""

    def serve(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:  # closed: the test is over
                return
            with sock:
                self._exchange(sock)

    def _exchange(self, sock: socket.socket) -> None:
        try:
            asked = b""
            while not (head := asked.partition(b"\r\n\r\n"))[1]:
                asked += sock.recv(1 << 16)
            length = int(re.search(rb"(?i)content-length: (\d+)", head[0])[1])  # type: ignore[index]
            rest = len(head[2])
            while rest < length:
                rest += len(sock.recv(1 << 16))
            sock.sendall(self.answer)
            sock.shutdown(socket.SHUT_WR)
        except OSError:  # the client has seen enough
            pass


@pytest.fixture
def mad() -> Iterator[MadServer]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = MadServer(listening)
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        yield server
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def chunks(random: Random) -> list[dict[str, Any]]:
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in DELTAS]
    texts = [{"index": 0, "text": "a", "finish_reason": None}]
    ends = [{"index": 0, "delta": {}, "finish_reason": random.choice(("stop", "length"))}]
    found: list[dict[str, Any]] = [
        {"id": "x", "choices": [choice], "usage": None} for choice in [*choices, *texts, *ends]
    ]
    found.append({"id": "x", "choices": [], "usage": USAGE})
    return [*found, ERROR] if random.random() < 0.1 else found


def framed(body: bytes, random: Random) -> bytes:
    """An HTTP response, in chunks of any size or to the end of the connection."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    if random.random() < 0.5:
        return head + b"Connection: close\r\n\r\n" + body
    sent = b""
    while body:
        size = random.choice((1, 7, 100))
        sent += b"%x\r\n%b\r\n" % (len(body[:size]), body[:size])
        body = body[size:]
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + sent + b"0\r\n\r\n"


def mad_answer(random: Random) -> bytes:
    """A stream with damage: in the JSON of an event, in the bytes of events, or in those of HTTP;
    or cut off; or only a refusal with damage."""
    told = chunks(random)
    kind = random.randrange(5)
    if kind == 0:
        for _ in range(random.randint(1, 3)):
            at = random.randrange(len(told))
            told[at] = damage_json(random, json.loads(json.dumps(told[at])))
    body = b"".join(b"data: " + dumps(chunk) + b"\n\n" for chunk in told) + b"data: [DONE]\n\n"
    if kind == 1:
        body = damage(random, body)
    answer = framed(body, random)
    if kind == 2:
        return damage(random, answer)
    if kind == 3:
        return answer[: random.randrange(len(answer))]
    if kind == 4:
        refusal = dumps(damage_json(random, json.loads(json.dumps(ERROR))))
        head = b"HTTP/1.1 %d No\r\nRetry-After: x\r\nConnection: close\r\n\r\n"
        return head % random.choice((400, 429, 503)) + damage(random, refusal)
    return answer


def test_the_chat_client(mad: MadServer, scale: Scale, capsys: pytest.CaptureFixture[str]) -> None:
    random = Random(11)
    settings = ChatSettings(url=mad.url, model="m")
    outcomes: Counter[Outcome] = Counter()
    with Connection(settings) as connection:
        for number in range(scale.num_streams // 2):
            mad.answer = mad_answer(random)
            out, notes = io.StringIO(), io.StringIO()
            display = Display(out, notes, is_terminal=True, is_styled=number % 2 == 0)
            conversation = Conversation(settings)
            chat = Chat(connection, conversation, display, lambda prompt: "42")
            outcome = chat.answer("hi")
            outcomes[outcome] += 1
            told = capsys.readouterr().err
            is_told = re.fullmatch(r"bezel: error: .+\n", told) is not None
            assert is_told == (outcome is Outcome.FAILED), (told, mad.answer)
            # What is left of it can be sent again.
            dumps(conversation.body())
    assert outcomes[Outcome.ANSWERED] > outcomes.total() / 20
    assert outcomes[Outcome.FAILED] > outcomes.total() / 3


def test_the_benchmark_client(mad: MadServer, scale: Scale) -> None:
    random = Random(12)
    benchmark = ServeBenchmark(slo_ttft=1.0, slo_itl=1.0)

    async def run() -> Counter[bool]:
        failed: Counter[bool] = Counter()
        async with httpx.AsyncClient(base_url=mad.url, timeout=60, trust_env=False) as client:
            asker = Asker(
                client=client,
                endpoint="chat",
                model="m",
                output_len=8,
                ignore_eos=False,
                timeout_s=60,
                clock=time.perf_counter,
            )
            for _ in range(scale.num_streams // 2):
                mad.answer = mad_answer(random)
                measured = await asker.ask([{"role": "user", "content": "hi"}])
                assert measured.error != "timeout", mad.answer
                failed[measured.error is not None] += 1
                results_of(benchmark, [measured], 0, measured.sent_s)
        return failed

    failed = asyncio.run(run())
    assert failed[False] > failed.total() / 20
    assert failed[True] > failed.total() / 3


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_the_commands(
    command: str, mad: MadServer, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    random = Random(13)
    for _ in range(60):
        mad.answer = mad_answer(random)
        code = main([command, "--url", mad.url, "--model", "m", "hi"])
        told = capsys.readouterr().err
        assert code in (0, 1), (code, told, mad.answer)
        assert (code == 1) == ("bezel: error: " in told), (told, mad.answer)
