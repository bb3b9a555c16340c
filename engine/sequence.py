"""One stream of tokens that the scheduler advances: its tokens, its progress, its pages."""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from bezel.engine.messages import FinishReason
from bezel.engine.page_tables import PageTables
from bezel.engine.sampling_params import SamplingParams


class SequenceStatus(Enum):
    """Where a sequence is. A preempted one is waiting again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """`token_ids` is the prompt and what was sampled; `num_computed_tokens` of them have K/V.

    `stop_token_ids` is the checkpoint's EOS set and the request's own, ready for look-ups.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    pages: PageTables
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    output_counts: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_prefilling(self) -> bool:
        """More than the newest token is still to be computed."""
        return self.num_uncomputed_tokens > 1

    def append(self, token_id: int) -> FinishReason | None:
        """Add a sampled token; return why the sequence ends with it, or None."""
        self.token_ids.append(token_id)
        self.output_counts[token_id] += 1
        if token_id in self.stop_token_ids and self.num_output_tokens >= self.params.min_tokens:
            return FinishReason.STOP
        if self.num_output_tokens >= self.params.max_tokens:
            return FinishReason.LENGTH
        return None
