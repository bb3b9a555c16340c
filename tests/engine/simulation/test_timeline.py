"""Bins against integrals computed the long way."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bezel.engine.simulation.timeline import MAX_BINS, Timeline


@given(
    pieces=st.lists(
        st.tuples(st.floats(0.0, 2.0), st.floats(0.0005, 3.0), st.integers(-5, 5)), min_size=1
    )
)
@settings(max_examples=60, deadline=None)
def test_each_bin_has_the_integral_over_its_time(pieces: list[tuple[float, float, int]]) -> None:
    timeline = Timeline(("value", "one"))
    held, now = [], 0.0
    for pause, seconds, value in pieces:
        start, end = now + pause, now + pause + seconds
        timeline.add(start, end, (value, 1))
        held.append((start, end, value))
        now = end
    means = timeline.means("value", now)
    assert len(means) <= MAX_BINS
    for index, mean in enumerate(means):
        low, high = index * timeline.bin_s, min(now, (index + 1) * timeline.bin_s)
        integral = sum(v * max(0.0, min(high, end) - max(low, start)) for start, end, v in held)
        assert mean * (high - low) == pytest.approx(integral, abs=1e-9)
    assert timeline.total("value") == pytest.approx(sum(v * (e - s) for s, e, v in held), abs=1e-9)
    assert timeline.total("one") == pytest.approx(sum(e - s for s, e, _ in held))


def test_bins_widen_as_time_goes_on() -> None:
    timeline = Timeline(("value",))
    for second in range(3000):
        timeline.add(second, second + 1, (second,))
    assert MAX_BINS / 2 < len(timeline.means("value", 3000)) <= MAX_BINS
    assert timeline.bin_s == pytest.approx(8.192)
    assert timeline.means("value", 3000)[0] == pytest.approx((28 + 8 * 0.192) / 8.192)
