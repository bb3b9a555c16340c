"""The load generator: what it asks, when, how it reads streams, and what it makes of them."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import pairwise
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bezel.engine.errors import ConfigError
from bezel.server.benchmarking.load import Load, ServeRun
from bezel.server.benchmarking.measure import Asker, Measurement, Message
from bezel.server.benchmarking.results import ServeResults, results_of
from bezel.server.benchmarking.settings import ServeBenchmark
from bezel.server.benchmarking.workloads import arrivals, conversations, warm_ups


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        """Let everybody else run first, who may take longer."""
        until = self.now + seconds
        await asyncio.sleep(0)
        self.now = max(self.now, until)


class Script(httpx.AsyncByteStream):
    """Pieces of an answer, each so many seconds after the one before."""

    def __init__(self, clock: Clock, pieces: Sequence[tuple[float, bytes | Exception]]) -> None:
        self._clock, self._pieces = clock, pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for delay_s, piece in self._pieces:
            self._clock.now += delay_s
            if isinstance(piece, Exception):
                raise piece
            yield piece


def event(**content: Any) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def says(**delta: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": delta}], usage=None)


DONE = b"data: [DONE]\n\n"
USAGE = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 5})


def ask(
    *pieces: tuple[float, bytes | Exception],
    status: int = 200,
    endpoint: str = "chat",
    messages: Sequence[Message] = ({"role": "user", "content": "hi"},),
    seen: list[httpx.Request] | None = None,
    ignore_eos: bool = False,
) -> Measurement:
    clock = Clock()

    def answer(request: httpx.Request) -> httpx.Response:
        if seen is not None:
            seen.append(request)
        return httpx.Response(status, stream=Script(clock, pieces))

    async def run() -> Measurement:
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            asker = Asker(
                client=client,
                endpoint=endpoint,
                model="m",
                output_len=5,
                ignore_eos=ignore_eos,
                timeout_s=60.0,
                clock=clock,
            )
            return await asker.ask(messages)

    return asyncio.run(run())


def test_times_are_of_chunks_with_text_and_tokens_of_usage() -> None:
    measured = ask(
        (0.25, says(role="assistant", content="")),
        (0.25, b": keep-alive\n\n"),
        (0.5, says(reasoning_content="Hm")),
        (0.5, says(content="one")),
        (1.5, says(content=" two three")),
        (0.25, event(choices=[{"delta": {}, "finish_reason": "stop"}])),
        (0.25, USAGE + DONE),
    )
    assert measured.error is None and measured.text == "one two three"
    assert (measured.ttft_s, measured.e2e_s) == (1.0, 3.5)
    assert measured.gaps_s == [0.5, 1.5]
    assert (measured.prompt_tokens, measured.output_tokens) == (7, 5)
    assert measured.tpot_s == 2.0 / 4


def test_without_usage_chunks_are_counted() -> None:
    calls = [{"index": 0, "function": {"arguments": "{"}}]
    measured = ask(
        (1.0, says(content="a")), (1.0, says(reasoning="b")), (1.0, says(tool_calls=calls) + DONE)
    )
    assert (measured.prompt_tokens, measured.output_tokens, measured.tpot_s) == (None, 3, 1.0)
    [only] = ask((1.0, says(content="a") + DONE)).chunk_times_s
    assert only == 101.0


@given(cuts=st.lists(st.integers(0, 400), max_size=6))
@settings(max_examples=20, deadline=None)
def test_events_may_be_cut_anywhere(cuts: list[int]) -> None:
    whole = says(content="ä\u2028\x85b").replace(b"\n", b"\r\n") + USAGE + DONE
    edges = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [(0.5, whole[a:b]) for a, b in pairwise(edges)]
    measured = ask(*pieces)
    assert (measured.error, measured.text) == (None, "ä\u2028\x85b")
    assert measured.output_tokens == 5


@pytest.mark.parametrize(
    ("pieces", "status", "error", "detail"),
    [
        ([(0.5, b"slow down")], 429, "HTTP 429", "slow down"),
        ([(0.5, says(content="a"))], 200, "stream broken", "it ended without [DONE]"),
        ([(0.5, b"data: {nonsense\n\n")], 200, "stream broken", "not an object of JSON"),
        ([(0.5, b"data: 3\n\n" + DONE)], 200, "stream broken", "not an object of JSON"),
        ([(0.5, says(content=[1]) + DONE)], 200, "stream broken", "choices[0].delta.content"),
        ([(0.5, event(error={"message": "oh"}) + DONE)], 200, "error in the stream", "oh"),
        ([(0.5, httpx.ReadError("gone"))], 200, "connection: ReadError", "gone"),
        ([(0.5, TimeoutError())], 200, "timeout", ""),
    ],
)
def test_what_goes_wrong_is_told_by_kind(
    pieces: list[tuple[float, bytes]], status: int, error: str, detail: str
) -> None:
    measured = ask(*pieces, status=status)
    assert measured.error == error and detail in measured.detail
    assert measured.e2e_s == 0.5


def test_a_request_is_given_up_in_time() -> None:
    async def run() -> Measurement:
        async def hang(request: httpx.Request) -> httpx.Response:
            await asyncio.Event().wait()
            raise AssertionError

        transport = httpx.MockTransport(hang)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            asker = Asker(
                client=client,
                endpoint="chat",
                model="m",
                output_len=1,
                ignore_eos=False,
                timeout_s=0.0,
                clock=Clock(),
            )
            return await asker.ask([{"role": "user", "content": "hi"}])

    assert asyncio.run(run()).error == "timeout"


def test_requests_are_those_of_the_route() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    seen: list[httpx.Request] = []
    ask((0.0, DONE), messages=messages, seen=seen, ignore_eos=True)
    text = event(choices=[{"text": "d"}])
    measured = ask((0.0, text + DONE), messages=messages, seen=seen, endpoint="completions")
    assert measured.text == "d"
    common = {"model": "m", "max_tokens": 5, "stream": True}
    common |= {"stream_options": {"include_usage": True}}
    assert [request.url.path for request in seen] == ["/v1/chat/completions", "/v1/completions"]
    assert json.loads(seen[0].content) == {**common, "ignore_eos": True, "messages": messages}
    assert json.loads(seen[1].content) == {**common, "prompt": "a\n\nb\n\nc"}


def test_workloads_are_what_was_asked_for() -> None:
    def made(**changes: Any) -> list[list[str]]:
        return conversations(ServeBenchmark(num_prompts=10, input_len=6, **changes))

    assert [[len(text.split()) for text in talk] for talk in made()] == [[6]] * 10
    assert len({talk[0] for talk in made()}) == 10
    assert [len(talk) for talk in made(workload="chats", turns=4)] == [4, 4, 2]
    shared = [talk[0].split() for talk in made(workload="shared-prefix", prefix_len=20)]
    assert len({tuple(words[:20]) for words in shared}) == 1
    assert len({tuple(words[20:]) for words in shared}) == 10
    assert {len(words) for words in shared} == {26}


def test_the_seed_decides_and_warm_ups_are_apart() -> None:
    first, other = ServeBenchmark(request_rate=2.0), ServeBenchmark(request_rate=2.0, seed=1)
    assert conversations(first) == conversations(first) != conversations(other)
    assert arrivals(first, 9) == arrivals(first, 9) != arrivals(other, 9)
    asked = {text for talk in conversations(first) for text in talk}
    assert len(warm_ups(first)) == 2
    assert not asked & {text for talk in warm_ups(first) for text in talk}


def test_arrivals_are_a_poisson_process() -> None:
    assert arrivals(ServeBenchmark(), 3) == [0.0, 0.0, 0.0]
    due_s = arrivals(ServeBenchmark(request_rate=4.0), 4001)
    gaps_s = [b - a for a, b in pairwise(due_s)]
    assert due_s[0] == 0.0 and min(gaps_s) >= 0
    assert sum(gaps_s) / 4000 == pytest.approx(1 / 4, rel=0.05)
    # Exponential gaps: the median is ln 2 of the mean.
    assert sorted(gaps_s)[2000] == pytest.approx(0.6931 / 4, rel=0.08)


def run_load(load: Load, answer: Callable[[Sequence[Message]], Measurement]) -> None:
    async def reply(messages: Sequence[Message]) -> Measurement:
        return answer(messages)

    asyncio.run(load.run(reply))


def test_a_chat_resends_what_was_said() -> None:
    asked: list[list[str]] = []

    def answer(messages: Sequence[Message]) -> Measurement:
        asked.append([message["content"] for message in messages])
        return Measurement(sent_s=0.0, text=f"to {len(asked)}")

    run_load(Load([["a", "b", "c"]], [0.0], 1, Clock()), answer)
    assert asked == [["a"], ["a", "to 1", "b"], ["a", "to 1", "b", "to 2", "c"]]


def test_after_an_error_a_chat_is_over_and_others_go_on() -> None:
    progress: list[int] = []

    def answer(messages: Sequence[Message]) -> Measurement:
        return Measurement(sent_s=0.0, error="x" if messages[-1]["content"] == "b" else None)

    talks = [["a", "b", "c", "d"], ["e", "f"]]
    load = Load(talks, [0.0, 0.0], 1, Clock(), on_progress=progress.append)
    run_load(load, answer)
    assert [measured.error for measured in load.measurements] == [None, "x", None, None]
    assert load.num_skipped == 2 and sum(progress) == 6


def test_there_are_as_many_at_once_as_allowed() -> None:
    at_once: list[int] = [0]

    async def answer(messages: Sequence[Message]) -> Measurement:
        at_once.append(at_once[-1] + 1)
        for _ in range(5):
            await asyncio.sleep(0)
        at_once.append(at_once[-1] - 1)
        return Measurement(sent_s=0.0)

    load = Load([["a", "b"]] * 7, [0.0] * 7, 3, Clock())
    asyncio.run(load.run(answer))
    assert max(at_once) == 3 and len(load.measurements) == 14


def test_conversations_begin_when_due_or_are_late() -> None:
    clock = Clock()

    def answer(messages: Sequence[Message]) -> Measurement:
        clock.now += 3.0
        return Measurement(sent_s=clock.now - 3.0)

    load = Load([["a"]] * 4, [0.0, 1.0, 5.0, 20.0], 1, clock, clock.sleep)
    run_load(load, answer)
    assert [measured.sent_s for measured in load.measurements] == [100.0, 103.0, 106.0, 120.0]
    assert [measured.late_s for measured in load.measurements] == [0.0, 2.0, 1.0, 0.0]


def answered(ttft_s: float, tpot_s: float = 0.0, **usage: Any) -> Measurement:
    """Of three tokens."""
    times = [ttft_s + index * tpot_s for index in range(3)]
    counted = {"completion_tokens": 3, **usage} if usage else None
    return Measurement(sent_s=0.0, ended_s=times[-1], chunk_times_s=times, usage=counted)


def summed(*measured: Measurement, num_skipped: int = 0, **changes: Any) -> ServeResults:
    return results_of(ServeBenchmark(**changes), measured, num_skipped, 0.0)


def test_percentiles_are_values_that_were_measured() -> None:
    results = summed(*(answered(i / 100) for i in range(100, 0, -1)))
    ttft = results.ttft_s
    assert ttft is not None
    assert (ttft.p50, ttft.p90, ttft.p99, ttft.max) == (0.5, 0.9, 0.99, 1.0)
    assert ttft.mean == pytest.approx(0.505)
    assert summed(Measurement(sent_s=0.0, ended_s=1.0)).ttft_s is None


def test_throughput_is_of_answers_over_all_time() -> None:
    broken = Measurement(sent_s=0.0, ended_s=4.0, error="HTTP 500", chunk_times_s=[1.0])
    first = answered(1.0, 0.5, prompt_tokens=10, prompt_tokens_details={"cached_tokens": 4})
    results = summed(first, answered(1.0, 0.25), broken, num_skipped=1)
    assert (results.num_requests, results.num_answered) == (3, 2)
    assert (results.duration_s, results.requests_per_s) == (4.0, 0.5)
    assert (results.prompt_tokens_per_s, results.output_tokens_per_s) == (2.5, 1.5)
    assert (results.cached_tokens, results.num_counted_by_chunks) == (4, 1)
    assert results.tpot_s is not None and results.tpot_s.mean == 0.375
    assert results.itl_s is not None and results.itl_s.max == 0.5
    assert results.goodput is None and results.late_s is None


def test_goodput_wants_all_objectives_and_counts_failures() -> None:
    measured = [answered(1.0, 0.5), answered(1.0, 0.25), answered(2.0, 0.25)]
    measured.append(Measurement(sent_s=0.0, ended_s=5.0, error="timeout"))
    both = summed(*measured, num_skipped=1, slo_ttft=1.0, slo_itl=0.25).goodput
    assert both is not None and (both.share, both.requests_per_s) == (0.2, 0.2)
    first = summed(*measured, slo_ttft=1.0).goodput
    assert first is not None and first.share == 0.5
    empty = summed(Measurement(sent_s=0.0, ended_s=1.0), slo_ttft=9.0).goodput
    assert empty is not None and empty.share == 0.0


def test_errors_are_counted_by_kind_with_the_first_of_each() -> None:
    kinds = [("timeout", ""), ("HTTP 429", "one"), ("HTTP 429", "two")]
    failed = [Measurement(sent_s=0.0, error=kind, detail=detail) for kind, detail in kinds]
    results = summed(*failed)
    assert results.errors == {"HTTP 429": 2, "timeout": 1} == dict(Counter(k for k, _ in kinds))
    assert results.error_examples == {"timeout": "", "HTTP 429": "one"}


def run_against(answer: Callable[[httpx.Request], httpx.Response], **changes: Any) -> ServeRun:
    wanted: dict[str, Any] = {"num_prompts": 3, "num_warmups": 1, "input_len": 2, **changes}
    run = ServeRun(ServeBenchmark(base_url="http://x/v1/", **wanted))
    asyncio.run(run.run(httpx.MockTransport(answer)))
    return run


def test_a_run_finds_the_model_warms_up_and_sends_the_key() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "first"}, {"id": "second"}]})
        if request.url.path == "/version":
            return httpx.Response(404)
        return httpx.Response(200, content=says(content="a") + DONE)

    run = run_against(answer, api_key="key")
    assert (run.model, run.version, len(run.load.measurements)) == ("first", None, 3)
    posted = [request for request in seen if request.method == "POST"]
    assert len(posted) == 4
    assert {json.loads(request.content)["model"] for request in posted} == {"first"}
    assert {request.headers["authorization"] for request in seen} == {"Bearer key"}


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (httpx.Response(401, text="no key"), "http://x/v1/models answers 401: no key"),
        (httpx.Response(200, json={"data": []}), "/v1/models lists no model"),
        (httpx.Response(200, text="<html>"), "/v1/models lists no model"),
        (httpx.Response(200, json={"data": [{"id": "m"}]}), "a warm-up failed: HTTP 418 tea"),
    ],
)
def test_a_server_that_cannot_be_asked_ends_the_run(models: httpx.Response, message: str) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return models if request.url.path == "/v1/models" else httpx.Response(418, text="tea")

    with pytest.raises(ConfigError, match=message):
        run_against(answer)
