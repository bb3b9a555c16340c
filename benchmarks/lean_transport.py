"""HTTP/1.1 for a client that mustn't be in the way of the server on the same cores.

An `httpx` transport of asyncio's streams alone, with which a load takes half of the time of a core
that it takes with httpx's own. It knows what Bezel answers with, and no more: bodies of a length,
or in chunks, on connections that are kept.
"""

import asyncio
from collections.abc import AsyncIterator

import httpx

_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class LeanTransport(httpx.AsyncBaseTransport):
    """As many connections as there are requests at once, of which the idle ones are used again."""

    def __init__(self) -> None:
        self._idle: list[_Connection] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """
        Raises:
            httpx.NetworkError: the server can't be reached, or is gone before its answer.
        """
        head = [f"{request.method} {request.url.raw_path.decode()} HTTP/1.1"]
        head += [f"{name}: {value}" for name, value in request.headers.items()]
        data = "\r\n".join([*head, "\r\n"]).encode() + await request.aread()
        try:
            connection = await self._connection(request.url)
            connection[1].write(data)
            status, *lines = (await connection[0].readuntil(b"\r\n\r\n")).decode().split("\r\n")
        except (OSError, EOFError) as error:
            raise httpx.NetworkError(str(error)) from error
        headers = httpx.Headers([line.split(": ", 1) for line in lines if line])
        body = _Body(self, connection, headers)
        return httpx.Response(int(status.split()[1]), headers=headers, stream=body)

    async def aclose(self) -> None:
        while self._idle:
            self._idle.pop()[1].close()

    def keep(self, connection: _Connection) -> None:
        """Take back a connection whose answer has been read."""
        self._idle.append(connection)

    async def _connection(self, url: httpx.URL) -> _Connection:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(url.host, url.port)


class _Body(httpx.AsyncByteStream):
    """What comes after the head; read in full, or the connection is closed."""

    def __init__(
        self, transport: LeanTransport, connection: _Connection, headers: httpx.Headers
    ) -> None:
        self._transport, self._connection, self._headers = transport, connection, headers
        self._is_read = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        reader = self._connection[0]
        try:
            if self._headers.get("transfer-encoding") == "chunked":
                while length := int(await reader.readuntil(b"\r\n"), 16):
                    yield (await reader.readexactly(length + 2))[:-2]
                await reader.readexactly(2)
            else:
                yield await reader.readexactly(int(self._headers["content-length"]))
        except (OSError, EOFError) as error:
            raise httpx.ReadError(str(error)) from error
        self._is_read = True

    async def aclose(self) -> None:
        if self._is_read and self._headers.get("connection") != "close":
            self._transport.keep(self._connection)
        else:
            self._connection[1].close()
