"""Who asks when: conversations that begin at their time, so many at once, turn after turn."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx

from bezel.engine.errors import ConfigError
from bezel.server.benchmarking.measure import Asker, Measurement, Message
from bezel.server.benchmarking.settings import ServeBenchmark
from bezel.server.benchmarking.workloads import arrivals, conversations, warm_ups

_LOOK_UP_TIMEOUT_S = 30.0


class Load:
    """Holds all conversations, and what has been measured of them so far.

    A conversation keeps its place among the `max_concurrency` until its last turn, so there are
    never more requests at once. One that must wait for a place is late, which is not hidden.
    """

    def __init__(
        self,
        talks: Sequence[Sequence[str]],
        due_s: Sequence[float],
        max_concurrency: int,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        on_progress: Callable[[int], object] = lambda num: None,
    ) -> None:
        self.measurements: list[Measurement] = []
        self.num_skipped = 0
        self.started_s = clock()
        self._talks, self._due_s = talks, due_s
        self._places = asyncio.Semaphore(max_concurrency)
        self._clock, self._sleep, self._on_progress = clock, sleep, on_progress

    async def run(self, ask: Callable[[Sequence[Message]], Awaitable[Measurement]]) -> None:
        """Ask everything; returns when all has been answered or given up."""
        self.started_s = self._clock()
        async with asyncio.TaskGroup() as group:
            for talk, due_s in zip(self._talks, self._due_s, strict=True):
                early_s = self.started_s + due_s - self._clock()
                if early_s > 0:
                    await self._sleep(early_s)
                await self._places.acquire()
                late_s = self._clock() - self.started_s - due_s
                group.create_task(self._talk(talk, late_s, ask))

    async def _talk(
        self,
        talk: Sequence[str],
        late_s: float,
        ask: Callable[[Sequence[Message]], Awaitable[Measurement]],
    ) -> None:
        messages: list[Message] = []
        try:
            for turn, text in enumerate(talk):
                messages.append({"role": "user", "content": text})
                measured = await ask(messages)
                measured.late_s = late_s if turn == 0 else 0.0
                self.measurements.append(measured)
                if measured.error is not None:
                    self.num_skipped += len(talk) - turn - 1
                    self._on_progress(len(talk) - turn)
                    return
                self._on_progress(1)
                messages.append({"role": "assistant", "content": measured.text})
        finally:
            self._places.release()


class ServeRun:
    """A benchmark of a server under way; what it has so far can be read at any time."""

    def __init__(
        self, benchmark: ServeBenchmark, on_progress: Callable[[int], object] = lambda num: None
    ) -> None:
        talks = conversations(benchmark)
        self.benchmark = benchmark
        self.model = benchmark.model
        self.version: Any = None
        self.load = Load(
            talks,
            arrivals(benchmark, len(talks)),
            benchmark.max_concurrency,
            on_progress=on_progress,
        )

    async def run(self, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """Find the model, warm up, ask everything.

        Raises:
            ConfigError: the server can't be reached, has no model, or fails at a warm-up.
        """
        benchmark = self.benchmark
        headers = {"Authorization": f"Bearer {benchmark.api_key}"} if benchmark.api_key else {}
        connections = benchmark.max_concurrency
        try:
            client = httpx.AsyncClient(
                base_url=benchmark.root_url,
                headers=headers,
                timeout=None,
                limits=httpx.Limits(
                    max_connections=connections, max_keepalive_connections=connections
                ),
                transport=transport,
                trust_env=False,  # a proxy would be measured too
            )
        except httpx.InvalidURL as error:
            raise ConfigError(f"--base-url {benchmark.base_url}: {error}") from None
        async with client:
            await self._look_up(client)
            assert self.model is not None
            asker = Asker(
                client=client,
                endpoint=benchmark.endpoint,
                model=self.model,
                output_len=benchmark.output_len,
                ignore_eos=benchmark.ignore_eos,
                timeout_s=benchmark.timeout,
                clock=time.perf_counter,
            )
            await self._warm_up(asker)
            await self.load.run(asker.ask)

    async def _look_up(self, client: httpx.AsyncClient) -> None:
        try:
            version = await client.get("/version", timeout=_LOOK_UP_TIMEOUT_S)
            if version.status_code == 200:
                self.version = _json(version)
            if self.model is None:
                models = await client.get("/v1/models", timeout=_LOOK_UP_TIMEOUT_S)
                if models.status_code != 200:
                    raise ConfigError(f"{models.url} answers {models.status_code}: {models.text}")
                self.model = _first_model(_json(models))
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise ConfigError(f"--base-url {self.benchmark.base_url}: {reason}") from None

    async def _warm_up(self, asker: Asker) -> None:
        talks = warm_ups(self.benchmark)
        load = Load(talks, [0.0] * len(talks), self.benchmark.max_concurrency)
        await load.run(asker.ask)
        for measured in load.measurements:
            if measured.error is not None:
                raise ConfigError(f"a warm-up failed: {measured.error} {measured.detail}".rstrip())


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _first_model(listed: Any) -> str:
    try:
        name = listed["data"][0]["id"]
    except (KeyError, IndexError, TypeError):
        raise ConfigError("/v1/models lists no model; name one with --model") from None
    return str(name)
