"""One real server that all faults are done to, with limits that come soon."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from calm import MODEL, Scale, Watch
from gemma4_checkpoint import write_gemma4_checkpoint
from server_process import Server, running

# Half-open connections have 2 s, the engine 10, and of long answers there are no more than 1,000
# tokens. Eight run, so that most of a crowd waits.
FLAGS = [
    *("--max-model-len", "1024", "--max-num-seqs", "8", "--max-num-queued-reqs", "200"),
    *("--receive-timeout", "2", "--send-timeout", "2", "--timeout-keep-alive", "2"),
    *("--engine-hang-timeout", "10"),
]


SCALES = {
    "ci": Scale(150, 10, 200, 400, 2_000),
    "full": Scale(2_000, 300, 500, 10_000, 10_000),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-scale", choices=list(SCALES), default="ci", help="how much of each")


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> Scale:
    return SCALES[request.config.getoption("--fault-scale", default="ci")]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Gemma 4."""
    path = tmp_path_factory.mktemp("faults") / MODEL
    write_gemma4_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def flags(checkpoint: Path) -> list[str]:
    """What the servers of these tests are started with."""
    return [str(checkpoint), *FLAGS]


@pytest.fixture(scope="session")
def server(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("server"), *flags) as server:
        yield server


@pytest.fixture(scope="session")
def watch(server: Server) -> Watch:
    return Watch(server, server.log)
