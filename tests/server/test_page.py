"""The chat page as HTTP has it: what it is sent with, who gets it, what browsers may do with it.

What it does in a browser is tested in tests/e2e.
"""

import base64
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from bezel.engine.metrics import Metrics
from bezel.server.app import create_app
from bezel.server.config import ServerConfig
from bezel.server.state import ServerState

pytestmark = pytest.mark.anyio

FILE = Path(__file__).resolve().parent.parent.parent / "server" / "page" / "index.html"
HTML = FILE.read_text(encoding="utf-8")


@pytest.fixture
def make_app(make_state: Callable[..., ServerState]) -> Callable[..., FastAPI]:
    return lambda **settings: create_app(make_state(**settings))


async def test_the_page_is_the_file(client: httpx.AsyncClient) -> None:
    response = await client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.text == HTML


@pytest.mark.parametrize("element", ["script", "style"])
async def test_policy_names_what_stands_in_the_file_and_nothing_else(
    client: httpx.AsyncClient, element: str
) -> None:
    policy = (await client.get("/")).headers["content-security-policy"]
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    begin, end = HTML.index(f"<{element}>") + len(f"<{element}>"), HTML.index(f"</{element}>")
    digest = base64.b64encode(hashlib.sha256(HTML[begin:end].encode()).digest()).decode()
    assert directives[f"{element}-src"] == f"'sha256-{digest}'"
    assert HTML.count(f"<{element}") == 1
    assert directives["default-src"] == "'none'"
    assert directives["connect-src"] == "'self'"
    assert directives["frame-ancestors"] == directives["form-action"] == "'none'"


async def test_browsers_keep_it_to_themselves(client: httpx.AsyncClient) -> None:
    headers = (await client.get("/")).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"


async def test_an_unchanged_page_is_not_sent_again(client: httpx.AsyncClient) -> None:
    headers = (await client.get("/")).headers
    assert headers["cache-control"] == "no-cache"
    again = await client.get("/", headers={"if-none-match": f'W/"x", {headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert (await client.get("/", headers={"if-none-match": '"other"'})).status_code == 200


async def test_the_page_needs_no_key_and_its_requests_do(make_app: Any, client_for: Any) -> None:
    async with client_for(make_app(api_key=("secret",))) as client:
        assert (await client.get("/")).text == HTML
        for path in ("/v1/models", "/metrics", "/index.html", "/%2F"):
            assert (await client.get(path)).status_code == 401


async def test_the_page_is_there_before_the_model(client_for: Any) -> None:
    async with client_for(create_app(ServerState(ServerConfig(), Metrics()))) as client:
        assert (await client.get("/")).status_code == 200


@pytest.mark.parametrize("keys", [(), ("secret",)])
async def test_the_page_can_be_turned_off(make_app: Any, client_for: Any, keys: Any) -> None:
    async with client_for(make_app(webui=False, api_key=keys)) as client:
        response = await client.get("/")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


async def test_only_get(client: httpx.AsyncClient) -> None:
    response = await client.post("/", json={})
    assert response.status_code == 405
    assert response.headers["allow"] == "GET"


def test_nothing_is_loaded_from_anywhere() -> None:
    """No address in the file but that which names a format, no code where the policy has none."""
    addresses = set(re.findall(r"""https?://[^\s'"\\]+""", HTML))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\ssrc=|@import|url\(|\son[a-z]+=\"|\sstyle=|innerHTML|outerHTML", HTML)
    assert len(HTML.splitlines()) <= 700, "one file that one person can read"
