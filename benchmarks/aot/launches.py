"""Every kind of step of every model, run through the engine itself on torch's meta device.

The engine builds its model, its KV cache and its batches there as it would on a GPU; tensors have
shapes, strides and alignment, but no memory. Which kernels a step launches, with which tiles and
constants, is thus the engine's own doing and not a list that somebody keeps.

Sizes are chosen so that each specialisation occurs: a number that is 1, that 16 divides, and
neither, and for the experts every range of tokens that has tiles of its own. Checking several
drafted tokens of a sequence is part of it before the engine has learnt to draft.

float32 is for comparisons, not for speed. Its launches are just enough to show that its tiles fit:
every width of heads, decoding and prefill, the smallest and the largest tile of the experts.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from aot.driver import CompilingDriver
from torch import Tensor

from bezel.engine.batch import Batch
from bezel.engine.decode_graphs import DecodeGraphs
from bezel.engine.kv_cache import KVCache
from bezel.engine.kv_layout import KVLayout
from bezel.engine.model_config import ModelConfig
from bezel.engine.models.registry import build_model
from bezel.engine.planning.published import PUBLISHED
from bezel.engine.sampler import Sampler
from bezel.engine.warm_up import compute_once, warm_up_sampling

META = torch.device("meta")
ARENA_BYTES = 16 << 30  # more than 4 GiB, as on any GPU: AMD's compiler asks
MAX_MODEL_LEN = 32_768
PAGE_SIZE = 16


class Sizes(NamedTuple):
    """Of the steps: sequences that decode, tokens of one whose drafted continuation is checked, and
    tokens of a chunk."""

    decode: list[int]
    verify: list[int]
    chunk: list[int]


SIZES = Sizes(decode=[1, 4, 16, 64, 128], verify=[4, 8], chunk=[17, 512, 4096])
FLOAT32_SIZES = Sizes(decode=[1], verify=[], chunk=[4096])
# Heads 256 and 512 wide, the latter with keys apart and packed with values; the last has experts.
FLOAT32_MODELS = ["270M", "E2B", "26B-A4B"]

# As tables call the models: short, without what all have in common.
CONFIGS: dict[str, dict[str, Any]] = {
    name.removeprefix("gemma-3-").removeprefix("gemma-4-").upper(): config
    for name, config in PUBLISHED.items()
}


def launch_everything(driver: CompilingDriver) -> list[str]:
    """Compile all that the models launch; which steps of which models failed, and why."""
    return _launch(driver, list(CONFIGS), torch.bfloat16, SIZES)


def launch_in_float32(driver: CompilingDriver) -> list[str]:
    """The same for float32, of which it is enough to know that it fits."""
    return _launch(driver, FLOAT32_MODELS, torch.float32, FLOAT32_SIZES)


@torch.inference_mode()
def _launch(
    driver: CompilingDriver, models: list[str], dtype: torch.dtype, sizes: Sizes
) -> list[str]:
    failures = []
    for model in models:
        for step, compute in _steps(ModelConfig.from_hf(CONFIGS[model]), dtype, sizes):
            driver.user = (model, step)
            try:
                compute()
            except Exception as error:
                reason = str(error).strip().splitlines()[-1]
                failures.append(f"{model}, {dtype}, {step}: {reason}")
    return failures


def _steps(
    config: ModelConfig, dtype: torch.dtype, sizes: Sizes
) -> Iterator[tuple[str, Callable[[], object]]]:
    model = build_model(config, dtype, META)
    model.after_loading()
    layout = KVLayout.for_model(config, dtype.itemsize, PAGE_SIZE)
    kv_cache = KVCache(config, layout, ARENA_BYTES, dtype, META)

    def forward(batch: Batch) -> Tensor:
        hidden_TD: Tensor = model(batch, kv_cache)
        logits_NV: Tensor = model.compute_logits(hidden_TD[: sizes.decode[-1]])
        return logits_NV

    yield (
        "decode",
        lambda: DecodeGraphs(
            forward, layout, sizes.decode, MAX_MODEL_LEN, META, capture=compute_once
        ),
    )
    for q_len in sizes.verify:
        yield f"verify-{q_len}", partial(forward, _decodes(layout, 4, q_len))
    for num_tokens in sizes.chunk:
        yield "prefill", partial(forward, Batch.idle_chunk(num_tokens, layout, META))
    yield "mixed", partial(forward, _decodes_and_chunk(layout, 3, sizes.chunk[0]))
    sampler = Sampler([], config.vocab_size)
    yield "sample", partial(warm_up_sampling, sampler, layout, config.vocab_size, META)


def _decodes(layout: KVLayout, num_seqs: int, q_len: int) -> Batch:
    num_tokens, num_pages = num_seqs * q_len, layout.num_global_pages(MAX_MODEL_LEN)
    rows = [_ints(num_tokens) for _ in range(4)] + [_ints(num_seqs)]
    tables = _ints(num_seqs, layout.ring_size), _ints(num_seqs, num_pages)
    return Batch.of_rows([*rows, tables[0]], tables[1], num_seqs, q_len)


def _decodes_and_chunk(layout: KVLayout, num_decodes: int, num_tokens: int) -> Batch:
    batch = _decodes(layout, num_decodes + num_tokens, 1)
    num_seqs = num_decodes + 1
    return replace(
        batch,
        seq_lens_S=batch.seq_lens_S[:num_seqs],
        local=replace(batch.local, page_table_SP=batch.local.page_table_SP[:num_seqs]),
        global_=replace(batch.global_, page_table_SP=batch.global_.page_table_SP[:num_seqs]),
        num_decodes=num_decodes,
        cu_seqlens_q_C1=_ints(2),
        max_q_len=num_tokens,
    )


def _ints(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=META)
