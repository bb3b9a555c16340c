"""The lean HTTP client of benchmarks/overload.py, against a server that answers byte by byte."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from lean_transport import LeanTransport

PLAIN = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\nContent-Length: 5\r\n\r\nno!!!"
CHUNKS = b"3\r\nab\n\r\na\r\n0123456789\r\n0\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS
LAST = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"
SILENT_END = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"  # closed without a word of it
CUT_OFF = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"


class Server:
    """Gives its answers in order, over however many connections."""

    def __init__(self, answers: list[bytes]) -> None:
        self.answers, self.asked, self.num_connections = answers, list[bytes](), 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        while self.answers and (head := await reader.read(65536)):
            self.asked.append(head)
            answer = self.answers.pop(0)
            for byte in answer:
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
            if answer in (LAST, SILENT_END, CUT_OFF):
                break
        writer.close()


def run(answers: list[bytes], test: Callable[[httpx.AsyncClient, Server], Awaitable[None]]) -> None:
    async def main() -> None:
        server = Server(answers)
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        async with asyncio.timeout(20), listening:
            async with httpx.AsyncClient(base_url=url, transport=LeanTransport()) as client:
                await test(client, server)

    asyncio.run(main())


def test_answers_of_a_length_and_in_chunks_come_over_one_connection() -> None:
    async def test(client: httpx.AsyncClient, server: Server) -> None:
        refused = await client.post("/a?b=c", json={"x": 1})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")
        assert refused.text == "no!!!"
        assert (await client.post("/", json=[])).text == "ab\n0123456789"
        assert (await client.get("/")).text == "no!!!"
        assert server.num_connections == 1
        head, _, body = server.asked[0].partition(b"\r\n\r\n")
        assert head.startswith(b"POST /a?b=c HTTP/1.1\r\n") and body == b'{"x":1}'
        assert b"content-length: 7" in head.lower()

    run([PLAIN, CHUNKED, PLAIN], test)


def test_a_connection_whose_answer_was_not_read_is_not_used_again() -> None:
    async def test(client: httpx.AsyncClient, server: Server) -> None:
        async with client.stream("GET", "/"):
            pass
        assert (await client.get("/")).text == "no!!!"
        assert server.num_connections == 2

    run([CHUNKED, PLAIN], test)


# An end that was announced needn't be seen first: some turns of the loop later.
@pytest.mark.parametrize(("last", "turns"), [(LAST, 0), (SILENT_END, 100)])
def test_a_connection_that_the_server_closes_is_not_used_again(last: bytes, turns: int) -> None:
    async def test(client: httpx.AsyncClient, server: Server) -> None:
        assert (await client.get("/")).text == "{}"
        for _ in range(turns):
            await asyncio.sleep(0)
        assert (await client.get("/")).text == "no!!!"
        assert server.num_connections == 2

    run([last, PLAIN], test)


def test_what_goes_wrong_is_an_error_of_httpx() -> None:
    async def test(client: httpx.AsyncClient, server: Server) -> None:
        with pytest.raises(httpx.ReadError):
            await client.get("/")
        with pytest.raises(httpx.NetworkError):
            await client.get("/")

    run([CUT_OFF], test)
