"""The picture is a PNG, of the size it should have, with something in each of its panels."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.image import imread

from bezel.engine.errors import ConfigError
from bezel.engine.simulation import plot as module
from bezel.engine.simulation.plot import plot
from bezel.engine.simulation.results import results_of
from bezel.engine.simulation.setup import Setup
from bezel.engine.simulation.simulator import Simulator
from bezel.engine.simulation.trace import TraceRequest

Draw = Callable[..., npt.NDArray[np.float32]]


@pytest.fixture
def draw(tmp_path: Path, setup: Setup, simulator: Callable[..., Simulator]) -> Draw:
    def pixels(num_requests: int, name: str = "plot.png") -> npt.NDArray[np.float32]:
        requests = [
            TraceRequest(arrival_s=0.1 * i, prompt_tokens=50, num_output_tokens=20)
            for i in range(num_requests)
        ]
        recorder = simulator(requests).run()
        plot(tmp_path / name, setup, results_of(recorder), recorder.requests)
        found: npt.NDArray[np.float32] = imread(tmp_path / name)[:, :, :3]
        return found

    return pixels


def test_every_panel_shows_the_requests(draw: Draw) -> None:
    full, empty = draw(30), draw(0)
    assert full.shape == empty.shape == (750, 1200, 3)
    for rows in (slice(50, 375), slice(400, 725)):
        for columns in (slice(50, 590), slice(650, 1190)):
            panel = full[rows, columns]
            differs = (np.abs(panel - empty[rows, columns]) > 0.1).any(axis=-1)
            assert differs.mean() > 0.005
            saturated = panel.max(axis=-1) - panel.min(axis=-1) > 0.3
            assert saturated.sum() > 50, "lines have colours, axes and text have none"


def test_the_same_simulation_gives_the_same_picture(draw: Draw) -> None:
    assert np.array_equal(draw(5), draw(5, "again.png"))


def test_without_matplotlib_it_says_what_to_install(
    draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install bezel-serve\[plot\]"):
        draw(1)


def test_a_place_that_cannot_be_written_is_named(draw: Draw) -> None:
    with pytest.raises(ConfigError, match=r"none/plot\.png: No such file"):
        draw(1, "none/plot.png")
