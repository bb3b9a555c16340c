"""The life of the server: socket, loading, draining, exit code."""

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from bezel.engine.errors import CheckpointError, ConfigError, EngineUnavailable
from bezel.server import serve as serve_module
from bezel.server.cli import main
from bezel.server.serve import bind_socket, describe
from bezel.server.state import ServerState

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


def test_port_in_use(busy_port: int) -> None:
    with pytest.raises(ConfigError) as error:
        bind_socket("127.0.0.1", busy_port)
    reason = os.strerror(errno.EADDRINUSE)
    assert error.value.message == f"can't listen on 127.0.0.1:{busy_port}: {reason}"


def test_port_in_use_is_known_before_anything_loads(busy_port: int) -> None:
    argv = ["serve", "/no/such/model", "--port", str(busy_port)]
    command = [sys.executable, "-m", "bezel.server.cli", *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    reason = os.strerror(errno.EADDRINUSE)
    assert done.stderr == f"bezel: error: can't listen on 127.0.0.1:{busy_port}: {reason}\n"


def test_bound_port_is_closed_to_others() -> None:
    with bind_socket("127.0.0.1", 0) as sock, pytest.raises(ConfigError):
        bind_socket("127.0.0.1", sock.getsockname()[1])


def test_the_system_keeps_little_for_those_who_do_not_read() -> None:
    with bind_socket("127.0.0.1", 0) as sock, socket.create_connection(sock.getsockname()):
        accepted, _ = sock.accept()
        with accepted:
            # Linux doubles what it is asked for; left to itself it goes up to megabytes.
            size = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            assert size in (256 * 1024, 512 * 1024)


def test_description_of_the_model(state: ServerState) -> None:
    assert state.model is not None
    assert describe(state.model) == [
        "serving tiny: 1 million parameters, float32 on cpu, context of 100 tokens",
    ]


class Loading:
    """Stands in for what `serve` loads; the engine is only there to fail or to wait."""

    def __init__(self, failure: Exception | None) -> None:
        self.failure = failure
        self.is_shut_down = False

    def launch(self) -> None:
        """Nothing to wait for."""

    async def start(self) -> None:
        assert self.failure is not None
        raise self.failure

    async def shutdown(self, grace_s: float) -> None:
        self.is_shut_down = True


@pytest.mark.parametrize(
    "failure",
    [ConfigError("no memory for one page"), EngineUnavailable("the engine died while loading")],
    ids=["refuses", "dies"],
)
def test_engine_that_can_not_start(
    failure: Any,
    checkpoint: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = Loading(failure)
    monkeypatch.setattr(serve_module, "EngineClient", lambda config, on_step: engine)
    monkeypatch.setattr("bezel.engine.checkpoint.resolve_checkpoint", lambda model: checkpoint)
    monkeypatch.setattr("bezel.engine.tokenizer.Tokenizer.load", lambda checkpoint: tokenizer)
    assert main(["serve", "--port", "0"]) == 2
    assert capsys.readouterr().err == f"bezel: error: {failure}\n"
    assert engine.is_shut_down


def test_checkpoint_that_can_not_be_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(model: str) -> None:
        raise CheckpointError(f"{model}: no such directory or file")

    engine = Loading(None)
    monkeypatch.setattr(serve_module, "EngineClient", lambda config, on_step: engine)
    monkeypatch.setattr("bezel.engine.checkpoint.resolve_checkpoint", fail)
    assert main(["serve", "nothing", "--port", "0"]) == 2
    assert capsys.readouterr().err == "bezel: error: nothing: no such directory or file\n"
    assert engine.is_shut_down


SERVER = """
import asyncio, sys
from pathlib import Path
from types import SimpleNamespace
from bezel.engine import checkpoint, tokenizer
from bezel.engine.messages import EngineInfo
from bezel.server import cli, serve

class Engine:
    info = EngineInfo(max_model_len=9, vocab_size=9, dtype="float32", device="cpu",
        num_parameters=1, eos_token_ids=[1], kv_cache_bytes=1, local_pages_total=1,
        global_pages_total=1, local_page_bytes=1, global_page_bytes=1)
    is_ready = True
    def __init__(self, config, on_step): pass
    def launch(self): pass
    async def start(self):
        if "hang" in sys.argv: await asyncio.Event().wait()
    async def shutdown(self, grace_s): print("engine ended", flush=True)

serve.EngineClient = Engine
tiny = checkpoint.Checkpoint(Path("tiny"), "gguf", "tiny", {}, {})
checkpoint.resolve_checkpoint = lambda model: tiny
tokenizer.Tokenizer.load = lambda checkpoint: SimpleNamespace(token_id=lambda text: None)
sys.exit(cli.main(["serve", "--port", "0"]))
"""


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("when", "line"), [("ready", "serving tiny"), ("hang", "listening on")])
def test_a_signal_ends_the_process_with_success(sig: signal.Signals, when: str, line: str) -> None:
    command = [sys.executable, "-c", SERVER, when]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        url = ""
        for logged in process.stderr:
            if "listening on" in logged:
                url = logged.split("listening on ")[1].split(",")[0]
            if line in logged:
                break
        ready = httpx.get(f"{url}/ready").status_code
        process.send_signal(sig)
        output, errors = process.communicate()
    assert ready == (200 if when == "ready" else 503)
    assert process.returncode == 0, errors
    assert output == "engine ended\n"
    assert "Traceback" not in errors
