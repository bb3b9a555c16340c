"""Bezel and its peers as processes: how each is started, and ended."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

BEZEL = Path(sys.executable).parent / "bezel"
MODEL_NAME = "m"  # what every server calls its model
STOP_TIMEOUT_S = 30.0
# Room for about 58,000 tokens of the 270M model in bfloat16: what 32 slots of 2,048 tokens have in
# llama.cpp, and more than any cell needs.
KV_GIB = 1


@dataclass(frozen=True, slots=True)
class Recipe:
    """`command` has `{port}` where the port belongs; `variables` are added to the environment."""

    name: str
    command: Sequence[str]
    variables: dict[str, str] = field(default_factory=dict)


def bezel(model: str, arguments: Sequence[str] = ()) -> Recipe:
    """`bezel serve` of the environment that runs this."""
    command = [str(BEZEL), "serve", model, "--port", "{port}", "--served-model-name", MODEL_NAME]
    return Recipe("Bezel", [*command, "--kv-cache-memory-bytes", f"{KV_GIB}G", *arguments])


def llama(binary: str, model: str) -> Recipe:
    """llama.cpp's `llama-server` on two threads, with 32 slots of 2,048 tokens."""
    command = [binary, "-m", model, "-t", "2", "-np", "32", "-c", "65536", "--alias", MODEL_NAME]
    return Recipe("llama.cpp", [*command, "--host", "127.0.0.1", "--port", "{port}"])


def vllm(python: str, model: str) -> Recipe:
    """vLLM's CPU build in bfloat16, its threads bound to the first two cores."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "32"]
    command += ["--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", "{port}"]
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Recipe("vLLM", command, variables)


def any_other(command: str, variables: Sequence[str]) -> Recipe:
    """A command line with `{port}` in it, and `NAME=VALUE` variables."""
    words = shlex.split(command)
    return Recipe(Path(words[0]).name, words, dict(v.split("=", 1) for v in variables))


@dataclass(slots=True)
class Server:
    """A process of ours, perhaps not ready yet. `started_s` is of `time.perf_counter`."""

    name: str
    process: "subprocess.Popen[bytes]"
    port: int
    log: Path
    started_s: float

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stopped for as long as the block runs: a server with nothing to do may poll all the
        same, on cores that the other one wants."""
        os.killpg(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.pid, signal.SIGCONT)

    def check(self) -> None:
        """Raises SystemExit with the end of the log if the process has ended."""
        if self.process.poll() is not None:
            tail = self.log.read_text(errors="replace")[-2000:]
            raise SystemExit(f"{self.name} ended with {self.process.returncode}:\n{tail}")


@contextmanager
def running(recipe: Recipe, folder: Path) -> Iterator[Server]:
    """Start a server, which ends with the block whatever happens; its log goes to `folder`."""
    port = free_port()
    log = folder / f"{recipe.name}-{port}.log"
    command = [word.replace("{port}", str(port)) for word in recipe.command]
    # The number of threads is each server's own choice.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    with log.open("wb") as output:
        started_s = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=inherited | recipe.variables,
            # Not a session of its own: between sessions Linux shares cores out evenly, whatever the
            # priority of a client that means to give way.
            process_group=0,
        )
    try:
        yield Server(recipe.name, process, port, log, started_s)
    finally:
        stop(process)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process that `running` started, and after a while what is left of its group."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # its children too; nobody else has this group
    except ProcessLookupError:
        pass
    process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def read_ahead(path: Path) -> None:
    """Bring the files of a model into the page cache, so that no start waits for the disk."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        with file.open("rb") as content:
            while content.read(1 << 24):
                pass
