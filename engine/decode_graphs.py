"""Decode steps recorded once as CUDA graphs and replayed with new inputs.

A graph is recorded for each number of sequences in `capture_sizes`; a step takes the next larger
one. The rows that are left over idle: length 0, no page read, nothing stored, output ignored.
Graphs read *static* tensors that each step overwrites:

    packed   [token ids | positions | local slots | global slots | lengths | ring tables]
    table    S × P global page ids, P for the longest sequence allowed; only used columns are sent

What a recorded step computes may depend on the values in these tensors, never on anything the host
would have to look at.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bezel.engine.batch import Batch, Ints, global_tables, pack, pinned, row_arrays, unpack
from bezel.engine.kv_layout import KVLayout
from bezel.engine.scheduler import ScheduledStep
from bezel.kernels.kv_pages import NO_SLOT

Compute = Callable[[], Tensor]
_NOTHING = np.zeros(0, dtype=np.int64)
IDLE = (0, 0, NO_SLOT, NO_SLOT, 0, 0)  # what `row_arrays` hold for idle rows


def capture_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then every multiple of 8 up to 64, of 16 up to 256, of 32 beyond; and the limit."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 32)]
    return [size for size in steps if size < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    """Recorded decode steps, by number of sequences and tokens per sequence.

    `forward` computes hidden states from a batch; `capture` records a computation and returns what
    replays it, the same output tensor each time.
    """

    def __init__(
        self,
        forward: Callable[[Batch], Tensor],
        layout: KVLayout,
        sizes: list[int],
        max_model_len: int,
        device: torch.device,
        capture: Callable[[Compute], Compute] | None = None,
    ) -> None:
        self._layout, self._sizes = layout, sizes
        self._graphs: dict[tuple[int, int], tuple[_StaticInputs, Compute]] = {}
        capture = capture or CudaCapture()
        for size in reversed(sizes):  # the largest first: the others fit into its memory
            self._record(forward, size, 1, max_model_len, device, capture)

    def takes(self, step: ScheduledStep) -> bool:
        """Whether every sequence of the step decodes, and a graph is large enough."""
        return len(step.sequences) <= self._sizes[-1] and all(
            s.num_tokens == 1 and s.is_sampled for s in step.sequences
        )

    def run(self, step: ScheduledStep) -> Tensor:
        """Hidden states of the step's sequences; valid until the next call."""
        num_seqs = len(step.sequences)
        size = next(size for size in self._sizes if size >= num_seqs)
        inputs, replay = self._graphs[size, 1]
        inputs.fill(row_arrays(step.sequences, self._layout), global_tables(step.sequences))
        return replay()[:num_seqs]

    def _record(
        self,
        forward: Callable[[Batch], Tensor],
        size: int,
        q_len: int,
        max_model_len: int,
        device: torch.device,
        capture: Callable[[Compute], Compute],
    ) -> None:
        inputs = _StaticInputs(size, q_len, self._layout, max_model_len, device)
        self._graphs[size, q_len] = (inputs, capture(lambda: forward(inputs.batch)))


class _StaticInputs:
    """The tensors one graph reads, all rows idle at first."""

    def __init__(
        self, size: int, q_len: int, layout: KVLayout, max_model_len: int, device: torch.device
    ) -> None:
        self._num_rows = [*[size * q_len] * 4, size, size]
        idle = self._padded([*[_NOTHING] * 5, _NOTHING.reshape(0, layout.ring_size)])
        self._packed = torch.from_numpy(pack(idle)).to(device)
        self._table_SP = torch.zeros(
            size, layout.num_global_pages(max_model_len), dtype=torch.int64, device=device
        )
        rows = unpack(self._packed, idle)
        self.batch = Batch.of_rows(rows, self._table_SP, num_decodes=size, decode_q_len=q_len)

    def fill(self, rows: list[Ints], table_SP: Ints) -> None:
        """Overwrite everything with a step's `row_arrays`, and what it uses of the page table."""
        device = self._packed.device
        self._packed.copy_(pinned(pack(self._padded(rows)), device), non_blocking=True)
        used_SP = self._table_SP[: table_SP.shape[0], : table_SP.shape[1]]
        used_SP.copy_(pinned(table_SP, device), non_blocking=True)

    def _padded(self, rows: list[Ints]) -> list[Ints]:
        padded = []
        for array, num_rows, idle in zip(rows, self._num_rows, IDLE, strict=True):
            padded.append(np.full((num_rows, *array.shape[1:]), idle, dtype=np.int64))
            padded[-1][: len(array)] = array
        return padded


class CudaCapture:
    """Records computations as CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute) -> Compute:
        # Once outside a graph: kernels are compiled and libraries take their workspaces.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = compute()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay
