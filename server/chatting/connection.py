"""A server with OpenAI's API as `bezel chat` sees it: JSON in, chunks of a stream out.

Blocking, so that Ctrl-C ends whatever is waited for; the connection closes, and with it the request
at the server.
"""

import json
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Any

import httpx

from bezel.engine.errors import ConfigError
from bezel.engine.logs import one_line
from bezel.server.chatting.settings import ClientSettings
from bezel.server.stream_chunks import NotAChunk, choices_of, read_chunk

_CONNECT_TIMEOUT_S = 10.0
_LOOK_UP_TIMEOUT_S = 30.0
_MAX_MESSAGE = 500


class ServerFailed(Exception):
    """There is no answer, or no more of it; the message is one line for the user."""


class Connection:
    """To the server that the settings name.

    Raises:
        ConfigError: the URL can't be one.
    """

    def __init__(self, settings: ClientSettings) -> None:
        self.url = settings.root_url
        self._model = settings.model
        key = settings.api_key
        try:
            url = httpx.URL(self.url)
            if url.scheme not in ("http", "https"):
                raise ConfigError(f"--url {settings.url} doesn't begin with http:// or https://")
            if not url.host:
                raise ConfigError(f"--url {settings.url} names no host")
            self._client = httpx.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),
                trust_env=False,  # the server is as good as always on this machine
            )
        except httpx.InvalidURL as error:
            raise ConfigError(f"--url {settings.url}: {error}") from None
        except UnicodeEncodeError:
            raise ConfigError("the API key has characters that a header can't have") from None

    def __enter__(self) -> "Connection":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.close()

    @property
    def model(self) -> str:
        """The one to ask.

        Raises:
            ServerFailed: the server can't be asked which it has.
        """
        if self._model is None:
            self._model = self._first_model()
        return self._model

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The chunks of a streamed answer.

        Raises:
            ServerFailed: the server refuses, breaks off, or can't be reached.
        """
        # In ASCII: half a surrogate pair, which a command line may have, has no other form.
        asked = json.dumps({"model": self.model, **body, "stream": True}).encode("ascii")
        kind = {"Content-Type": "application/json"}
        is_done = False
        try:
            with self._client.stream("POST", path, content=asked, headers=kind) as response:
                if response.status_code != 200:
                    response.read()
                    raise ServerFailed(_refusal(response))
                for data in _events(response.iter_bytes()):
                    if data == b"[DONE]":
                        is_done = True
                        continue
                    chunk = _chunk(data)
                    is_done = is_done or _is_last(chunk)
                    yield chunk
        except httpx.HTTPError as error:
            raise ServerFailed(self._unreachable(error)) from None
        if not is_done:
            raise ServerFailed("the answer broke off")

    def _first_model(self) -> str:
        try:
            response = self._client.get("/v1/models", timeout=_LOOK_UP_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise ServerFailed(self._unreachable(error)) from None
        if response.status_code != 200:
            raise ServerFailed(_refusal(response))
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise ServerFailed(f"{response.url} lists no model; name one with --model") from None

    def _unreachable(self, error: httpx.HTTPError) -> str:
        reason = str(error) or type(error).__name__
        if isinstance(error, httpx.ConnectError):
            return f"can't reach {self.url}: {reason}; is `bezel serve` running?"
        return f"lost {self.url}: {reason}"


def _refusal(response: httpx.Response) -> str:
    """The status and what the server says of it, in one line."""
    message: Any = response.text
    try:
        message = response.json()
        message = message["error"]["message"]
    except (ValueError, LookupError, TypeError):
        pass
    said = f"HTTP {response.status_code}: {_one_line(message)}"
    wait = response.headers.get("retry-after")
    return said if wait is None else f"{said} (try again in {wait} s)"


def _one_line(message: Any) -> str:
    # Whatever the server says, it can't steer a terminal.
    return one_line(" ".join(str(message).split())[:_MAX_MESSAGE])


def _chunk(data: bytes) -> dict[str, Any]:
    try:
        chunk = read_chunk(data)
    except NotAChunk as error:
        raise ServerFailed(_one_line(f"the server streams nonsense: {error}")) from None
    if told := chunk.get("error"):
        raise ServerFailed(_one_line(told.get("message") if isinstance(told, dict) else told))
    return chunk


def _is_last(chunk: dict[str, Any]) -> bool:
    return any(choice.get("finish_reason") for choice in choices_of(chunk))


def _events(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The data of each server-sent event, as soon as its line is whole; comments are left out.

    httpx would also end lines where JSON may have a U+2028.
    """
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()
