"""The engine in a process of its own: it streams, aborts, dies, and comes back."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bezel.engine.client import EngineClient
from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.errors import ConfigError, EngineUnavailable
from bezel.engine.messages import (
    AddSequence,
    FailureCause,
    FinishReason,
    SequenceOutput,
    StepStats,
)
from bezel.engine.sampling_params import SamplingParams

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
ENDLESS = SamplingParams(max_tokens=4000, temperature=0.0)
TIMEOUT_S = 60


def config(path: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(
        model=str(path), dtype="float32", device="cpu", kv_cache_memory_bytes=32 << 20, **settings
    )


@asynccontextmanager
async def running(
    path: Path, stats: list[StepStats], **settings: Any
) -> AsyncIterator[EngineClient]:
    client = EngineClient(config(path, **settings), stats.append)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await client.start()
            yield client
    finally:
        await client.shutdown()


def scenario(
    test: Callable[[EngineClient, list[StepStats]], Awaitable[None]], path: Path, **settings: Any
) -> None:
    async def run() -> None:
        stats: list[StepStats] = []
        async with running(path, stats, **settings) as client:
            await test(client, stats)

    asyncio.run(run())


async def collect(
    client: EngineClient, name: str, prompt: list[int], params: SamplingParams
) -> list[SequenceOutput]:
    return [output async for output in client.generate(name, prompt, params)]


def process_id(client: EngineClient) -> int:
    assert client._child is not None
    return client._child.pid


async def idle(client: EngineClient, stats: list[StepStats], prompt: list[int]) -> StepStats:
    """The engine's state once everything sent so far has been dealt with."""
    await collect(client, "probe", prompt, SamplingParams(max_tokens=1, temperature=0.0))
    return stats[-1]


def test_the_same_tokens_as_in_process(small_checkpoint: Path) -> None:
    prompts = [[5, 6, 7], list(range(3, 90)), [9] * 40]
    expected = Engine(config(small_checkpoint)).generate(prompts, GREEDY)

    async def test(client: EngineClient, stats: list[StepStats]) -> None:
        answers = await asyncio.gather(
            *(collect(client, f"r{i}", prompt, GREEDY) for i, prompt in enumerate(prompts))
        )
        assert [[t for o in answer for t in o.token_ids] for answer in answers] == expected
        for answer in answers:
            reasons = [output.finish_reason for output in answer]
            assert reasons == [None] * (len(reasons) - 1) + [FinishReason.LENGTH]
        assert client.info.max_model_len == 4096
        last = await idle(client, stats, [3])
        assert (last.num_running, last.num_waiting, last.local_pages_used) == (0, 0, 0)

    scenario(test, small_checkpoint)


def test_log_probabilities_come_through(small_checkpoint: Path) -> None:
    params = SamplingParams(max_tokens=4, temperature=0.0, logprobs=2, prompt_logprobs=1)
    prompt = list(range(3, 90))
    engine = Engine(config(small_checkpoint, long_prefill_token_threshold=20))
    engine.add(AddSequence("r", prompt, params))
    expected = []
    while engine.has_work:
        expected += engine.step().outputs

    async def test(client: EngineClient, stats: list[StepStats]) -> None:
        outputs = await collect(client, "r", prompt, params)
        # How long each waited is another matter.
        assert [msgspec.structs.replace(o, queue_seconds=None) for o in outputs] == [
            msgspec.structs.replace(o, queue_seconds=None) for o in expected
        ]
        assert [len(output.prompt_logprobs) for output in outputs] == [20, 20, 20, 20, 6, 0, 0, 0]
        assert [len(output.logprobs) for output in outputs] == [0, 0, 0, 0, 1, 1, 1, 1]

    scenario(test, small_checkpoint, long_prefill_token_threshold=20)


def test_closing_a_generator_aborts_running_and_waiting_sequences(small_checkpoint: Path) -> None:
    async def test(client: EngineClient, stats: list[StepStats]) -> None:
        streams = [client.generate(f"r{i}", [3, 4], ENDLESS) for i in range(3)]
        await anext(streams[0])  # max_num_seqs is 1: the other two wait
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams[1:]]
        while stats[-1].num_waiting < 2:
            await anext(streams[0])
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await streams[0].aclose()
        last = await idle(client, stats, [3])
        assert (last.num_running, last.num_waiting) == (0, 0)
        assert (last.local_pages_used, last.global_pages_used) == (0, 0)

    scenario(test, small_checkpoint, max_num_seqs=1)


def test_as_many_as_come_are_taken(small_checkpoint: Path) -> None:
    """How many may come has been decided before."""

    async def test(client: EngineClient, stats: list[StepStats]) -> None:
        answers = await asyncio.gather(*(collect(client, name, [3], GREEDY) for name in "abc"))
        assert [answer[-1].finish_reason for answer in answers] == [FinishReason.LENGTH] * 3

    scenario(test, small_checkpoint, max_num_seqs=1, max_num_queued_reqs=0)


def test_a_killed_engine_fails_its_requests_and_is_started_again(small_checkpoint: Path) -> None:
    async def test(client: EngineClient, stats: list[StepStats]) -> None:
        stream = client.generate("r", [3], ENDLESS)
        await anext(stream)
        os.kill(process_id(client), signal.SIGKILL)
        with pytest.raises(EngineUnavailable, match="restarted"):
            async for _ in stream:
                pass
        assert not client.is_ready
        with pytest.raises(EngineUnavailable):
            await anext(client.generate("early", [3], GREEDY))
        while not client.is_ready:
            await asyncio.sleep(0.01)
        assert client.num_restarts == 1
        answer = await collect(client, "again", [3], GREEDY)
        assert answer[-1].finish_reason is FinishReason.LENGTH

    scenario(test, small_checkpoint)


def test_an_engine_that_hangs_is_ended_and_started_again(small_checkpoint: Path) -> None:
    async def test(client: EngineClient, stats: list[StepStats]) -> None:
        assert stats == [], "nobody asked for the first token"
        pid = process_id(client)
        stream = client.generate("r", [3], ENDLESS)
        await anext(stream)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(EngineUnavailable, match="hung"):
            async for _ in stream:
                pass
        while not client.is_ready:
            assert client.step_age_s > 0
            await asyncio.sleep(0.01)
        assert client.step_age_s == 0
        assert process_id(client) != pid and client.num_restarts == 1
        answer = await collect(client, "again", [3], GREEDY)
        assert answer[-1].finish_reason is FinishReason.LENGTH

    scenario(test, small_checkpoint, engine_hang_timeout=4)


def test_every_message_is_answered(small_checkpoint: Path) -> None:
    """Or an engine with nothing to do would be taken to hang."""

    async def test(client: EngineClient, stats: list[StepStats]) -> None:
        asking = asyncio.ensure_future(anext(client.generate("r", [3], GREEDY)))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        while client.step_age_s:
            await asyncio.sleep(0.01)
        assert stats[-1].num_running == stats[-1].num_waiting == 0

    scenario(test, small_checkpoint)


def test_a_checkpoint_that_cannot_load_is_a_config_error(tmp_path: Path) -> None:
    async def test() -> None:
        client = EngineClient(config(tmp_path / "nowhere"), lambda stats: None)
        with pytest.raises(ConfigError, match="nowhere"):
            await client.start()
        await client.shutdown()

    asyncio.run(test())


def test_shutdown_ends_the_process_and_open_streams(small_checkpoint: Path) -> None:
    async def test() -> None:
        client = EngineClient(config(small_checkpoint), lambda stats: None)
        await client.start()
        pid = process_id(client)
        stream = client.generate("r", [3], ENDLESS)
        await anext(stream)
        await client.shutdown()
        with pytest.raises(EngineUnavailable, match="shutting down"):
            async for _ in stream:
                pass
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    asyncio.run(test())


def test_the_engine_tells_that_it_is_idle_after_the_last_abort(small_checkpoint: Path) -> None:
    async def test(client: EngineClient, stats: list[StepStats]) -> None:
        stream = client.generate("r", list(range(3, 90)), ENDLESS)
        await anext(stream)
        await stream.aclose()
        while stats[-1].num_running:
            await asyncio.sleep(0.01)
        assert (stats[-1].local_pages_used, stats[-1].global_pages_used) == (0, 0)
        assert stats[-1].num_prefill_tokens == stats[-1].num_decode_tokens == 0

    scenario(test, small_checkpoint)


def test_a_signal_to_the_whole_service_leaves_the_engine_to_its_parent(
    small_checkpoint: Path,
) -> None:
    async def test(client: EngineClient, stats: list[StepStats]) -> None:
        stream = client.generate("r", [3], SamplingParams(max_tokens=20, temperature=0.0))
        await anext(stream)
        os.kill(process_id(client), signal.SIGTERM)
        outputs = [output async for output in stream]
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        assert client.is_ready and client.num_restarts == 0

    scenario(test, small_checkpoint)


def test_a_script_that_forgets_to_shut_down_still_ends(small_checkpoint: Path) -> None:
    code = f"""
import asyncio
from bezel.engine.client import EngineClient
from bezel.engine.config import EngineConfig

async def main():
    config = EngineConfig(model={str(small_checkpoint)!r}, kv_cache_memory_bytes=1 << 20)
    client = EngineClient(config, lambda stats: None)
    await client.start()
    return client

if __name__ == "__main__":
    client = asyncio.run(main())
"""
    script = small_checkpoint.parent / "forgetful.py"
    script.write_text(code)
    assert subprocess.run([sys.executable, script], timeout=TIMEOUT_S).returncode == 0


def test_a_sequence_that_cannot_be_served_ends_alone(small_checkpoint: Path) -> None:
    """As after a restart into less memory, with limits that the front end has not heard of yet."""

    async def test(client: EngineClient, stats: list[StepStats]) -> None:
        too_long = SamplingParams(max_tokens=5000, temperature=0.0)
        # Without a tokenizer there are no grammars either.
        bound = SamplingParams(max_tokens=8, grammar="start: /x/")
        for prompt, params in (([3], too_long), ([3, 300], GREEDY), ([], GREEDY), ([3], bound)):
            outputs = await collect(client, "r", prompt, params)
            ends = [(o.token_ids, o.finish_reason, o.failure) for o in outputs]
            assert ends == [([], FinishReason.ERROR, FailureCause.ENGINE)]
        answer = await collect(client, "fine", [3], GREEDY)
        assert answer[-1].finish_reason is FinishReason.LENGTH
        assert client.num_restarts == 0

    scenario(test, small_checkpoint)


def test_a_failure_to_take_a_step_ends_streams_and_restarts(small_checkpoint: Path) -> None:
    async def test() -> None:
        fail = [True]

        def on_step(stats: StepStats) -> None:
            if fail and fail.pop():
                raise RuntimeError("a mistake of ours")

        client = EngineClient(config(small_checkpoint), on_step)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await client.start()
                with pytest.raises(EngineUnavailable):
                    await collect(client, "r", [3], GREEDY)
                while not client.is_ready:
                    await asyncio.sleep(0.01)
                answer = await collect(client, "again", [3], GREEDY)
                assert answer[-1].finish_reason is FinishReason.LENGTH
        finally:
            await client.shutdown()

    asyncio.run(test())
