"""What a plan promises, a real pool and scheduler keep: so many sequences, and not one more."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bezel.engine.config import EngineConfig
from bezel.engine.kv_layout import GLOBAL_PAGE_FACTOR, KVLayout
from bezel.engine.memory import DeviceMemory, num_sequences
from bezel.engine.model_config import ModelConfig
from bezel.engine.page_pool import PagePool
from bezel.engine.page_tables import PageTables
from bezel.engine.planning.capacity import MemoryPlan, plan_contexts
from bezel.engine.planning.model import PlannedModel
from bezel.engine.planning.published import PUBLISHED
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.scheduler import Scheduler
from bezel.engine.sequence import Sequence


@st.composite
def layouts(draw: st.DrawFn) -> KVLayout:
    """Windows of whole local pages, as all of Gemma's are; global pages hold four times as much."""
    page_size = draw(st.sampled_from([8, 16]))
    page_bytes = st.integers(1, 12).map(lambda n: n * 100)
    return KVLayout(
        window=16 * draw(st.integers(1, 8)),
        local_page_size=page_size,
        global_page_size=page_size * GLOBAL_PAGE_FACTOR,
        local_page_bytes=draw(page_bytes),
        global_page_bytes=draw(page_bytes),
    )


def grow_together(layout: KVLayout, num_bytes: int, num_seqs: int, num_tokens: int) -> bool:
    """Whether so many different sequences, begun at once, all come to have `num_tokens` tokens in
    pages at the same time, without the prefix cache, which may scatter pages over sectors."""
    num_prompt = max(1, num_tokens - 2 * layout.global_page_size)
    config = EngineConfig(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs * num_prompt,
        enable_prefix_caching=False,
    )
    pool = PagePool(layout, num_bytes)
    scheduler = Scheduler(config, pool)
    sequences = []
    for i in range(num_seqs):
        sequences.append(
            Sequence(
                request_id=str(i),
                token_ids=[i] * num_prompt,
                params=SamplingParams(max_tokens=num_tokens + 1 - num_prompt, ignore_eos=True),
                seed=0,
                stop_token_ids=frozenset(),
                pages=PageTables(layout),
            )
        )
        scheduler.add(sequences[-1])
    were_together = False
    while scheduler.has_work:
        step = scheduler.schedule()
        if step.num_preemptions or len(step.sequences) < len(scheduler.running):
            return False
        were_together |= len(step.sequences) == num_seqs and all(
            scheduled.end == num_tokens for scheduled in step.sequences
        )
        scheduler.commit(step, [0] * len(step.sampled))
    pool.check_integrity()
    return were_together


@given(
    layout=layouts(),
    num_tokens=st.integers(2, 400),
    num_seqs=st.integers(1, 6),
    spare=st.integers(0, 3),
)
@settings(max_examples=50)
def test_as_many_as_promised_and_not_one_more(
    layout: KVLayout, num_tokens: int, num_seqs: int, spare: int
) -> None:
    sectors = layout.num_sectors(layout.peak_pages(num_tokens)) * num_seqs + spare
    num_bytes = sectors * layout.sector_bytes
    promised = num_sequences(layout, [num_tokens], num_bytes)
    assert promised >= num_seqs
    assume(promised <= 30)
    assert grow_together(layout, num_bytes, promised, num_tokens)
    assert not grow_together(layout, num_bytes, promised + 1, num_tokens)


@pytest.mark.parametrize("name", ["gemma-4-26B-A4B", "gemma-4-31B"])
def test_the_table_of_a_published_model(name: str) -> None:
    """At 8K on 90 GB: pages as they are, only the numbers in them are missing."""
    model = PlannedModel.of(name, ModelConfig.from_hf(PUBLISHED[name]))
    config = EngineConfig(max_num_seqs=1000, max_num_batched_tokens=2048)
    memory = MemoryPlan.of(model, config, DeviceMemory(True, 90 * 10**9, 90 * 10**9))
    first = plan_contexts(model, config, memory)[0]
    assert first.num_tokens == 8192 and first.num_at_once == first.num_fit > 1
    assert grow_together(model.layout, memory.kv_bytes, first.num_fit, 8192)
    assert not grow_together(model.layout, memory.kv_bytes, first.num_fit + 1, 8192)
