"""`GET /`: a page to chat on, one file without a build step.

It holds no secret, so it needs no API key; what it asks the server for does. Browsers run and load
nothing but what this file itself contains: the policy sent with it names its script and its styles
by their hashes.
"""

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

_FILE = Path(__file__).with_name("index.html")


def chat_page() -> Callable[[Request], Awaitable[Response]]:
    """The route's handler, with the file read and hashed once."""
    body = _FILE.read_bytes()
    headers = {
        "Content-Security-Policy": content_security_policy(body),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
    }

    async def page(request: Request) -> Response:
        """A page to chat on, for people."""
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type="text/html")

    return page


def content_security_policy(html: bytes) -> str:
    """What a page may do: run and apply what stands in it, and talk to the server it came from."""
    allowed = {
        "default-src": "'none'",
        "script-src": _hashes(html, b"script"),
        "style-src": _hashes(html, b"style"),
        "connect-src": "'self'",
        "img-src": "'self' data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {sources}" for name, sources in allowed.items())


def _hashes(html: bytes, element: bytes) -> str:
    texts = re.findall(rb"<%s>(.*?)</%s>" % (element, element), html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in texts]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
