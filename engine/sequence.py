"""One stream of tokens that the scheduler advances: its tokens, its progress, its pages."""

from bisect import insort
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from bezel.engine.errors import GrammarError
from bezel.engine.grammar import GrammarState
from bezel.engine.messages import FailureCause, FinishReason
from bezel.engine.page_tables import PageTables
from bezel.engine.prefix_cache import Block
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.thought_limit import ThoughtLimit


class SequenceStatus(Enum):
    """Where a sequence is. A preempted one is waiting again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """`token_ids` is the prompt and what was sampled; `num_computed_tokens` of them have K/V.

    `stop_token_ids` is the checkpoint's EOS set and the request's own, ready for look-ups.
    `block` is how far its text is in the prefix cache, `last_checkpoint` the newest that it put
    there and may take away again, `stops` positions, ascending, where others have gone or may go
    other ways; `num_cached_tokens` of the prompt were found there. `num_once_computed` tokens had
    K/V before the sequence was last preempted. One that `is_private` shares nothing.

    The scheduler's own: `arrival`, how many sequences came before; `num_started_before`, how many
    had started by then; `is_due`, it has waited so long that it outranks all that aren't;
    `expected_hit`, tokens that were in the cache when it was looked at; `num_passed`, how many
    behind it went first; `leader`, who computes the first `num_led_tokens` of its text as well.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    pages: PageTables
    grammar: GrammarState | None = None
    thought_limit: ThoughtLimit | None = field(init=False, default=None)
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    num_once_computed: int = 0
    num_cached_tokens: int = 0
    block: Block | None = None
    last_checkpoint: Block | None = None
    stops: list[int] = field(default_factory=list)
    is_private: bool = False
    arrival: int = 0
    num_started_before: int = 0
    is_due: bool = False
    expected_hit: int | None = None
    num_passed: int = 0
    leader: "Sequence | None" = None
    num_led_tokens: int = 0
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    failure: FailureCause | None = None
    output_counts: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        if self.params.thinking_budget is not None:
            self.thought_limit = ThoughtLimit(self.params.thinking_budget)

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

    @property
    def rank(self) -> tuple[bool, int, int]:
        """Who goes first: the lower one."""
        return not self.is_due, self.params.priority, self.arrival

    @property
    def is_too_short(self) -> bool:
        """No stop token may end it yet."""
        return self.num_output_tokens < self.params.min_tokens

    @property
    def forced_id(self) -> int | None:
        """The token that has to come next, as soon as the grammar lets it; None while any may."""
        return None if self.thought_limit is None else self.thought_limit.forced_id

    @property
    def is_bound(self) -> bool:
        """Whether a mask says what may come next."""
        if self.grammar is None and self.thought_limit is None:  # as a rule, and soon decided
            return False
        return self.grammar is not None or self.forced_id is not None

    def add_stop(self, position: int) -> None:
        """Have a chunk end there, and a checkpoint stay."""
        if position > 0 and position not in self.stops:
            insort(self.stops, position)

    def append(self, token_id: int) -> FinishReason | None:
        """Add a sampled token, which the mask has to allow; return why the sequence ends with it,
        or None.

        The end of a grammar is the end of the sequence, for nothing could follow.
        """
        self.token_ids.append(token_id)
        self.output_counts[token_id] += 1
        if self.thought_limit is not None:
            self.thought_limit.accept(token_id)
        if self.grammar is not None:
            try:
                self.grammar.accept(token_id)
            except GrammarError:
                self.failure = FailureCause.GRAMMAR
                return FinishReason.ERROR
            if self.grammar.is_finished:
                return FinishReason.STOP
        if token_id in self.stop_token_ids and not self.is_too_short:
            return FinishReason.STOP
        if self.num_output_tokens >= self.params.max_tokens:
            return FinishReason.LENGTH
        return None
