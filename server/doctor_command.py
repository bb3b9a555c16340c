"""`bezel doctor`: what could keep a server from starting, or is wrong with one that runs."""

import argparse
import socket
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bezel.engine.errors import ConfigError
from bezel.server.settings import URL_VARIABLE, Settings

if TYPE_CHECKING:
    import httpx

    from bezel.engine.diagnostics.checks import Finding

_DEFAULT_URL = "http://127.0.0.1:8000"
_TIMEOUT_S = 5.0
_NAME_WIDTH = 15


def add_parser(commands: Any) -> None:
    """Add `doctor` to the subparsers `commands`."""
    parser = commands.add_parser(
        "doctor",
        help="look for what could go wrong here, and say what to do",
        description="Check Python, torch, device, caches, memory, the settings in BEZEL_* "
        "variables, and a server that runs. The exit code is 1 if something fails.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--url", help=f"the server to look at, running or not [default: {_DEFAULT_URL}]"
    )


def run(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Print a line for each check, and a remedy below those that are not well; returns 1 if one
    failed.

    Raises:
        ConfigError: the URL can't be one.
    """
    import httpx

    from bezel.engine.diagnostics.checks import Status, run_checks

    url = getattr(arguments, "url", environ.get(URL_VARIABLE, _DEFAULT_URL))
    try:
        client = httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False)
    except httpx.InvalidURL as error:
        raise ConfigError(f"--url {url}: {error}") from None
    has_failed = False
    with client:
        for findings in (run_checks(), check_settings(environ), check_server(client)):
            for finding in findings:
                has_failed = has_failed or finding.status is Status.FAIL
                _show(finding)
    return int(has_failed)


def check_settings(environ: Mapping[str, str]) -> Iterator["Finding"]:
    """Whether `bezel serve` could use the variables that are set, and the file they name."""
    from bezel.engine.diagnostics.checks import Finding, Status

    name = "settings"
    try:
        settings = Settings.of({}, environ)
        settings.config()
    except ConfigError as error:
        yield Finding(name, Status.FAIL, error.message, "set it right, or unset it")
        return
    for warning in settings.warnings:
        yield Finding(name, Status.WARN, warning)
    if not settings.warnings:
        given = [s.option.name for s in settings.settings if s.source is not None]
        yield Finding(name, Status.OK, f"given: {', '.join(given) or 'none'}")


def check_server(client: "httpx.Client") -> Iterator["Finding"]:
    """A server that answers is asked how it is; otherwise its port should be free."""
    import httpx

    from bezel.engine.diagnostics.checks import Finding, Status

    name = "server"
    try:
        version = client.get("/version")
        found = {path: client.get(path) for path in ("/health", "/ready")}
    except (httpx.ConnectError, httpx.UnsupportedProtocol) as error:
        yield _port(client.base_url, str(error))
        return
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        hint = "something else may listen there, or the server hangs: see its log"
        yield Finding(name, Status.FAIL, f"{client.base_url} doesn't answer: {reason}", hint)
        return
    said = _json(version).get("version", "unknown")
    if version.status_code == 401:
        said = "for those with a key"
    yield Finding(name, Status.OK, f"{client.base_url} answers; its version is {said}")
    if not found["/health"].is_success:
        hint = "the engine makes no progress: see the server's log, then restart it"
        yield Finding(name, Status.FAIL, _status("/health", found["/health"]), hint)
    if not found["/ready"].is_success:
        hint = "it loads, or is being shut down; its log tells which"
        yield Finding(name, Status.WARN, _status("/ready", found["/ready"]), hint)


def _port(url: "httpx.URL", reason: str) -> "Finding":
    """Of a server that isn't there."""
    from bezel.engine.diagnostics.checks import Finding, Status

    if url.host not in ("127.0.0.1", "::1", "localhost"):
        return Finding("server", Status.FAIL, f"can't reach {url}: {reason}", "is its URL right?")
    port = url.port or (443 if url.scheme == "https" else 80)
    family = socket.AF_INET6 if url.host == "::1" else socket.AF_INET
    try:
        socket.create_server((url.host, port), family=family).close()
    except OSError as error:
        text = f"can't listen on port {port}: {error.strerror}"
        return Finding("server", Status.FAIL, text, "take another --port")
    return Finding("server", Status.OK, f"none at {url}, its port is free")


def _status(path: str, response: "httpx.Response") -> str:
    error = _json(response).get("error")
    message = error.get("message", "") if isinstance(error, dict) else ""
    return f"{path} says {response.status_code}: {message}".rstrip(": ")


def _json(response: "httpx.Response") -> dict[str, Any]:
    try:
        content = response.json()
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {}


def _show(finding: "Finding") -> None:
    print(f"{finding.status:4}  {finding.name:{_NAME_WIDTH}} {finding.text}")
    if finding.hint:
        print(f"{'':6}{'':{_NAME_WIDTH}} → {finding.hint}")
