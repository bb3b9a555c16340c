"""Bezel itself: the engine's scheduler, page pool and prefix cache, without a model.

One request at a time, so that nothing but the cache decides what is found.
"""

from cache_policies.trace import Load, TooSmall, Turn

from bezel.engine.config import EngineConfig
from bezel.engine.kv_layout import KVLayout, PageCount
from bezel.engine.model_config import ModelConfig
from bezel.engine.page_pool import PagePool
from bezel.engine.page_tables import PageTables
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.scheduler import Scheduler
from bezel.engine.sequence import Sequence


def layout_of(model: ModelConfig) -> KVLayout:
    """Pages of bfloat16 as on a GPU."""
    return KVLayout.for_model(model, 2, EngineConfig().local_page_size(is_gpu=True))


def working_set(model: ModelConfig, load: Load) -> int:
    """Bytes of the pages that hits need: a window for each chat, and all of the global layers."""
    layout = layout_of(model)
    local = load.num_chats * layout.max_local_pages
    return layout.num_bytes(PageCount(local, layout.num_global_pages(load.num_tokens)))


class Bezel:
    """Serves turns, with `num_bytes` for pages."""

    def __init__(self, model: ModelConfig, num_bytes: int) -> None:
        self._scheduler = Scheduler(EngineConfig(), PagePool(layout_of(model), num_bytes))
        self._num_turns = 0

    def serve(self, turn: Turn) -> int:
        """Tokens of the prompt that were found. Raises TooSmall."""
        self._num_turns += 1
        answer = iter(turn.text[turn.num_prompt :])
        sequence = Sequence(
            request_id=str(self._num_turns),
            token_ids=turn.text[: turn.num_prompt],
            params=SamplingParams(
                max_tokens=len(turn.text) - turn.num_prompt, num_preamble_tokens=turn.num_preamble
            ),
            seed=0,
            stop_token_ids=frozenset(),
            pages=PageTables(self._scheduler.pool.layout),
        )
        self._scheduler.add(sequence)
        while self._scheduler.has_work:
            step = self._scheduler.schedule()
            if not step.sequences:
                raise TooSmall
            self._scheduler.commit(step, [next(answer) for _ in step.sampled])
        return sequence.num_cached_tokens
