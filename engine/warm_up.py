"""Every kernel launched once at start, so that no request waits for a compiler.

Triton compiles a kernel when it is first launched, for the constants and alignments it is launched
with; that takes seconds. Which kernels a step launches depends on the kinds of its sequences, and
for experts on the number of its tokens, but not on how long its sequences are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bezel.engine.batch import Batch
from bezel.engine.decode_graphs import DecodeGraphs
from bezel.engine.kv_layout import KVLayout
from bezel.engine.page_tables import PageTables
from bezel.engine.sampler import Sampler
from bezel.engine.sampling_params import SamplingParams, ThinkingBudget
from bezel.engine.sequence import Sequence

# A row of each kind. Log-probabilities have three, too: with one likeliest token, a multiple of 16,
# and other numbers of them.
ROWS = [
    SamplingParams(max_tokens=1, temperature=0.0),
    SamplingParams(max_tokens=1),
    SamplingParams(max_tokens=1, min_p=0.1, logprobs=2),
    SamplingParams(max_tokens=1, top_k=64, logit_bias={1: 1.0}),
    SamplingParams(max_tokens=1, top_p=0.9),
    SamplingParams(
        max_tokens=1,
        thinking_budget=ThinkingBudget(num_tokens=0, open_id=0, close_id=1, is_open=True),
    ),
]


def warm_up_model(
    compute: Callable[[Batch], Tensor],
    layout: KVLayout,
    max_num_tokens: int,
    max_model_len: int,
    device: torch.device,
) -> None:
    """Compute idle steps: chunks of 2, 4, 8 … and `max_num_tokens` tokens, and a sequence's decode.

    Nothing is stored, and of the KV cache only page 0 is read.
    """
    num_tokens = 2
    while num_tokens < max_num_tokens:
        compute(Batch.idle_chunk(num_tokens, layout, device))
        num_tokens *= 2
    compute(Batch.idle_chunk(max_num_tokens, layout, device))
    DecodeGraphs(compute, layout, [1], max_model_len, device, capture=compute_once)


def compute_once(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """In place of recording a graph."""
    compute()
    return compute


@torch.inference_mode()
def warm_up_sampling(
    sampler: Sampler, layout: KVLayout, vocab_size: int, device: torch.device
) -> None:
    """Draw from rows of every kind, each by itself."""
    for params in ROWS:
        sequence = Sequence("", [0], params, 0, frozenset(), PageTables(layout))
        sampler.draw(torch.zeros(1, vocab_size, device=device), [sequence])
