"""What the servers are asked: cells, each a workload at so many requests at once.

    short    32 tokens in, 128 out                    output tokens per second
    long     1,500 tokens in, 16 out, one at a time   time to the first token: prefill
    shared   1,000 tokens that all begin with and 24  time to the first token: what is found again
             of their own, 64 out, 16 at once

No prompt is asked twice of a server, so its prefix cache helps in `shared` only; both servers of a
pair get the same prompts.
"""

from dataclasses import dataclass
from random import Random

from peers.prompts import Decode, Encode, Writer, lone, sentences, sharing

WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """`num_requests` are asked, `concurrency` at once; lengths are in tokens. `figures` are names
    of what it is there to tell."""

    name: str
    figures: tuple[str, ...]
    concurrency: int
    num_requests: int
    input_len: int
    output_len: int
    shared_len: int = 0

    def prompts(self, writer: Writer) -> list[str]:
        if self.shared_len:
            own = self.input_len - self.shared_len
            return sharing(writer, self.num_requests, self.shared_len, own)
        return lone(writer, self.num_requests, self.input_len)

    def warm_up(self) -> "Cell":
        """The same shapes in short, for a server that has just started."""
        return Cell(
            name=f"{self.name}, warm-up",
            figures=(),
            concurrency=self.concurrency,
            num_requests=self.concurrency,
            input_len=self.input_len - self.shared_len,
            output_len=min(WARM_UP_TOKENS, self.output_len),
        )


def _short(concurrency: int, num_requests: int) -> Cell:
    return Cell(
        name=f"short × {concurrency}",
        figures=("output", "between tokens"),
        concurrency=concurrency,
        num_requests=num_requests,
        input_len=32,
        output_len=128,
    )


# In this order: the first memory figure is that of a server which has had lone requests only.
CELLS = (
    _short(1, 4),
    _short(8, 16),
    _short(32, 64),
    Cell(
        name="long × 1",
        figures=("prefill", "first token"),
        concurrency=1,
        num_requests=4,
        input_len=1500,
        output_len=16,
    ),
    Cell(
        name="shared × 16",
        figures=("first token", "output"),
        concurrency=16,
        num_requests=16,
        input_len=1024,
        output_len=64,
        shared_len=1000,
    ),
)
MEMORY_AFTER = ("short × 1", "shared × 16")


def prompts_of(cell: Cell, pair: int, encode: Encode, decode: Decode) -> list[str]:
    """Those of a cell in a pair: the same whenever they are made, and no others have them."""
    random = Random(f"{cell.name} {pair}")
    return cell.prompts(Writer(encode, decode, random, sentences()))
