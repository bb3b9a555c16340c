"""What the model computes in one step, as tensors.

Tokens of all sequences stand in one row, without padding; sequences that decode come first:

    cu_seqlens_q   0   1   2   3               3+n₁                3+n₁+n₂
    tokens         [d0][d1][d2][--- chunk 0 ---][----- chunk 1 -----]
                   num_decodes = 3

Layers that have keys and values of their own compute all rows, for later queries. Those that only
read others' need compute no row whose result nobody wants: they go on with `WantedRows`.

T tokens   S sequences   C sequences with a chunk   P, R entries of a page table
N tokens whose logits are wanted
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bezel.engine.kv_layout import KVLayout
from bezel.engine.page_tables import oldest_kept
from bezel.engine.row_choice import RowChoice, offsets
from bezel.engine.scheduler import ScheduledSequence, ScheduledStep
from bezel.kernels.kv_pages import NO_SLOT

Ints = npt.NDArray[np.int64]
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class PageInputs:
    """Where the layers of one kind read and write in this step (int64).

    `slot_mapping_T` is NO_SLOT for tokens that no later query of a local layer will look back at.
    """

    page_table_SP: Tensor
    slot_mapping_T: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Device inputs of a step (int64), and on the host what launches need to know.

    The first `num_decodes` sequences have `decode_q_len` tokens each. `cu_seqlens_q_C1` holds the
    offsets of the other sequences' chunks, counted from the first chunk's first token; the longest
    chunk has `max_q_len` tokens. Without `sampled_rows_N` the logits of all rows are wanted, and
    without `wanted` their hidden states.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    seq_lens_S: Tensor
    local: PageInputs
    global_: PageInputs
    num_decodes: int
    decode_q_len: int = 1
    cu_seqlens_q_C1: Tensor | None = None
    max_q_len: int = 0
    sampled_rows_N: Tensor | None = None
    wanted: "WantedRows | None" = None

    @property
    def num_decode_tokens(self) -> int:
        return self.num_decodes * self.decode_q_len

    @property
    def has_chunks(self) -> bool:
        return self.num_decodes < len(self.seq_lens_S)

    @classmethod
    def build(cls, step: ScheduledStep, layout: KVLayout, device: torch.device) -> "Batch":
        """Lay out a scheduled step; everything goes to the device in one transfer."""
        scheduled = step.sequences
        num_decodes = sum(s.num_tokens == 1 for s in scheduled)
        ends = np.cumsum([s.num_tokens for s in scheduled])
        sampled = [end - 1 for s, end in zip(scheduled, ends, strict=True) if s.is_sampled]
        arrays = [*row_arrays(scheduled, layout), global_tables(scheduled)]
        q_lens = [s.num_tokens for s in scheduled[num_decodes:]]
        sent = [*arrays, offsets(q_lens), np.asarray(sampled, dtype=np.int64)]
        wanted = RowChoice.of(scheduled)
        if wanted is not None:
            sent += [wanted.rows_N, *wanted.select(arrays), offsets(wanted.q_lens)]
        tensors = _send(sent, device)
        batch = cls._with_chunks(tensors[:8], num_decodes, q_lens)
        if wanted is not None:
            later = cls._with_chunks(tensors[10:], wanted.num_decodes, wanted.q_lens)
            batch = replace(batch, wanted=WantedRows(tensors[9], later))
        return replace(batch, sampled_rows_N=tensors[8])

    @classmethod
    def _with_chunks(cls, tensors: list[Tensor], num_decodes: int, q_lens: list[int]) -> "Batch":
        """From tensors in the order of `row_arrays`, global tables, and offsets of the chunks."""
        batch = cls.of_rows(tensors[:6], tensors[6], num_decodes)
        return replace(batch, cu_seqlens_q_C1=tensors[7], max_q_len=max(q_lens, default=0))

    @classmethod
    def of_rows(
        cls, rows: list[Tensor], global_table_SP: Tensor, num_decodes: int, decode_q_len: int = 1
    ) -> "Batch":
        """A batch without chunks from tensors in the order of `row_arrays`; all rows sampled."""
        token_ids_T, positions_T, local_slots_T, global_slots_T, seq_lens_S, local_table_SR = rows
        return cls(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            seq_lens_S=seq_lens_S,
            local=PageInputs(local_table_SR, local_slots_T),
            global_=PageInputs(global_table_SP, global_slots_T),
            num_decodes=num_decodes,
            decode_q_len=decode_q_len,
        )

    @classmethod
    def idle_chunk(cls, num_tokens: int, layout: KVLayout, device: torch.device) -> "Batch":
        """One chunk that stores nothing and reads page 0, to warm up with."""
        numbers = np.arange(num_tokens)
        nowhere = np.full(num_tokens, NO_SLOT)
        ring = np.zeros((1, layout.ring_size), dtype=np.int64)
        table = np.zeros((1, layout.num_global_pages(num_tokens)), dtype=np.int64)
        ends = np.asarray([num_tokens])
        tensors = _send(
            [numbers * 0, numbers, nowhere, nowhere, ends, ring, table, np.append(0, ends)], device
        )
        batch = cls.of_rows(tensors[:6], tensors[6], num_decodes=0)
        return replace(batch, cu_seqlens_q_C1=tensors[7], max_q_len=num_tokens)


@dataclass(frozen=True, slots=True)
class WantedRows:
    """Rows of a step that somebody wants: row `rows_N[i]` of the step is row i of `batch`.

    The last row of a chunk is a decode in it, whose keys and values have to be in pages. Chunks of
    prompts with log-probabilities are wanted whole, and stay chunks.
    """

    rows_N: Tensor
    batch: Batch


def row_arrays(scheduled: list[ScheduledSequence], layout: KVLayout) -> list[Ints]:
    """Token ids, positions, local slots and global slots of every token; lengths and local page
    tables of every sequence. Those with a single token, which come first, are put together as
    numbers: arrays of one would take longer than all the rest."""
    num_singles = sum(s.num_tokens == 1 for s in scheduled)
    singles, chunks = scheduled[:num_singles], scheduled[num_singles:]
    ring = [np.frombuffer(s.local_read_table, dtype=np.int64) for s in scheduled]
    return [
        _row(
            [s.sequence.token_ids[s.start] for s in singles],
            [s.sequence.token_ids[s.start : s.end] for s in chunks],
        ),
        _row([s.start for s in singles], [_positions(s) for s in chunks]),
        _row(
            [_local_slot(s, layout) for s in singles],
            [_local_slots(s, layout) for s in chunks],
        ),
        _row(
            [_global_slot(s, layout) for s in singles],
            [_global_slots(s, layout) for s in chunks],
        ),
        np.asarray([s.end for s in scheduled]),
        np.stack(ring),
    ]


def global_tables(scheduled: list[ScheduledSequence]) -> Ints:
    """Global page tables, as wide as the longest."""
    tables = [np.frombuffer(s.sequence.pages.global_table, dtype=np.int64) for s in scheduled]
    padded = np.zeros((len(tables), max(map(len, tables))), dtype=np.int64)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded


def pinned(array: Ints, device: torch.device) -> Tensor:
    """`array` as a host tensor that a GPU fetches without making the host wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def pack(arrays: list[Ints]) -> Ints:
    """The arrays one after the other, each on a boundary of ALIGNMENT numbers.

    Triton compiles a kernel anew for a pointer with less than the usual alignment.
    """
    packed = np.zeros(sum(map(_aligned, arrays)), dtype=np.int64)
    begin = 0
    for array in arrays:
        packed[begin : begin + array.size] = array.ravel()
        begin += _aligned(array)
    return packed


def unpack(packed: Tensor, arrays: list[Ints]) -> list[Tensor]:
    """Views of a packed tensor in the shapes of the arrays that were packed."""
    parts = torch.split(packed, [_aligned(array) for array in arrays])
    return [part[: array.size].view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _aligned(array: Ints) -> int:
    return -(-array.size // ALIGNMENT) * ALIGNMENT


def _send(arrays: list[Ints], device: torch.device) -> list[Tensor]:
    return unpack(pinned(pack(arrays), device).to(device, non_blocking=True), arrays)


def _row(singles: list[int], chunks: Sequence[npt.ArrayLike]) -> Ints:
    row: Ints = np.concatenate([np.asarray(singles, dtype=np.int64), *chunks])
    return row


def _local_slot(scheduled: ScheduledSequence, layout: KVLayout) -> int:
    page, offset = divmod(scheduled.start, layout.local_page_size)
    table = scheduled.sequence.pages.local_table
    return table[page % layout.ring_size] * layout.local_page_size + offset


def _global_slot(scheduled: ScheduledSequence, layout: KVLayout) -> int:
    page, offset = divmod(scheduled.start, layout.global_page_size)
    pages = scheduled.sequence.pages
    if page < pages.num_shared_global:
        return NO_SLOT
    return pages.global_table[page] * layout.global_page_size + offset


def _positions(scheduled: ScheduledSequence) -> Ints:
    return np.arange(scheduled.start, scheduled.end)


def _local_slots(scheduled: ScheduledSequence, layout: KVLayout) -> Ints:
    table = np.frombuffer(scheduled.sequence.pages.local_table, dtype=np.int64)
    positions = _positions(scheduled)
    size = layout.local_page_size
    slots: Ints = table[positions // size % layout.ring_size] * size + positions % size
    oldest = oldest_kept(scheduled.start, scheduled.end, scheduled.anchor)
    slots[positions < oldest - layout.window + 1] = NO_SLOT
    return slots


def _global_slots(scheduled: ScheduledSequence, layout: KVLayout) -> Ints:
    table = np.frombuffer(scheduled.sequence.pages.global_table, dtype=np.int64)
    positions = _positions(scheduled)
    size = layout.global_page_size
    slots: Ints = table[positions // size] * size + positions % size
    slots[positions < scheduled.sequence.pages.num_shared_global * size] = NO_SLOT
    return slots
