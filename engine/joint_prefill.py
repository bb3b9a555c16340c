"""Prompts with the same beginning that wait together: it is computed once, for all of them.

The first to start, their *leader*, ends a chunk where the others go other ways, so that a
checkpoint comes to be there. The others let those behind them go first until the leader has come
so far. Each looks for a leader once; if that one ends or is preempted they don't wait any longer.
"""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from bezel.engine.prefix_sharing import PrefixSharing
from bezel.engine.sequence import Sequence, SequenceStatus


def lead(leader: Sequence, others: Iterable[Sequence], start: int, sharing: PrefixSharing) -> None:
    """Have those of `others` that gain by it wait for what `leader` computes from `start` on."""
    for other in others:
        if other is leader or other.leader not in (None, leader) or not _may_share(leader, other):
            continue
        shared = _num_shared(leader.token_ids, other.token_ids, sharing.page_size)
        if shared - max(start, other.expected_hit or 0) >= sharing.min_shared_tokens:
            other.leader, other.num_led_tokens = leader, shared
            leader.add_stop(shared)


def is_led(sequence: Sequence) -> bool:
    """Whether what its leader is about to compute will be found in the cache."""
    leader = sequence.leader
    return (
        leader is not None
        and leader.status is SequenceStatus.RUNNING
        and leader.num_computed_tokens < sequence.num_led_tokens
    )


def _may_share(one: Sequence, other: Sequence) -> bool:
    return (
        one.params.cache_salt == other.params.cache_salt
        and one.params.prompt_logprobs is None
        and other.params.prompt_logprobs is None
    )


def _num_shared(one: SequenceOf[int], other: SequenceOf[int], page_size: int) -> int:
    """Tokens of whole pages with which both begin; at least one of each is left."""
    low, high = 0, (min(len(one), len(other)) - 1) // page_size
    if one[:page_size] != other[:page_size]:
        return 0
    while low < high:  # pages up to `low` are equal, those after `high` are not
        middle = (low + high + 1) // 2
        if one[low * page_size : middle * page_size] == other[low * page_size : middle * page_size]:
            low = middle
        else:
            high = middle - 1
    return low * page_size
