"""The real server with the real 270M model, through sockets: complete, unmixed, leak-free."""

import asyncio
import itertools
import json
import os
import random
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from server_process import Server, resident_kib, running, start
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from bezel.engine.checkpoint import iterate_tensors, resolve_checkpoint

pytestmark = pytest.mark.weights

MODEL = "gemma-3-270m"
# The server computes in bfloat16 here, the reference in float32.
LOGPROBS_ATOL = 0.25


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("server")) as server:
        yield server


def test_chat_streamed_and_not(server: Server) -> None:
    question = [{"role": "user", "content": "Name three colours."}]
    whole = server.client.chat.completions.create(
        model=MODEL, messages=question, max_tokens=24, temperature=0
    )
    pieces = server.client.chat.completions.create(
        model=MODEL,
        messages=question,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(pieces)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert re.search(r"[a-z]{3}", text), "real text, not noise"
    assert chunks[-1].usage == whole.usage
    assert server.client.models.list().data[0].id == MODEL


@pytest.fixture(scope="module")
def reference() -> Gemma3ForCausalLM:
    """transformers' model, filled with the same dequantised tensors."""
    checkpoint = resolve_checkpoint("default")
    config = Gemma3TextConfig(**checkpoint.config)
    model = Gemma3ForCausalLM._from_config(config, dtype=torch.float32)
    model.load_state_dict(dict(iterate_tensors(checkpoint)), strict=False)
    model.tie_weights()
    return model.eval()


def test_logprobs_equal_transformers(server: Server, reference: Gemma3ForCausalLM) -> None:
    """Of two choices, with the prompt echoed: the text, and the likelihood of every token."""
    prompt = "Water boils at 100 °C, and the capital of France is"
    answer = server.client.completions.create(
        model=MODEL,
        prompt=prompt,
        n=2,
        echo=True,
        logprobs=3,
        max_tokens=6,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    ).model_dump()
    first, second = answer["choices"]
    assert first["token_ids"] == second["token_ids"]
    assert first["text"].startswith(prompt)
    ids = first["prompt_token_ids"] + first["token_ids"]
    with torch.inference_mode():
        logits_LV = reference(torch.tensor([ids]), use_cache=False).logits[0]
    expected_LV = logits_LV.log_softmax(-1)[:-1]
    for choice in (first, second):
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None
        drawn_L = expected_LV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(told["token_logprobs"][1:]), drawn_L, atol=LOGPROBS_ATOL, rtol=0
        )
        best_L = torch.tensor([max(top.values()) for top in told["top_logprobs"][1:]])
        torch.testing.assert_close(best_L, expected_LV.amax(-1), atol=LOGPROBS_ATOL, rtol=0)
        assert told["token_logprobs"][-6:] == best_L[-6:].tolist(), "greedy"
        spans = itertools.pairwise([*told["text_offset"], len(choice["text"])])
        texts = [choice["text"][start:end] for start, end in spans]
        assert texts == ["", *told["tokens"][1:]]
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(first["prompt_token_ids"])
    assert usage["completion_tokens"] == 2 * 6


def test_64_streams_at_once_are_complete_and_unmixed(server: Server) -> None:
    """Every prompt repeats a number of its own, and the model goes on repeating it."""

    def ask(number: int) -> str:
        chunks = server.client.completions.create(
            model=MODEL,
            prompt=f" {number}," * 12,
            max_tokens=12,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        parts = [(c.choices[0].text, c.choices[0].finish_reason) for c in chunks]
        assert [reason for _, reason in parts if reason] == ["length"]
        return "".join(part for part, _ in parts)

    numbers = list(range(101, 165))
    with ThreadPoolExecutor(64) as pool:
        answers = dict(zip(numbers, pool.map(ask, numbers), strict=True))
    for number, answer in answers.items():
        assert answer.startswith(f" {number}, {number},"), f"{number} got {answer!r}"
    server.wait_idle()


def prompt_tokens_computed(server: Server) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    series = r'bezel_prompt_tokens_by_source_total\{.*source="local_compute"\}'
    found = re.search(rf"^{series} (\S+)$", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_each_turn_of_a_chat_computes_what_is_new(server: Server) -> None:
    messages: list[dict[str, str]] = []
    previous, computed = 0, prompt_tokens_computed(server)
    for turn in range(10):
        words = " ".join(f"word{turn}-{i}" for i in range(30))
        messages.append({"role": "user", "content": words})
        body = {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        usage = answer["usage"]
        before, computed = computed, prompt_tokens_computed(server)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert computed - before == usage["prompt_tokens"] - cached
        # What stands in the template after the last prompt, and at most a page before it.
        assert computed - before <= usage["prompt_tokens"] - previous + 64
        previous = usage["prompt_tokens"]
        messages.append(
            {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}
        )


def test_memory_is_flat_over_500_requests(server: Server) -> None:
    async def run(count: int, seed: int) -> None:
        rng = random.Random(seed)
        limit = asyncio.Semaphore(32)
        async with httpx.AsyncClient(timeout=300) as client:

            async def one() -> None:
                prompt = [rng.randrange(10, 200_000) for _ in range(rng.choice((5, 40, 120)))]
                body = {"model": MODEL, "prompt": prompt, "max_tokens": 3, "stream": True}
                async with (
                    limit,
                    client.stream("POST", f"{server.url}/v1/completions", json=body) as response,
                ):
                    lines = [line async for line in response.aiter_lines()]
                assert "data: [DONE]" in lines

            await asyncio.gather(*(one() for _ in range(count)))

    # Until the caches of compiled products are full.
    asyncio.run(run(500, seed=0))
    sizes = []
    for seed in range(1, 7):
        sizes.append((resident_kib(server.process.pid), resident_kib(server.engine_pid)))
        asyncio.run(run(100, seed))
    server.wait_idle()
    for which, kib in zip(("server", "engine"), zip(*sizes, strict=True), strict=True):
        growth_kib = [new - old for old, new in itertools.pairwise(kib)]
        # The heap may still take a step, for a larger batch than all before, or for another
        # compiled product; what leaks grows in every round.
        assert min(growth_kib) < 8192, f"{which} grew by {growth_kib} KiB"


def test_200_clients_that_vanish_leave_nothing_behind(server: Server) -> None:
    """Each reads a random part of its answer, or none of it, and drops the connection."""
    rng = random.Random(3)
    started = server.metric(r"bezel_request_success_total\{")

    async def vanish(stream: bool, num_bytes: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        body = json.dumps(
            {
                "model": MODEL,
                "prompt": [rng.randrange(10, 200_000) for _ in range(rng.choice((4, 60, 300)))],
                "max_tokens": 4000,
                "stream": stream,
                "ignore_eos": True,
            }
        )
        writer.write(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            f"Content-Type: application/json\r\n\r\n{body}".encode()
        )
        await writer.drain()
        if num_bytes:
            await reader.readexactly(num_bytes)
        writer.transport.abort()

    async def crowd() -> None:
        limit = asyncio.Semaphore(40)

        async def one() -> None:
            stream = rng.random() < 0.7
            async with limit:
                await vanish(stream, rng.choice((0, 1, 300, 900)) if stream else 0)

        await asyncio.gather(*(one() for _ in range(200)))

    asyncio.run(crowd())
    server.wait_idle()
    assert server.metric(r"bezel_request_success_total\{") > started
    answer = server.client.completions.create(
        model=MODEL, prompt=" 7," * 12, max_tokens=6, temperature=0
    )
    assert answer.choices[0].text.startswith(" 7, 7")


def test_a_killed_engine_is_an_error_for_its_clients_and_comes_back(server: Server) -> None:
    body = {
        "model": MODEL,
        "prompt": "Once",
        "max_tokens": 4000,
        "stream": True,
        "ignore_eos": True,
    }
    events = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(line)
            if len(events) == 3:
                os.kill(server.engine_pid, signal.SIGKILL)
    assert "error" in json.loads(events[-1].removeprefix("data: "))
    assert httpx.get(f"{server.url}/ready", timeout=10).status_code == 503
    server.wait_ready()
    answer = server.client.completions.create(
        model=MODEL, prompt=" 7," * 12, max_tokens=6, temperature=0
    )
    assert answer.choices[0].text.startswith(" 7, 7")
    assert server.metric(r"bezel_engine_restarts_total\{") == 1


def test_sigterm_lets_a_running_stream_finish(tmp_path: Path) -> None:
    server = start(tmp_path)
    try:
        server.wait_ready()
        chunks = server.client.completions.create(
            model=MODEL,
            prompt="Once upon a time",
            max_tokens=48,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        reasons = []
        for i, chunk in enumerate(chunks):
            if i == 2:
                server.process.send_signal(signal.SIGTERM)
            reasons.append(chunk.choices[0].finish_reason)
        assert reasons[-1] == "length"
        assert server.process.wait(30) == 0
    finally:
        server.process.kill()
