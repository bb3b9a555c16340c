"""Lines and rows of a report in a terminal."""

from collections.abc import Sequence

from bezel.engine.simulation.results import Distribution, Goodput

_HEADS = ("mean", "p50", "p90", "p99", "max")


def line(name: str, text: str) -> str:
    return f"{name:<12}{text}"


def table(title: str, rows: Sequence[tuple[str, Distribution | None]]) -> list[str]:
    """A line of heads, and one for each distribution, with dashes where there is none."""
    heads = "".join(f"{head:>10}" for head in _HEADS)
    return [f"{title:<20}{heads}", *(f"{name:<20}{_values(of)}" for name, of in rows)]


def _values(of: Distribution | None) -> str:
    if of is None:
        return f"{'-':>10}" * len(_HEADS)
    return "".join(f"{value:>10.4g}" for value in (of.mean, of.p50, of.p90, of.p99, of.max))


def goodput_text(goodput: Goodput) -> str:
    limits = []
    if goodput.ttft_s is not None:
        limits.append(f"first token within {goodput.ttft_s:g} s")
    if goodput.itl_s is not None:
        limits.append(f"others every {goodput.itl_s:g} s or faster")
    wanted = " and ".join(limits)
    return f"{goodput.requests_per_s:.2f} requests/s, {goodput.share:.1%} of all: {wanted}"
