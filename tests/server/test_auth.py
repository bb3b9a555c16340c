"""Who is let in: API keys from flag and file, and web pages of other origins."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from bezel.engine.errors import ConfigError
from bezel.server.app import create_app
from bezel.server.auth import read_api_keys
from bezel.server.config import ServerConfig
from bezel.server.state import ServerState

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


@pytest.fixture
def make_app(make_state: Callable[..., ServerState]) -> Callable[..., FastAPI]:
    return lambda **settings: create_app(make_state(**settings))


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/metrics", "/version", "/openapi.json", "/docs", "/nowhere", CHAT, "/health/x"],
)
async def test_without_a_key_everything_is_closed(
    make_app: Any, client_for: Any, path: str
) -> None:
    async with client_for(make_app(api_key=("secret",))) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            response = await client.get(path, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_probes_need_no_key(make_app: Any, client_for: Any, path: str) -> None:
    async with client_for(make_app(api_key=("secret",))) as client:
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("key", ["first", "sécond"])
async def test_any_of_the_keys_opens(make_app: Any, client_for: Any, key: str) -> None:
    async with client_for(make_app(api_key=("first", "sécond"))) as client:
        headers = {b"authorization": b"bearer  " + key.encode()}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200


async def test_without_keys_everything_is_open(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models")).status_code == 200


async def test_a_key_may_come_as_anthropics_clients_send_it(make_app: Any, client_for: Any) -> None:
    async with client_for(make_app(api_key=("secret",))) as client:
        assert (await client.get("/v1/models", headers={"x-api-key": "secret"})).status_code == 200
        assert (await client.get("/v1/models", headers={"x-api-key": "other"})).status_code == 401
        # A wrong Bearer token isn't saved by the other header: one of them is meant.
        both = {"authorization": "Bearer wrong", "x-api-key": "secret"}
        assert (await client.get("/v1/models", headers=both)).status_code == 401


async def test_anthropics_routes_refuse_in_its_words(make_app: Any, client_for: Any) -> None:
    async with client_for(make_app(api_key=("secret",))) as client:
        response = await client.post("/v1/messages", json={}, headers={"x-request-id": "r1"})
    message = "This server wants an API key: Authorization: Bearer <key>."
    error = {"type": "authentication_error", "message": message}
    assert response.status_code == 401
    assert response.json() == {"type": "error", "error": error, "request_id": "r1"}


def test_keys_of_flag_and_file_add_up(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# team one\none\n\n  two  \n", encoding="utf-8")
    config = ServerConfig(api_key=("zero",), api_key_file=str(path))
    assert read_api_keys(config) == ["zero", "one", "two"]
    assert read_api_keys(ServerConfig()) == []


def test_a_file_without_keys_does_not_open_the_server(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with pytest.raises(ConfigError, match="can't be read"):
        read_api_keys(ServerConfig(api_key_file=str(path)))
    path.write_text("\n# none yet\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no key"):
        read_api_keys(ServerConfig(api_key_file=str(path)))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="can't be read"):
        read_api_keys(ServerConfig(api_key_file=str(path)))


PREFLIGHT = {
    "origin": "https://app.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


async def test_pages_of_other_origins_are_kept_out_by_default(client: httpx.AsyncClient) -> None:
    response = await client.options(CHAT, headers=PREFLIGHT)
    assert response.status_code == 405
    response = await client.get("/v1/models", headers={"origin": "https://app.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]


async def test_named_origins_are_let_in(make_app: Any, client_for: Any) -> None:
    app = make_app(allowed_origins=("https://app.example",), api_key=("secret",))
    async with client_for(app) as client:
        asked = await client.options(CHAT, headers=PREFLIGHT)
        assert asked.status_code == 200  # browsers ask without the key
        assert asked.headers["access-control-allow-origin"] == "https://app.example"
        other = await client.options(CHAT, headers=PREFLIGHT | {"origin": "https://evil.example"})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers
        refused = await client.get("/v1/models", headers={"origin": "https://app.example"})
        assert refused.status_code == 401
        # Or the page could not read why it was refused.
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        assert "x-request-id" in refused.headers["access-control-expose-headers"]


def test_credentials_from_everywhere_are_a_mistake() -> None:
    with pytest.raises(ConfigError, match="allow_credentials"):
        ServerConfig(allowed_origins=("*",), allow_credentials=True)


async def test_each_key_is_a_tenant_of_its_own(
    make_app: Any, client_for: Any, engine: Any, say: Any, chat: Any
) -> None:
    say("x")
    async with client_for(make_app(api_key=("first", "second"))) as client:
        for key in ("second", "first", "second"):
            headers = {"authorization": f"Bearer {key}"}
            assert (await client.post(CHAT, json=chat(), headers=headers)).status_code == 200
    assert [params.tenant for _, params in engine.requests] == ["key 1", "key 0", "key 1"]


async def test_without_keys_all_are_one_tenant(
    client: httpx.AsyncClient, engine: Any, say: Any, chat: Any
) -> None:
    say("x")
    assert (await client.post(CHAT, json=chat())).status_code == 200
    assert [params.tenant for _, params in engine.requests] == [""]
