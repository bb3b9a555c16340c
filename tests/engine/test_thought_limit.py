"""Which token is forced when, by scripts of what the model draws."""

import pytest

from bezel.engine.sampling_params import ThinkingBudget
from bezel.engine.thought_limit import ThoughtLimit

OPEN, CLOSE = 100, 101


def forced_after(num_tokens: int, token_ids: list[int], is_open: bool = False) -> list[bool]:
    """Whether the end of the thought is forced, before the first token and after each."""
    limit = ThoughtLimit(
        ThinkingBudget(num_tokens=num_tokens, open_id=OPEN, close_id=CLOSE, is_open=is_open)
    )
    forced = [limit.forced_id]
    for token_id in token_ids:
        limit.accept(token_id)
        forced.append(limit.forced_id)
    assert {*forced} <= {None, CLOSE}
    return [token_id is not None for token_id in forced]


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 5])
def test_a_thought_ends_after_so_many_tokens(num_tokens: int) -> None:
    tokens = [OPEN, *[5] * num_tokens]
    assert forced_after(num_tokens, [5, 5, *tokens]) == [False] * (num_tokens + 3) + [True]
    assert forced_after(num_tokens, tokens[1:], is_open=True) == [False] * num_tokens + [True]


def test_it_stays_forced_until_it_comes() -> None:
    assert forced_after(1, [OPEN, 5, 6, 7, CLOSE, 8, 8]) == [
        *(False, False, True, True, True),
        *(False, False, False),
    ]


def test_a_thought_that_was_closed_in_time_counts_no_further() -> None:
    assert not any(forced_after(3, [5, CLOSE, *[5] * 9], is_open=True))
    assert not any(forced_after(3, [OPEN, 5, 5, CLOSE, *[5] * 9]))
    assert not any(forced_after(3, [5] * 9)), "nothing was ever opened"
    assert not any(forced_after(0, [CLOSE, 5, CLOSE]))


def test_all_thoughts_count_together() -> None:
    tokens = [OPEN, 5, 5, CLOSE, 6, 6, OPEN, 5]
    assert forced_after(3, tokens) == [False] * 8 + [True]
    assert forced_after(4, tokens) == [False] * 9
    assert forced_after(2, tokens[:7]) == [False] * 3 + [True] + [False] * 3 + [True]


def test_an_opening_within_a_thought_is_one_of_its_tokens() -> None:
    assert forced_after(2, [OPEN, OPEN, OPEN]) == [False, False, False, True]
