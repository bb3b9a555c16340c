"""SGLang's prefix cache for models with sliding windows, re-implemented as a baseline.

Two pools of token slots, split for good: for each slot of the global layers the local ones have
`RATIO`. Known text is a radix tree whose nodes hold slots of both. Each pool runs out on its own:

    global   the leaf not used for longest goes, with its slots of both pools
    local    the node not used for longest loses its local slots and is a *tombstone* then, or goes
             if it is a leaf; a tombstone without children goes too

Using a node makes its ancestors recent as well, but less so, so that windows at the ends of texts
stay. A hit is the longest beginning in the tree without tombstones in its last window of tokens, or
without any at all. Prompts put all their tokens into the tree, chunk by chunk; a text that runs
again over tombstones gives them local slots anew.

Read: python/sglang/srt/mem_cache/swa_radix_cache.py and allocator/swa.py of 2026-07/08 (commit
019cfc0f). Simplified: one request at a time; pages of 16 tokens instead of 1, so that hits are up
to 15 tokens shorter; answers are shorter than a window, so that nothing is freed while they grow.
Leaves are split so that the last holds one window, which SGLang does if asked to.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil

from cache_policies.trace import PAGE, Load, TooSmall, Turn

from bezel.engine.model_config import AttentionConfig, ModelConfig

RATIO = 0.8  # --swa-full-tokens-ratio
CHUNK = 2048  # --chunked-prefill-size, Bezel's default too


def _page_bytes(kind: AttentionConfig, num_layers: int) -> int:
    """Keys and values whole, in bfloat16."""
    return PAGE * num_layers * 2 * 2 * kind.num_kv_heads * kind.head_dim


def bytes_per_page(model: ModelConfig) -> float:
    """Of a global page, with its share of a local one."""
    local = _page_bytes(model.local, len(model.local_kv_layers))
    return _page_bytes(model.global_, len(model.global_kv_layers)) + RATIO * local


def working_set(model: ModelConfig, load: Load) -> int:
    """Bytes of pools in which all that hits need finds room: the larger pool decides."""
    assert model.local.window is not None
    num_local = load.num_chats * ceil(model.local.window / PAGE)
    num_pages = max(load.num_tokens / PAGE, num_local / RATIO)
    return ceil(num_pages * bytes_per_page(model))


@dataclass(eq=False)
class Node:
    """Pages of text after the parent's. Locks are of the request that runs."""

    names: list[int]
    parent: "Node | None"
    children: dict[int, "Node"] = field(default_factory=dict)
    is_tombstone: bool = False
    is_locked: bool = False
    is_local_locked: bool = False

    def path(self) -> Iterator["Node"]:
        """From here up, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class Sglang:
    """Serves turns, with `num_global` and `num_local` pages; `window` is in pages."""

    def __init__(self, num_global: int, num_local: int, window: int, chunk: int = CHUNK) -> None:
        self._window = window
        self._chunk = chunk // PAGE
        self.free_global, self.free_local = num_global, num_local
        self._root = Node([], None)
        # In the order of their last use.
        self._nodes: OrderedDict[Node, None] = OrderedDict()
        self._local: OrderedDict[Node, None] = OrderedDict()

    @classmethod
    def of(cls, model: ModelConfig, num_bytes: int) -> "Sglang":
        assert model.local.window is not None
        num_global = int(num_bytes / bytes_per_page(model))
        return cls(num_global, int(num_global * RATIO), ceil(model.local.window / PAGE))

    def serve(self, turn: Turn) -> int:
        """Tokens of the prompt that were found. Raises TooSmall."""
        node, num_hit = self.match(turn.names[: (turn.num_prompt - 1) // PAGE])
        num_prompt, num_pages = turn.num_prompt // PAGE, (len(turn.text) - 1) // PAGE
        end = num_hit
        while end < num_pages:
            chunk = min(self._chunk, (num_prompt if end < num_prompt else num_pages) - end)
            self._lock(node)
            self._make_room(chunk)
            self._unlock(node)
            end += chunk
            self.insert(turn.names[:end], end - chunk)
            node, _ = self.match(turn.names[:end])
        return num_hit * PAGE

    def match(self, names: list[int]) -> tuple[Node, int]:
        """The node where the longest hit ends, and its pages. It is used."""
        node, best, run = self._root, (self._root, 0), float("inf")
        depth = 0
        for node in self._walk(names):
            depth += len(node.names)
            run = 0 if node.is_tombstone else run + len(node.names)
            if run >= self._window:
                best = (node, depth)
        self._use(best[0])
        return best

    def insert(self, names: list[int], num_hit: int) -> None:
        """Put a text into the tree; of the pages after `num_hit` there are new slots."""
        depth, node = 0, self._root
        num_new = len(names) - num_hit
        num_new_local = 0
        for node in self._walk(names):
            depth += len(node.names)
            if node.is_tombstone and depth > num_hit:
                assert depth - len(node.names) >= num_hit
                node.is_tombstone = False
                self._local[node] = None
                num_new_local += len(node.names)
        num_new -= max(0, depth - num_hit)
        self.free_global -= len(names) - depth
        self.free_local -= len(names) - depth + num_new_local
        if depth < len(names):
            self._add_leaf(node, names[depth:])

    def _add_leaf(self, parent: Node, names: list[int]) -> None:
        split = max(0, len(names) - self._window)
        for part in (names[:split], names[split:]):
            if part:
                node = Node(part, parent)
                parent.children[part[0]] = node
                self._nodes[node] = self._local[node] = None
                parent = node

    def _walk(self, names: list[int]) -> Iterator[Node]:
        """Nodes of a text from the root down, the last split so that all of it matches."""
        node, depth = self._root, 0
        while depth < len(names):
            child = node.children.get(names[depth])
            if child is None:
                return
            # A page's name says all that comes before it, so its neighbours need no comparing.
            num_equal = sum(a == b for a, b in zip(child.names, names[depth:], strict=False))
            node = child if num_equal == len(child.names) else self._split(child, num_equal)
            depth += num_equal
            yield node

    def _split(self, node: Node, num_pages: int) -> Node:
        """A node of the first pages, above the rest."""
        assert node.parent is not None
        upper = Node(node.names[:num_pages], node.parent, {node.names[num_pages]: node})
        upper.is_tombstone = node.is_tombstone
        node.parent.children[node.names[0]] = upper
        node.names, node.parent = node.names[num_pages:], upper
        for order in (self._nodes, self._local):
            if node in order:
                del order[node]
                order[upper] = order[node] = None
        return upper

    def _use(self, node: Node) -> None:
        for above in reversed(list(node.path())):
            for order in (self._nodes, self._local):
                if above in order:
                    order.move_to_end(above)

    def _lock(self, node: Node) -> None:
        num_pages = 0
        for above in node.path():
            above.is_locked = True
            above.is_local_locked = num_pages < self._window
            num_pages += len(above.names)

    def _unlock(self, node: Node) -> None:
        for above in node.path():
            above.is_locked = above.is_local_locked = False

    def _make_room(self, num_pages: int) -> None:
        while self.free_global < num_pages:
            leaves = (n for n in self._nodes if not n.children and not n.is_locked)
            leaf = next(leaves, None)
            if leaf is None:
                raise TooSmall
            self._remove(leaf)
        while self.free_local < num_pages:
            node = next((n for n in self._local if not n.is_local_locked), None)
            if node is None:
                raise TooSmall
            if node.children or node.is_locked:
                node.is_tombstone = True
                del self._local[node]
                self.free_local += len(node.names)
            else:
                self._remove(node)

    def _remove(self, leaf: Node) -> None:
        """And the tombstones that it leaves without children."""
        while True:
            parent = leaf.parent
            assert parent is not None
            del parent.children[leaf.names[0]]
            del self._nodes[leaf]
            self.free_global += len(leaf.names)
            if not leaf.is_tombstone:
                del self._local[leaf]
                self.free_local += len(leaf.names)
            leaf = parent
            if not leaf.is_tombstone or leaf.children or leaf.is_locked:
                return
