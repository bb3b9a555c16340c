"""From paired measurements to ratios: Bezel's value over the peer's in the same pair, and medians.

Times of different runs can't be compared on a machine that others use too; those of a pair, taken
one right after the other, can. A ratio of rates is better above 1, one of times and bytes below.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peers.cells import Cell
from peers.drive import CellResult

FOREIGN_CORES = 0.1  # with more than that used by others a measurement counts as disturbed
IDLE_CORES = 0.05  # and with more than that by the server that has nothing to do


@dataclass(frozen=True, slots=True)
class Value:
    """One measured number. `pair` says which two belong together; `foreign` and `idle` are cores
    that others used meanwhile, and the other server of the pair."""

    figure: str
    unit: str
    server: str
    pair: int
    value: float
    foreign: float = 0.0
    idle: float = 0.0

    @property
    def is_disturbed(self) -> bool:
        return self.foreign > FOREIGN_CORES or self.idle > IDLE_CORES


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A figure of both servers: medians, and the paired ratios' median, lowest and highest.
    `foreign` and `idle` are the worst of all."""

    figure: str
    unit: str
    peer: float
    bezel: float
    ratio: float
    lowest: float
    highest: float
    num_pairs: int
    num_disturbed: int
    foreign: float
    idle: float


def values_of(cell: Cell, result: CellResult) -> Iterator[Value]:
    """The figures that a cell is there for."""
    known = {
        "output": ("tokens/s", result.output_tokens_per_s),
        "between tokens": ("ms", 1e3 * result.tpot_s),
        "first token": ("ms", 1e3 * result.ttft_s),
        "prefill": ("tokens/s", cell.input_len / result.ttft_s),
    }
    cpu = (result.cpu["foreign"], result.cpu["idle"])
    for name in cell.figures:
        unit, value = known[name]
        yield Value(f"{cell.name}: {name}", unit, result.server, result.pair, value, *cpu)


def rows(values: Sequence[Value], bezel: str, peer: str) -> list[Row]:
    """One for each figure, in the order in which they first appear. A pair counts if both servers'
    values are there."""
    figures = dict.fromkeys((value.figure, value.unit) for value in values)
    made = [_row(figure, unit, values, bezel, peer) for figure, unit in figures]
    return [row for row in made if row is not None]


def _row(figure: str, unit: str, values: Sequence[Value], bezel: str, peer: str) -> Row | None:
    of = {(v.server, v.pair): v for v in values if v.figure == figure}
    pairs = [
        (of[bezel, pair], of[peer, pair])
        for server, pair in of
        if server == bezel and (peer, pair) in of
    ]
    if not pairs:
        return None
    ratios = [ours.value / theirs.value for ours, theirs in pairs]
    return Row(
        figure=figure,
        unit=unit,
        peer=statistics.median(theirs.value for _, theirs in pairs),
        bezel=statistics.median(ours.value for ours, _ in pairs),
        ratio=statistics.median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        num_pairs=len(pairs),
        num_disturbed=sum(a.is_disturbed or b.is_disturbed for a, b in pairs),
        foreign=max(value.foreign for both in pairs for value in both),
        idle=max(value.idle for both in pairs for value in both),
    )


def table(rows: Sequence[Row], bezel: str, peer: str) -> str:
    """In Markdown."""
    lines = [
        f"| Figure | {peer} | {bezel} | {bezel} : {peer} | lowest to highest | pairs | foreign |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        disturbed = f", {row.num_disturbed} disturbed" if row.num_disturbed else ""
        cells = [
            f"{row.figure}, {row.unit}",
            _digits(row.peer),
            _digits(row.bezel),
            f"{row.ratio:.3g} ×",
            f"{row.lowest:.3g} to {row.highest:.3g}",
            f"{row.num_pairs}{disturbed}",
            f"{row.foreign:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
