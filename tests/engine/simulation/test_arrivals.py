"""Who comes when: the order of the trace, followers, and lines that can't be."""

from collections.abc import Iterator
from typing import Any

import pytest

from bezel.engine.errors import ConfigError
from bezel.engine.simulation import arrivals as module
from bezel.engine.simulation.arrivals import Arrivals
from bezel.engine.simulation.trace import TraceRequest


def ask(**fields: Any) -> TraceRequest:
    return TraceRequest(prompt_tokens=1, num_output_tokens=1, **fields)


def due(arrivals: Arrivals, now_s: float) -> list[tuple[float, int]]:
    return [(arrival_s, number) for arrival_s, number, _ in arrivals.due(now_s)]


def test_a_line_without_a_time_has_that_of_the_line_before() -> None:
    arrivals = Arrivals([ask(), ask(arrival_s=2.0), ask(), ask(arrival_s=2.5)])
    assert arrivals.next_s() == 0.0
    assert due(arrivals, 0.0) == [(0.0, 0)]
    assert arrivals.next_s() == 2.0
    assert due(arrivals, 2.4) == [(2.0, 1), (2.0, 2)]
    assert due(arrivals, 9.0) == [(2.5, 3)]
    assert arrivals.next_s() is None


def test_the_trace_is_read_no_further_than_the_clock_has_come() -> None:
    num_read = 0

    def lines() -> Iterator[TraceRequest]:
        nonlocal num_read
        for i in range(100):
            num_read += 1
            yield ask(arrival_s=float(i))

    arrivals = Arrivals(lines())
    assert [number for _, number in due(arrivals, 10.5)] == list(range(11))
    assert num_read == 12, "one ahead"
    assert arrivals.num_read == 11


def test_a_follower_comes_when_it_has_thought_or_later() -> None:
    lines = [
        ask(id="a"),
        ask(after="a", think_s=3.0),
        ask(after="a", arrival_s=20.0),
        ask(arrival_s=21.0),
    ]
    arrivals = Arrivals(lines)
    assert due(arrivals, 5.0) == [(0.0, 0)]
    assert arrivals.next_s() == 21.0, "of those that come anyway"
    arrivals.answered(0, 5.0)
    assert arrivals.next_s() == 8.0
    assert due(arrivals, 20.0) == [(8.0, 1), (20.0, 2)]
    assert due(arrivals, 21.0) == [(21.0, 3)]


def test_a_follower_may_be_read_after_the_end() -> None:
    arrivals = Arrivals([ask(id="a"), ask(id="b", arrival_s=9.0, after="a", think_s=1.0)])
    assert due(arrivals, 0.0) == [(0.0, 0)]
    arrivals.answered(0, 8.5)
    assert arrivals.next_s() == 9.5


def test_those_after_an_unanswered_one_are_skipped_when_they_are_read() -> None:
    lines = [ask(id="a"), ask(id="b", after="a"), ask(after="b"), ask(arrival_s=5.0, after="b")]
    arrivals = Arrivals(lines)
    assert due(arrivals, 0.0) == [(0.0, 0)]
    arrivals.unanswered(0)
    assert arrivals.num_skipped == 2
    assert due(arrivals, 100.0) == []
    assert arrivals.num_skipped == 3
    assert arrivals.next_s() is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [ask(arrival_s=3.0), ask(arrival_s=2.0)],
            "line 2 of the trace: arrival_s: 2.0 is before 3.0 of a line above",
        ),
        (
            [ask(after="a"), ask(id="a")],
            "line 1 of the trace: after: none of the 100,000 lines above has the id 'a'",
        ),
        ([ask(id="a", after="a")], "line 1 of the trace: after: none"),
        (
            [ask(), ask(id="a"), ask(id="a")],
            "line 3 of the trace: id: line 2 has 'a' as well",
        ),
    ],
)
def test_lines_that_cannot_be(lines: list[TraceRequest], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        due(Arrivals(lines), 100.0)
    assert caught.value.message.startswith(message)


def test_ids_far_above_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DISTANCE", 10)
    lines = [ask(id=f"r{i}") for i in range(40)]
    assert len(due(Arrivals([*lines, ask(after="r29")]), 0.0)) == 40
    with pytest.raises(ConfigError, match="line 41 of the trace: after: none of the 10 lines"):
        due(Arrivals([*lines, ask(after="r0")]), 0.0)
