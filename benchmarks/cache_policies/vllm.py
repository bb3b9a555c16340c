"""vLLM's prefix cache for models with sliding windows, re-implemented as a baseline.

Layers are cut into groups of equal page bytes: of Gemma 4 31B five of ten local layers each, 16
tokens a page, and one of the ten global layers, 32 tokens a page. All groups take pages from one
pool, whose free pages stand in a queue: the front is taken first. Pages of a request go to the
back of the queue when it ends, group by group, each group's last page first; those of local layers
already when the window has moved on. A page that is full has a name (its text and its group) until
it is taken again, and can be found by it, also in the queue. A hit ends where the global pages are
there from the beginning, and in each local group enough pages in a row for a window.

`retention` None names every full page (v0.24 and v0.25, as in vllm-project/vllm#48435). 0 names
local pages only of the window at the end of the prompt, and of that where a text in the cache goes
another way (default on `main` since vllm-project/vllm#52216); pages without a name go to the front
of the queue (since vllm-project/vllm#43447).

That report's server (one of 153,374 advertised tokens, at most 65,536 a request) has 7,051 to 8,549
pages, by the formula for that figure; here three to eight chats then find all or nothing, nothing
from 24,000 to 36,000 tokens together on. The report says 34,000 to 38,000.

Read: vllm/v1/core/{kv_cache_utils,block_pool,single_type_kv_cache_manager,kv_cache_coordinator}.py
of 2026-06 to 2026-09, and those two pull requests. Simplified: one request at a time; local pages
are freed when the next chunk begins, as without asynchronous scheduling; an answer's tokens come a
page at a time.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from cache_policies.trace import PAGE, Load, TooSmall, Turn

from bezel.engine.model_config import AttentionConfig, ModelConfig

CHUNK = 2048  # --max-num-batched-tokens, Bezel's default too


def _token_bytes(kind: AttentionConfig) -> int:
    """Of one layer: keys and values whole, in bfloat16."""
    return 2 * 2 * kind.num_kv_heads * kind.head_dim


@dataclass(frozen=True)
class Layout:
    """Groups of layers whose pages all have `page_bytes`. Global pages have `global_pages` times
    the tokens of local ones."""

    num_local_groups: int
    global_pages: int
    page_bytes: int
    window: int

    @classmethod
    def of(cls, model: ModelConfig) -> "Layout":
        num_local, num_global = len(model.local_kv_layers), len(model.global_kv_layers)
        group = min(num_local, num_global)
        assert num_local % group == num_global % group == 0 and model.local.window is not None
        assert num_global == group, "one group of global layers"
        local, global_ = _token_bytes(model.local), _token_bytes(model.global_)
        assert local % global_ == 0
        return cls(num_local // group, local // global_, PAGE * group * local, model.local.window)

    @property
    def window_pages(self) -> int:
        return ceil((self.window - 1) / PAGE)


def working_set(model: ModelConfig, load: Load) -> int:
    """Bytes of the pages that hits need."""
    layout = Layout.of(model)
    num_local = load.num_chats * layout.window_pages * layout.num_local_groups
    return (num_local + ceil(load.num_tokens / (PAGE * layout.global_pages))) * layout.page_bytes


class Pool:
    """Pages by number; free ones in the order in which they are taken, named ones to be found."""

    def __init__(self, num_pages: int, num_groups: int) -> None:
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self._holders = [0] * num_pages
        self._names: list[tuple[int, int] | None] = [None] * num_pages
        # Of the same text there may be several pages; the oldest is found.
        self._found: list[dict[int, dict[int, None]]] = [{} for _ in range(num_groups)]

    def find(self, group: int, name: int) -> int | None:
        pages = self._found[group].get(name)
        return next(iter(pages)) if pages else None

    def take(self) -> int:
        if not self.free:
            raise TooSmall
        page, _ = self.free.popitem(last=False)
        named = self._names[page]
        if named is not None:
            self._names[page] = None
            group, name = named
            del self._found[group][name][page]
            if not self._found[group][name]:
                del self._found[group][name]
        self._holders[page] = 1
        return page

    def name(self, page: int, group: int, name: int) -> None:
        self._names[page] = (group, name)
        self._found[group].setdefault(name, {})[page] = None

    def hold(self, page: int) -> None:
        self.free.pop(page, None)
        self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """The first is taken again first; those without a name before all others."""
        nameless = []
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self.free[page] = None
                if self._names[page] is None:
                    nameless.append(page)
        for page in reversed(nameless):
            self.free.move_to_end(page, last=False)


class Vllm:
    """Serves turns, with `num_bytes` for pages."""

    def __init__(
        self, layout: Layout, num_bytes: int, retention: int | None, chunk: int = CHUNK
    ) -> None:
        assert retention is None or retention == 0
        self.layout = layout
        self._is_sparse = retention == 0
        self._chunk = chunk
        self._global = layout.num_local_groups
        self.pool = Pool(num_bytes // layout.page_bytes, layout.num_local_groups + 1)

    def serve(self, turn: Turn) -> int:
        """Tokens of the prompt that were found. Raises TooSmall."""
        request = _Request(self, turn)
        computed = request.num_hit
        while computed < turn.num_prompt:
            end = min(computed + self._chunk, turn.num_prompt)
            request.compute(computed, end)
            computed = end
        # The last token of an answer is never computed.
        while computed < len(turn.text) - 1:
            end = min((computed // PAGE + 1) * PAGE, len(turn.text) - 1)
            request.compute(computed, end)
            computed = end
        request.end()
        return request.num_hit

    def hit(self, names: list[int], num_prompt: int) -> tuple[int, int]:
        """Tokens found in all groups, and in that of the global layers."""
        step = self.layout.global_pages
        limit = (num_prompt - 1) // PAGE // step
        num_global = 0
        while num_global < limit and self._has(self._global, names[(num_global + 1) * step - 1]):
            num_global += 1
        return self._window_hit(names, num_global * step) * PAGE, num_global * step * PAGE

    def _has(self, group: int, name: int) -> bool:
        return self.pool.find(group, name) is not None

    def _window_hit(self, names: list[int], num_pages: int) -> int:
        """Pages up to the last window that is whole, at most `num_pages`."""
        step, run = self.layout.global_pages, 0
        for i in range(num_pages - 1, -1, -1):
            if run == 0 and (i + 1) % step:
                continue  # no end for a hit
            if all(self._has(group, names[i]) for group in range(self._global)):
                run += 1
                if run == self.layout.window_pages:
                    return i + run
            else:
                run = 0
        return run // step * step  # the beginning of the text, shorter than a window

    def named(self, turn: Turn, num_global_hit: int, num_hit: int) -> list[range]:
        """Local pages that get names."""
        if not self._is_sparse:
            return [range(len(turn.names))]
        step, window = self.layout.global_pages, self.layout.window_pages
        ends = {(turn.num_prompt - 1) // PAGE // step * step}
        if num_global_hit > num_hit:
            ends.add(num_global_hit // PAGE)
        return [range(max(0, end - window), end) for end in ends]


class _Request:
    """The pages of one turn: a list for each group, None where the window has passed."""

    def __init__(self, policy: Vllm, turn: Turn) -> None:
        self._policy, self._turn, self._pool = policy, turn, policy.pool
        self.num_hit, num_global = policy.hit(turn.names, turn.num_prompt)
        self._named = policy.named(turn, num_global, self.num_hit)
        layout = policy.layout
        first = max(0, self.num_hit - layout.window + 1) // PAGE
        self._num_named = self.num_hit // PAGE  # pages of PAGE tokens
        self._pages: list[list[int | None]] = []
        for group in range(layout.num_local_groups):
            pages: list[int | None] = [None] * first
            pages += [self._hold(group, name) for name in turn.names[first : self._num_named]]
            self._pages.append(pages)
        step = layout.global_pages
        last = turn.names[step - 1 : self._num_named : step]
        self._pages.append([self._hold(layout.num_local_groups, name) for name in last])

    def _hold(self, group: int, name: int) -> int:
        page = self._pool.find(group, name)
        assert page is not None
        self._pool.hold(page)
        return page

    def compute(self, start: int, end: int) -> None:
        """Free what no query will see any more, take pages up to `end`, name full ones."""
        layout = self._policy.layout
        *local, global_ = self._pages
        for pages in local:
            self._release_slid(pages, max(0, start - layout.window + 1) // PAGE)
        for pages in local:
            pages += [self._pool.take() for _ in range(ceil(end / PAGE) - len(pages))]
        num_global = ceil(end / (PAGE * layout.global_pages))
        global_ += [self._pool.take() for _ in range(num_global - len(global_))]
        self._name(end // (PAGE * layout.global_pages) * layout.global_pages)

    def _release_slid(self, pages: list[int | None], num_slid: int) -> None:
        slid = []
        for i in range(num_slid - 1, -1, -1):
            page = pages[i]
            if page is None:
                break
            slid.append(page)
            pages[i] = None
        self._pool.release(slid)

    def _name(self, end: int) -> None:
        *local, global_ = self._pages
        step = self._policy.layout.global_pages
        for i in range(self._num_named, end):
            if any(i in kept for kept in self._named):
                for group, pages in enumerate(local):
                    page = pages[i]
                    assert page is not None
                    self._pool.name(page, group, self._turn.names[i])
            if (i + 1) % step == 0:
                page = global_[i // step]
                assert page is not None
                self._pool.name(page, len(local), self._turn.names[i])
        self._num_named = max(self._num_named, end)

    def end(self) -> None:
        for pages in self._pages:
            self._pool.release(page for page in reversed(pages) if page is not None)
