"""Draws docs/images/dashboard.png without Grafana: `.venv/bin/python docs/draw_dashboard.py`.

The panels, their places, titles and queries are those of docker/grafana/dashboards/bezel.json, and
the values those of a real Prometheus (on Debian: `apt install prometheus`) that scraped a real
server under load for two minutes; only the drawing is matplotlib's. Panels that aren't curves are
left out.
"""

import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import matplotlib
import yaml
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from server_process import Server, running

DOCS = Path(__file__).resolve().parent
DASHBOARD = DOCS.parent / "docker" / "grafana" / "dashboards" / "bezel.json"
ROWS = ("Traffic", "Latency", "KV pages", "Prefix cache")
LOAD_S = 120
STEP_S = 2
NUM_CLIENTS = 6
VARIABLES = {"$__rate_interval": "20s", "$model": ".*", "$instance": ".*"}
COLOURS = ("#0a7259", "#c9822b", "#5b6bbf", "#a3342a", "#6a6670", "#5fd0ac")
STYLE = {
    "font.size": 7,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.grid": True,
    "grid.color": "#e6e3de",
    "figure.facecolor": "#fbfaf8",
    "axes.facecolor": "#fbfaf8",
    "legend.frameon": False,
}


@contextmanager
def prometheus(server: Server, folder: Path) -> Iterator[httpx.Client]:
    """One that scrapes the server every other second."""
    binary = shutil.which("prometheus")
    if binary is None:
        sys.exit("There is no Prometheus here; on Debian: apt install prometheus")
    jobs = [{"job_name": "bezel", "static_configs": [{"targets": [f"127.0.0.1:{server.port}"]}]}]
    config = {"global": {"scrape_interval": f"{STEP_S}s"}, "scrape_configs": jobs}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(binary, f"--config.file={folder / 'prometheus.yml'}"),
        *(f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)
    finally:
        process.terminate()
        process.wait(30)


def converse(server: Server, seed: int, until_s: float) -> None:
    """Texts that grow turn by turn, as a chat's do, each begun anew after some turns."""
    dice = random.Random(seed)
    while time.monotonic() < until_s:
        text = f"Story {dice.randrange(1000)}. " + "Once upon a time there was a king. " * 20
        for _ in range(dice.randrange(2, 6)):
            time.sleep(dice.uniform(0, 3))
            answer = server.client.completions.create(
                model="gemma-3-270m", prompt=text, max_tokens=dice.randrange(8, 96)
            )
            text += answer.choices[0].text + " And then? "


def curves(client: httpx.Client, target: dict[str, Any], begin_s: float) -> Iterator[Any]:
    """(label, seconds, values) of each series that a query of a panel finds."""
    query = target["expr"]
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    times: dict[str, Any] = {"start": begin_s, "end": time.time(), "step": STEP_S}
    found = client.get("/api/v1/query_range", params={"query": query, **times}).json()
    for series in found["data"]["result"]:
        legend = target["legendFormat"]
        for label, value in series["metric"].items():
            legend = legend.replace(f"{{{{{label}}}}}", value)
        seconds, values = zip(*series["values"], strict=True)
        yield legend, [s - begin_s for s in seconds], [float(value) for value in values]


def panels() -> Iterator[dict[str, Any]]:
    """Those that are curves, in the rows that are drawn."""
    row = ""
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        row = panel["title"] if panel["type"] == "row" else row
        if panel["type"] == "timeseries" and row in ROWS:
            yield panel


def draw(client: httpx.Client, begin_s: float, path: Path) -> None:
    """All panels, at their places: three in a line."""
    chosen = list(panels())
    tops = sorted({panel["gridPos"]["y"] for panel in chosen})
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11, 1.9 * len(tops)), layout="constrained")
        grid = figure.add_gridspec(len(tops), 24)
        for panel in chosen:
            place = panel["gridPos"]
            columns = slice(place["x"], place["x"] + place["w"])
            axes = figure.add_subplot(grid[tops.index(place["y"]), columns])
            axes.set_title(panel["title"])
            for target in panel["targets"]:
                for legend, seconds, values in curves(client, target, begin_s):
                    axes.plot(seconds, values, label=legend, linewidth=1.2)
            unit = panel["fieldConfig"]["defaults"].get("unit", "")
            axes.set_ylabel({"s": "s", "percentunit": "share", "bytes": "bytes"}.get(unit, ""))
            axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the legend
            axes.set_xlim(0, LOAD_S)
            if axes.lines:
                axes.legend(fontsize=6, loc="upper left", ncols=2)
        figure.savefig(path, dpi=100)


def main() -> None:
    with tempfile.TemporaryDirectory() as name, running(Path(name)) as server:
        with prometheus(server, Path(name)) as client:
            begin_s, until_s = time.time(), time.monotonic() + LOAD_S
            clients = [
                threading.Thread(target=converse, args=(server, seed, until_s))
                for seed in range(NUM_CLIENTS)
            ]
            for thread in clients:
                thread.start()
            for thread in clients:
                thread.join()
            (DOCS / "images").mkdir(exist_ok=True)
            draw(client, begin_s, DOCS / "images" / "dashboard.png")


if __name__ == "__main__":
    main()
