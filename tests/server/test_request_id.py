"""Request ids in log lines."""

import asyncio
import logging

import pytest

from bezel.server.request_id import RequestIdFilter, set_request_id

pytestmark = pytest.mark.anyio


def record() -> logging.LogRecord:
    made = logging.LogRecord("bezel", logging.INFO, __file__, 1, "hello", None, None)
    assert RequestIdFilter().filter(made)
    return made


async def test_each_request_logs_its_own_id() -> None:
    async def serve(given: str) -> tuple[str, str, str]:
        own = set_request_id(given)
        await asyncio.sleep(0)
        in_task = await asyncio.create_task(log_later())
        return own, record().__dict__["request_id"], in_task

    async def log_later() -> str:
        await asyncio.sleep(0)
        return record().__dict__["request_id"]

    answers = await asyncio.gather(*(serve(name) for name in ("a", "b", "no spaces please", "")))
    assert answers[:2] == [("a",) * 3, ("b",) * 3]
    for own, logged, in_task in answers[2:]:
        assert own == logged == in_task
        assert len(own) == 32 and " " not in own
    assert record().__dict__["request_id"] == "-"
