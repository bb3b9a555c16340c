"""How late the event loop is: what holds it up holds up every stream."""

import asyncio
import time
from collections.abc import Awaitable, Callable

INTERVAL_S = 0.25


async def watch_lag(
    observe: Callable[[float], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Tell, for as long as the loop runs, by how many seconds it woke up later than asked."""
    while True:
        due_s = clock() + INTERVAL_S
        await sleep(INTERVAL_S)
        observe(max(0.0, clock() - due_s))
