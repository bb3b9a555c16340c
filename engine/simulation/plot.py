"""A simulation as a picture: sequences, pages, time to first token and throughput over time."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bezel.engine.errors import ConfigError
from bezel.engine.simulation.recorder import Requests
from bezel.engine.simulation.results import Results
from bezel.engine.simulation.setup import Setup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES, DPI = (12.0, 7.5), 100
_MAX_DOTS = 20_000


def require_matplotlib() -> None:
    """Raises ConfigError if it isn't installed."""
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install bezel-serve[plot]")


def plot(path: Path, setup: Setup, results: Results, requests: Requests) -> None:
    """Write a PNG of 1200 × 750 pixels.

    Raises:
        ConfigError: matplotlib isn't installed, or the file can't be written.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)  # which draws it, without a display
    figure.suptitle(
        f"{setup.model.name} on one {setup.device.name}: {results.num_requests:,} requests, "
        "all times estimated"
    )
    (sequences, pages), (first_token, tokens) = figure.subplots(2, 2)
    times_s = (np.arange(len(results.timeline["busy"])) + 0.5) * results.bin_s
    _lines(sequences, times_s, results, {"running": "running", "waiting": "waiting"}, "sequences")
    _pages(pages, times_s, results, setup)
    _first_tokens(first_token, results, requests)
    names = {"prompt_tokens_per_s": "prompt", "output_tokens_per_s": "output"}
    _lines(tokens, times_s, results, names, "tokens computed in a second")
    for axes in (sequences, pages, first_token, tokens):
        axes.set_xlabel("seconds")
        axes.set_xlim(0, max(results.duration_s, results.bin_s))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _lines(axes: "Axes", times_s: Any, results: Results, names: dict[str, str], title: str) -> None:
    for name, label in names.items():
        axes.plot(times_s, results.timeline[name], label=label, linewidth=1)
    axes.set_title(title)
    axes.legend(loc="upper right")


def _pages(axes: "Axes", times_s: Any, results: Results, setup: Setup) -> None:
    kinds = {"local_bytes": "local", "global_bytes": "global", "cached_bytes": "cache alone"}
    heights = [np.asarray(results.timeline[name]) / 1e9 for name in kinds]
    axes.stackplot(times_s, *heights, labels=list(kinds.values()))
    axes.axhline(setup.arena_bytes / 1e9, color="black", linestyle=":", label="all")
    axes.set_title("KV pages in GB")
    axes.set_ylim(top=1.25 * setup.arena_bytes / 1e9)
    axes.legend(loc="upper center", ncols=4)


def _first_tokens(axes: "Axes", results: Results, requests: Requests) -> None:
    stride = 1 + len(requests.ttft_s) // _MAX_DOTS
    arrivals_s = np.asarray(requests.arrival_s)[::stride] - results.origin_s
    axes.scatter(arrivals_s, np.asarray(requests.ttft_s)[::stride], s=2)
    axes.set_title("seconds to the first token, by arrival")
