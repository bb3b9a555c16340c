"""Who knows what comes next: with Bezel's pages, how much could be found at best, nearly.

Belady's rule for whole chats: when room is needed, the one goes whose next turn is farthest away,
even the one just served. With chats of one size no rule finds more; with others it is a good guide
(Belady 1966, "A study of replacement algorithms for a virtual-storage computer"). Instructions that
several chats begin with are kept once and for good; a request at work takes no room.
"""

from cache_policies.bezel import layout_of
from cache_policies.trace import Turn

from bezel.engine.kv_layout import PageCount
from bezel.engine.model_config import ModelConfig

_NEVER = 1 << 60


def serve_all(model: ModelConfig, num_bytes: int, turns: list[Turn]) -> int:
    """Tokens of all prompts that are found."""
    layout = layout_of(model)
    kept: dict[int, tuple[int, int]] = {}  # of each chat its next turn, and bytes
    shared: dict[int, int] = {}  # bytes of instructions, by their first token
    num_found = 0
    for turn, next_turn in zip(turns, _next_turns(turns), strict=True):
        num_shared = turn.num_preamble // layout.global_page_size
        if turn.chat in kept:
            num_found += turn.num_known
        else:
            num_found += min(turn.num_known, num_shared * layout.global_page_size)
        if num_shared:
            pages = PageCount(layout.max_local_pages, num_shared)
            shared[turn.text[0]] = layout.num_bytes(pages)
        num_own = layout.num_global_pages(len(turn.text)) - num_shared
        kept[turn.chat] = (
            next_turn,
            layout.num_bytes(PageCount(layout.max_local_pages, num_own)),
        )
        room = num_bytes - sum(shared.values())
        while sum(size for _, size in kept.values()) > room:
            del kept[max(kept, key=lambda chat: kept[chat])]
    return num_found


def _next_turns(turns: list[Turn]) -> list[int]:
    """For each turn, when the same chat takes its next one."""
    latest: dict[int, int] = {}
    result = []
    for i, turn in reversed(list(enumerate(turns))):
        result.append(latest.get(turn.chat, _NEVER))
        latest[turn.chat] = i
    return result[::-1]
