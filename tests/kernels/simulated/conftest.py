"""Everything here runs under the simulator, which needs Triton, and that as an interpreter.

With `--native cuda` and TRITON_INTERPRET=0 the same tests run compiled kernels on a GPU.
"""

import os
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path

import pytest

IS_INTERPRETED = find_spec("triton") is not None and os.environ["TRITON_INTERPRET"] == "1"

if IS_INTERPRETED:
    import simulator.watch  # noqa: F401  # puts the interpreter's arithmetic right


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--native", metavar="DEVICE", help="run kernels on this device, unwatched")


def pytest_configure(config: pytest.Config) -> None:
    if device := config.getoption("--native", None):
        from simulator import native

        native.install(device)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.getoption("--native", None):
        return collection_path.name == "test_simulator.py" or None
    return None if IS_INTERPRETED else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--native", None):
        from simulator import native

        native.skip_mutations(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    if not item.config.getoption("--native", None):
        return (yield)
    from simulator import native

    native.Uncounted.were_read = False
    result = yield
    native.skip_if_counters_were_read()
    return result
