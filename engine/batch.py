"""What the model computes in one step, as tensors.

Tokens of all sequences stand in one row, without padding; sequences with a single token first:

    cu_seqlens_q   0   1   2   3               3+n₁                3+n₁+n₂
    tokens         [d0][d1][d2][--- chunk 0 ---][----- chunk 1 -----]
                   num_decodes = 3

T tokens   S sequences   P entries of a page table   N tokens whose logits are wanted
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bezel.engine.kv_layout import KVLayout
from bezel.engine.scheduler import ScheduledSequence, ScheduledStep
from bezel.kernels.kv_pages import NO_SLOT

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PageInputs:
    """Where the layers of one kind read and write in this step (int64).

    `slot_mapping_T` is NO_SLOT for tokens that no later query of a local layer will look back at.
    """

    page_table_SP: Tensor
    slot_mapping_T: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Device inputs of a step; offsets and lengths also stand on the host, for the chunks."""

    token_ids_T: Tensor
    positions_T: Tensor
    num_decodes: int
    cu_seqlens_q: list[int]
    seq_lens: list[int]
    seq_lens_S: Tensor
    local: PageInputs
    global_: PageInputs
    sampled_rows_N: Tensor

    @property
    def chunk_cu_seqlens_q(self) -> list[int]:
        """Offsets of the chunks, counted from the first chunk's first token."""
        return [offset - self.num_decodes for offset in self.cu_seqlens_q[self.num_decodes :]]

    @property
    def chunk_seq_lens(self) -> list[int]:
        return self.seq_lens[self.num_decodes :]

    @classmethod
    def build(cls, step: ScheduledStep, layout: KVLayout, device: torch.device) -> "Batch":
        """Lay out a scheduled step."""
        scheduled = step.sequences
        cu_seqlens_q = np.cumsum([0, *(s.num_tokens for s in scheduled)]).tolist()
        seq_lens = [s.end for s in scheduled]
        token_ids = [t for s in scheduled for t in s.sequence.token_ids[s.start : s.end]]
        sampled = [
            end - 1 for s, end in zip(scheduled, cu_seqlens_q[1:], strict=True) if s.is_sampled
        ]

        def to_device(values: Any) -> Tensor:
            return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(device)

        return cls(
            token_ids_T=to_device(token_ids),
            positions_T=to_device(np.concatenate([_positions(s) for s in scheduled])),
            num_decodes=sum(s.num_tokens == 1 for s in scheduled),
            cu_seqlens_q=cu_seqlens_q,
            seq_lens=seq_lens,
            seq_lens_S=to_device(seq_lens),
            local=PageInputs(
                to_device([s.local_read_table for s in scheduled]),
                to_device(np.concatenate([_local_slots(s, layout) for s in scheduled])),
            ),
            global_=PageInputs(
                to_device(_global_tables(scheduled)),
                to_device(np.concatenate([_global_slots(s, layout) for s in scheduled])),
            ),
            sampled_rows_N=to_device(sampled),
        )


def _positions(scheduled: ScheduledSequence) -> Ints:
    return np.arange(scheduled.start, scheduled.end)


def _local_slots(scheduled: ScheduledSequence, layout: KVLayout) -> Ints:
    table = np.asarray(scheduled.sequence.pages.local_table)
    positions = _positions(scheduled)
    size = layout.local_page_size
    slots: Ints = table[positions // size % layout.ring_size] * size + positions % size
    slots[positions < scheduled.end - layout.window + 1] = NO_SLOT
    return slots


def _global_slots(scheduled: ScheduledSequence, layout: KVLayout) -> Ints:
    table = np.asarray(scheduled.sequence.pages.global_table)
    positions = _positions(scheduled)
    size = layout.global_page_size
    slots: Ints = table[positions // size] * size + positions % size
    return slots


def _global_tables(scheduled: list[ScheduledSequence]) -> Ints:
    tables = [s.sequence.pages.global_table for s in scheduled]
    padded = np.zeros((len(tables), max(map(len, tables))), dtype=np.int64)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded
