"""Decode steps on a CPU, recorded once and run again with new inputs: see kernels/cpu/launch.py.

What `decode_graphs` is on a GPU. A program is recorded for each number of sequences when it first
comes up. All read the same static inputs and compute in the same arena, as one runs at a time.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bezel.engine.batch import ALIGNMENT, Batch, Ints, global_tables, pack, row_arrays, unpack
from bezel.engine.decode_graphs import IDLE
from bezel.engine.kv_layout import KVLayout
from bezel.engine.scheduler import ScheduledStep
from bezel.kernels.cpu.launch import Arena, CannotRecord, Recording
from bezel.kernels.cpu.program import Program

logger = logging.getLogger("bezel")

ARENA_BYTES = 1 << 31  # of addresses: memory is taken only where something is written


class DecodePrograms:
    """Recorded decode steps by number of sequences; `forward` computes hidden states of a batch."""

    def __init__(
        self,
        forward: Callable[[Batch], Tensor],
        layout: KVLayout,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self._forward, self._layout = forward, layout
        self._arena = Arena(ARENA_BYTES)
        self._table_SP = torch.zeros(
            max_num_seqs, layout.num_global_pages(max_model_len), dtype=torch.int64
        )
        num_packed = max_num_seqs * (layout.ring_size + 5) + 6 * ALIGNMENT
        self._packed = torch.zeros(num_packed, dtype=torch.int64)
        self._programs: dict[int, tuple[Program, Tensor] | None] = {}

    @property
    def sizes(self) -> set[int]:
        """Numbers of sequences whose steps are recorded."""
        return {size for size, program in self._programs.items() if program is not None}

    def takes(self, step: ScheduledStep) -> bool:
        """Whether every sequence of the step decodes, and such steps can be recorded."""
        num_seqs = len(step.sequences)
        return self._programs.get(num_seqs, True) is not None and all(
            s.num_tokens == 1 and s.is_sampled for s in step.sequences
        )

    def run(self, step: ScheduledStep) -> Tensor | None:
        """Hidden states of the step's sequences, valid until the next call; None if the step turns
        out not to be recordable."""
        return self._run(row_arrays(step.sequences, self._layout), global_tables(step.sequences))

    def warm_up(self) -> None:
        """Record and run the step of one sequence that is idle."""
        ring = np.zeros((1, self._layout.ring_size), dtype=np.int64)
        numbers = [np.asarray([number]) for number in IDLE[:-1]]
        self._run([*numbers, ring], np.zeros((1, 1), dtype=np.int64))

    def _run(self, arrays: list[Ints], table_SP: Ints) -> Tensor | None:
        packed, num_seqs = pack(arrays), len(table_SP)
        self._packed[: packed.size] = torch.from_numpy(packed)
        self._table_SP[:num_seqs, : table_SP.shape[1]] = torch.from_numpy(table_SP)
        if num_seqs not in self._programs:
            rows = unpack(self._packed[: packed.size], arrays)
            batch = Batch.of_rows(rows, self._table_SP[:num_seqs], num_decodes=num_seqs)
            self._programs[num_seqs] = self._record(batch)
        recorded = self._programs[num_seqs]
        if recorded is None:
            return None
        program, hidden_SD = recorded
        program.run()
        return hidden_SD

    def _record(self, batch: Batch) -> tuple[Program, Tensor] | None:
        self._arena.reset()
        try:
            with Recording(self._arena) as recording:
                hidden_SD = self._forward(batch)
            return Program(recording.launches), hidden_SD
        except CannotRecord as reason:
            logger.debug("decode steps are not recorded: %s", reason)
            return None
