"""Keys and values of beginnings that come again: chats resend all that was said, turn by turn.

Known text is a tree of blocks, one global page each. A block's page stays as long as something
below it can be used. What can be resumed from is a *checkpoint*: a block whose end also has the
local pages of the window before it.

    "You are …" ─[b0]─[b1 ●]─┬─[b2]─[b3 ●]          ● checkpoint: 64 i tokens, and their window
                             └─[b4]─[b5]─[b6 ●]

A hit resumes at the deepest checkpoint on the way down the prompt, and shares the global pages of
all blocks that match, even those below it: tokens after the checkpoint run again, for their local
layers' sake, but their global keys and values aren't written twice.

Pages are the cache's like anyone's, counted by the pool. When room is needed the checkpoint goes
whose loss costs the least computing per byte, older ones counting less (GreedyDual-Size-Frequency,
Cherkasova 1998), and with it the blocks that only led there.

If more texts take turns than there is room for, each would be dropped just before it comes again.
So what comes back too late counts, until it is used, for a random share of its worth: the smaller,
the more have come too late of late. Others then stay long enough (after Qureshi et al. 2007,
"Adaptive insertion policies").
"""

import heapq
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bezel.engine.page_pool import PagePool

# Evicted checkpoints whose texts are remembered, to notice when they come again.
_MAX_REMEMBERED = 4096
# Texts that come again, of which the latest count most; and how much it matters how many are late.
_MEMORY, _SHARPNESS = 32, 8
# Entries of checkpoints that are gone, before the heap is made anew.
_MAX_LEFT_OVER = 1024


@dataclass(slots=True, eq=False)
class Block:
    """The text of one global page, after that of its parent.

    `window` is the checkpoint's local pages, in order; None without one. `num_users` sequences have
    computed to here and will go on. `num_uses`, `stamp` and `share` are what eviction goes by.
    `key` stands for all the text up to here.
    """

    parent: "Block | None"
    token_ids: tuple[int, ...]
    page: int
    depth: int
    children: dict[tuple[int, ...], "Block"] = field(default_factory=dict)
    window: list[int] | None = None
    num_users: int = 0
    num_uses: int = 0
    stamp: float = 0.0
    key: int = 0
    share: float = 1.0

    def ancestor(self, depth: int) -> "Block":
        """The block of that depth on the way here, perhaps this one."""
        block = self
        while block.depth > depth:
            assert block.parent is not None
            block = block.parent
        return block


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """Resume after `checkpoint`, or at the beginning if it is None; `block` is the last that
    matches."""

    checkpoint: Block | None
    block: Block


class PrefixCache:
    """One tree for each salt. Holds pages of `pool`; `evict` gives some back."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._block_size = pool.layout.global_page_size
        self._roots: dict[str, Block] = {}
        self._clock = 0.0
        # (priority when pushed, order, block): each checkpoint at least once, at most its priority
        # of now. Those of blocks without one are left over.
        self._heap: list[tuple[float, int, Block]] = []
        self._order = itertools.count()
        self._evicted: dict[int, None] = {}  # keys, oldest first
        self._late = 0.0  # how many of those that come again come too late, recently
        self._random = random.Random(0)
        self.num_checkpoints = 0
        self.num_evicted = 0

    def root(self, salt: str) -> Block:
        """Where text under this salt begins. Other salts never see it."""
        return self._roots.setdefault(salt, Block(None, (), -1, 0, key=hash(salt)))

    def match(self, token_ids: Sequence[int], salt: str) -> PrefixHit | None:
        """What is there of a text, all of which but one token at most; None if nothing is."""
        path = list(self._walk(token_ids, salt))
        if not path:
            return None
        checkpoints = (block for block in reversed(path) if block.window is not None)
        return PrefixHit(next(checkpoints, None), path[-1])

    def _walk(self, token_ids: Sequence[int], salt: str) -> Iterator[Block]:
        block, size = self._roots.get(salt), self._block_size
        for start in range(0, len(token_ids) - size, size):
            block = block and block.children.get(tuple(token_ids[start : start + size]))
            if block is None:
                return
            yield block

    def mark_used(self, checkpoint: Block) -> None:
        """A sequence resumes here, or would leave the same: worth more from now on."""
        checkpoint.num_uses += 1
        checkpoint.stamp = self._clock
        checkpoint.share = 1.0
        self._late -= self._late / _MEMORY

    def enter(self, block: Block) -> None:
        """A sequence goes on from here: the block stays until it leaves."""
        block.num_users += 1

    def leave(self, block: Block) -> None:
        """End what `enter` or `extend` began."""
        block.num_users -= 1
        self._prune(block)

    def extend(self, block: Block, token_ids: tuple[int, ...], page: int) -> Block:
        """Move a sequence to the next block, whose keys and values `page` has.

        If others were faster their page stays, and this one is the sequence's alone.
        """
        assert len(token_ids) == self._block_size
        child = block.children.get(token_ids)
        if child is None:
            key, share = hash((block.key, token_ids)), block.share
            if key in self._evicted:
                del self._evicted[key]
                self._late += (1 - self._late) / _MEMORY
                share = self._random.random() ** (_SHARPNESS * self._late)
            child = Block(block, token_ids, page, block.depth + 1, key=key, share=share)
            block.children[token_ids] = child
            self._pool.cache_pages(global_=[page])
            if block.window is not None and len(block.children) == 1:
                self._push(block)  # it has become worth less
        self.enter(child)
        self.leave(block)
        return child

    def add_checkpoint(self, block: Block, window: list[int]) -> bool:
        """Make the block's end a place to resume from; False if it is one already, which then is
        no longer its maker's alone to drop."""
        if block.window is not None:
            self.mark_used(block)
            return False
        block.stamp = self._clock
        self._pool.cache_pages(local=window)
        block.window = window
        block.num_uses = 1
        self.num_checkpoints += 1
        self._push(block)
        return True

    def drop_checkpoint(self, block: Block) -> None:
        """Give it up, unless somebody has resumed from it or others branch off there."""
        if block.window is not None and block.num_uses == 1 and len(block.children) <= 1:
            self._remove_checkpoint(block)

    def evict(self) -> bool:
        """Give up the checkpoint that is worth the least; False if there is none."""
        while self._heap:
            _, _, block = heapq.heappop(self._heap)
            if block.window is None:
                continue
            priority = self._priority(block)
            if self._heap and priority > self._heap[0][0]:
                self._push(block)  # it was used since, or others went and left more to it
                continue
            self._clock = max(self._clock, priority)
            self.give_up(block)
            return True
        return False

    def give_up(self, checkpoint: Block) -> None:
        """Evict this one."""
        self.num_evicted += 1
        if not checkpoint.children:
            self._evicted[checkpoint.key] = None
            if len(self._evicted) > _MAX_REMEMBERED:
                del self._evicted[next(iter(self._evicted))]
        self._remove_checkpoint(checkpoint)

    def _push(self, block: Block) -> None:
        if len(self._heap) > 4 * self.num_checkpoints + _MAX_LEFT_OVER:
            self._heap = []
            for other in self._checkpoints():
                if other is not block:
                    heapq.heappush(self._heap, self._entry(other))
        heapq.heappush(self._heap, self._entry(block))

    def _entry(self, block: Block) -> tuple[float, int, Block]:
        return self._priority(block), next(self._order), block

    def _checkpoints(self) -> Iterator[Block]:
        pending = list(self._roots.values())
        while pending:
            block = pending.pop()
            pending += block.children.values()
            if block.window is not None:
                yield block

    def _priority(self, block: Block) -> float:
        """Tokens to compute again for each MiB that its loss would free, added to the clock's
        reading when it was last used."""
        assert block.window is not None
        if len(block.children) == 1:
            return block.stamp  # its only conversation has gone beyond it
        layout = self._pool.layout
        num_blocks, parent = 1, block.parent
        while parent is not None and parent.parent is not None and parent.window is None:
            num_blocks += 1
            parent = parent.parent
        num_bytes = len(block.window) * layout.local_page_bytes
        num_bytes += num_blocks * layout.global_page_bytes
        saved = num_blocks * self._block_size * block.num_uses * block.share
        return block.stamp + saved * 2**20 / num_bytes

    def _remove_checkpoint(self, block: Block) -> None:
        assert block.window is not None
        self._pool.uncache_pages(local=block.window)
        block.window = None
        self.num_checkpoints -= 1
        self._prune(block)

    def _prune(self, block: Block) -> None:
        """Forget blocks that lead nowhere, from here upwards."""
        while not (block.children or block.num_users or block.window is not None):
            parent = block.parent
            if parent is None:
                self._roots = {s: root for s, root in self._roots.items() if root is not block}
                return
            del parent.children[block.token_ids]
            self._pool.uncache_pages(global_=[block.page])
            block = parent
