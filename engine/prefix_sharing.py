"""How sequences use the prefix cache: where they resume, what they leave there, who makes room.

admitted     match, adopt the pages, go on at the checkpoint
a step       a chunk ends where prompts branch, and keeps the window of its last full page
computed     full pages become blocks, kept windows become checkpoints
ended        the newest checkpoint stays, for the next turn
"""

from bezel.engine.kv_layout import PageCount
from bezel.engine.page_pool import PagePool
from bezel.engine.prefix_cache import PrefixCache, PrefixHit
from bezel.engine.sequence import Sequence

# Fewer aren't worth a chunk's end of their own, and the pages of a checkpoint.
MIN_SHARED_PAGES = 4


class PrefixSharing:
    """The prefix cache as the scheduler sees it; if it isn't `enabled` every text is new.

    Pages that only the cache holds take no more than `max_idle_bytes`, if that is given.
    """

    def __init__(self, pool: PagePool, enabled: bool, max_idle_bytes: int | None = None) -> None:
        self.cache = PrefixCache(pool)
        self._pool = pool
        self.is_enabled = enabled
        self._max_idle_bytes = max_idle_bytes
        self.page_size = pool.layout.global_page_size
        self.min_shared_tokens = MIN_SHARED_PAGES * self.page_size
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.num_global_hit_tokens = 0

    def match(self, sequence: Sequence) -> PrefixHit | None:
        """What is there of its text. Log-probabilities of a prompt want all of it computed."""
        if not self._shares(sequence) or sequence.params.prompt_logprobs is not None:
            return None
        return self.cache.match(sequence.token_ids, sequence.params.cache_salt)

    def num_tokens(self, hit: PrefixHit | None) -> int:
        """With which a sequence would begin."""
        depth = hit.checkpoint.depth if hit is not None and hit.checkpoint is not None else 0
        return depth * self.page_size

    def _shares(self, sequence: Sequence) -> bool:
        return self.is_enabled and not sequence.is_private

    def begin(self, sequence: Sequence, hit: PrefixHit | None) -> None:
        """Give a sequence that starts, or starts anew, what is there of its text."""
        if not self._shares(sequence):
            return
        block = self.cache.root(sequence.params.cache_salt)
        if hit is not None:
            block = hit.block
            self._adopt(sequence, hit)
        self.cache.enter(block)
        sequence.block = block
        preamble = sequence.params.num_preamble_tokens
        if preamble >= self.min_shared_tokens:
            sequence.add_stop(preamble // self.page_size * self.page_size)

    def _adopt(self, sequence: Sequence, hit: PrefixHit) -> None:
        pages = []
        block = hit.block
        while block.parent is not None:
            pages.append(block.page)
            block = block.parent
        window: list[int] = []
        if hit.checkpoint is not None:
            assert hit.checkpoint.window is not None
            window = hit.checkpoint.window
            sequence.num_computed_tokens = hit.checkpoint.depth * self.page_size
        sequence.pages.adopt(sequence.num_computed_tokens, window, pages[::-1], self._pool)
        sequence.add_stop(len(pages) * self.page_size)

    def admitted(self, sequence: Sequence, hit: PrefixHit | None) -> None:
        """Book that a sequence has begun for good."""
        if hit is not None and hit.checkpoint is not None:
            self.cache.mark_used(hit.checkpoint)
        if sequence.num_once_computed == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.num_queried_tokens += sequence.num_prompt_tokens
            self.num_hit_tokens += sequence.num_cached_tokens
            self.num_global_hit_tokens += sequence.pages.num_shared_global * self.page_size

    def chunk(self, sequence: Sequence, start: int, end: int) -> tuple[int, int]:
        """The end of a chunk that may go up to `end`, and the position whose window is kept."""
        if not self._shares(sequence) or end - start == 1:
            return end, end
        for stop in sequence.stops:
            if start < stop < end:
                return stop, stop
        # One token has to be computed anew, if the same text comes again.
        last = end - 1 if end == sequence.num_tokens else end
        boundary = last // self.page_size * self.page_size
        return end, boundary if boundary > start else end

    def computed(self, sequence: Sequence, start: int, end: int, anchor: int) -> None:
        """Book a computed chunk, while its windows are still held."""
        if sequence.block is None or (end - start == 1 and end % self.page_size):
            return
        self._add_blocks(sequence, end)
        is_prompt_end = end - start > 1 and end == sequence.num_tokens
        for position in sorted({anchor, end}):
            if position % self.page_size == 0 and position > start:
                stays = is_prompt_end or position in sequence.stops
                self._add_checkpoint(sequence, position, stays)

    def _add_blocks(self, sequence: Sequence, end: int) -> None:
        block = sequence.block
        assert block is not None
        while (begin := block.depth * self.page_size) + self.page_size <= end:
            token_ids = tuple(sequence.token_ids[begin : begin + self.page_size])
            page = sequence.pages.global_table[block.depth]
            block = self.cache.extend(block, token_ids, page)
        sequence.block = block

    def _add_checkpoint(self, sequence: Sequence, position: int, stays: bool) -> None:
        assert sequence.block is not None
        block = sequence.block.ancestor(position // self.page_size)
        is_new = self.cache.add_checkpoint(block, sequence.pages.window_pages(position))
        if sequence.last_checkpoint is not None:
            self.cache.drop_checkpoint(sequence.last_checkpoint)
        sequence.last_checkpoint = block if is_new and not stays else None

    def end(self, sequence: Sequence) -> None:
        """A sequence ended, or gives up its pages: what it left in the cache stays there."""
        if sequence.block is not None:
            self.cache.leave(sequence.block)
        sequence.block = sequence.last_checkpoint = None
        sequence.stops = []

    def give_up_windows(self, sequence: Sequence) -> bool:
        """Have it share no local pages with checkpoints any more; False if it shares none."""
        block, is_any = sequence.block, False
        oldest = sequence.num_computed_tokens - self._pool.layout.window
        while block is not None and block.depth * self.page_size > oldest:
            if block.window is not None:
                self.cache.give_up(block)
                is_any = True
            block = block.parent
        return is_any

    def trim(self) -> None:
        """Keep what only the cache holds within its limit."""
        if self._max_idle_bytes is None:
            return
        layout = self._pool.layout
        while layout.num_bytes(self._pool.idle) > self._max_idle_bytes and self.cache.evict():
            pass

    def make_room(self, wanted: PageCount) -> bool:
        """Evict until `wanted` pages can be allocated; False if that can't be had so."""
        if self._pool.can_allocate(wanted):
            return True
        if not self._pool.might_allocate(wanted):
            return False
        while self.cache.evict():
            if self._pool.can_allocate(wanted):
                return True
        return False
