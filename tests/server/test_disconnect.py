"""Racing work against the client's patience."""

import asyncio

import pytest

from bezel.server.disconnect import unless_disconnected
from bezel.server.errors import ClientDisconnected

pytestmark = pytest.mark.anyio


async def never() -> dict[str, str]:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def test_result_of_finished_work() -> None:
    async def work() -> int:
        return 3

    assert await unless_disconnected(never, work()) == 3


async def test_failure_of_the_work() -> None:
    async def work() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        await unless_disconnected(never, work())


async def test_work_has_cleaned_up_when_the_client_is_known_to_be_gone() -> None:
    log: list[str] = []
    messages = [{"type": "http.disconnect"}, {"type": "http.request"}]

    async def receive() -> dict[str, str]:
        return messages.pop()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            log.append("cleaned up")

    with pytest.raises(ClientDisconnected):
        await unless_disconnected(receive, work())
    assert log == ["cleaned up"]


async def test_cancellation_reaches_the_work() -> None:
    begun = asyncio.Event()
    log: list[str] = []

    async def work() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            log.append("cancelled")
            raise

    task = asyncio.create_task(unless_disconnected(never, work()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["cancelled"]
