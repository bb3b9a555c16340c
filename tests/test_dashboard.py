"""Dashboard, metrics page and Compose project name exactly what there is."""

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import scrape
import yaml
from scrape import DOCKER, SUFFIXES, Exported

from bezel.engine.metric_families import FAMILIES

ROOT = DOCKER.parent
NAMES = ROOT / "tests" / "data" / "metric_names.txt"


@pytest.fixture(scope="module")
def exported() -> Exported:
    """From a scrape with a sample of each."""
    return scrape.exported_by(scrape.full_metrics().render()[0].decode())


def test_names_stay_what_they_are(exported: Exported) -> None:
    """Others' dashboards, alerts and autoscalers know these names: a change of one is told in the
    changelog, and written here by hand."""
    ours = {name: found for name, found in exported.items() if not name.startswith("python_")}
    lines = [" ".join([name, kind, *sorted(labels)]) for name, (kind, labels) in ours.items()]
    assert sorted(lines) == NAMES.read_text(encoding="utf-8").splitlines()


def test_dashboard_queries_only_series_and_labels_that_exist(exported: Exported) -> None:
    known = scrape.series_of(exported)
    queries = scrape.dashboard_queries()
    assert len(queries) > 50
    for query in queries:
        scrape.check_query(query, known)
    for variable in scrape.dashboard()["templating"]["list"][1:]:
        found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
        assert found is not None and found[2] in known[found[1]]


def test_dashboard_shows_every_metric(exported: Exported) -> None:
    shown = set(re.findall(r"bezel_\w+", " ".join(scrape.dashboard_queries())))
    for family in FAMILIES:
        name = family.exposed_name
        assert any(name + suffix in shown for suffix in SUFFIXES[family.kind]), name


def test_dashboard_takes_quantiles_of_rates_of_buckets_by_le() -> None:
    quantiles = [query for query in scrape.dashboard_queries() if "histogram_quantile" in query]
    form = (
        r"histogram_quantile\(0\.\d+, sum by \(le(, \w+)?\) \(rate\(\w+_bucket(\{.*\})?\[.*\]\)\)\)"
    )
    assert quantiles and all(re.fullmatch(form, query) for query in quantiles)


def test_dashboard_never_sums_a_counter_without_a_rate(exported: Exported) -> None:
    counters = [name for name, (kind, _) in exported.items() if kind == "counter"]
    for query in scrape.dashboard_queries():
        for name in counters:
            found = len(re.findall(rf"\b{name}\b", query))
            assert found == len(re.findall(rf"rate\({name}\b", query)), query


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    ids = set()
    for panel in scrape.dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        ids.add(panel["id"])
    assert len(ids) == len(scrape.dashboard()["panels"])


def test_metrics_page_is_current() -> None:
    path = ROOT / "docs" / "generate_metrics.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written = script.PAGE.read_text(encoding="utf-8")
    assert written == script.render(written), "stale: run `make docs`"
    assert sorted(name for _, name, _ in script.PART.findall(written)) == sorted(script.parts())


def test_metrics_page_has_exactly_what_is_exported(exported: Exported) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(bezel_\w+)` \| (gauge|counter|histogram) \| (.*?) \|", page, re.M)
    listed = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert len(listed) == len(rows)
    ours = {n: found for n, found in exported.items() if re.match("bezel_(?!engine_process)", n)}
    expected = {name: (kind, labels - {"model_name"}) for name, (kind, labels) in ours.items()}
    assert listed == expected
    for name in exported:
        assert f"`{name.removeprefix('bezel_engine_')}`" in page or name in listed, name


def files_of(service: dict[str, list[str]]) -> Iterator[tuple[Path, str]]:
    """What a service mounts from this folder, and where."""
    for volume in service["volumes"]:
        source, target, *_ = volume.split(":")
        if source.startswith("."):
            yield (DOCKER / source).resolve(), target


def test_compose_mounts_what_is_there() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert set(services) == {"bezel", "prometheus", "grafana"}
    prometheus = {target: path for path, target in files_of(services["prometheus"])}
    assert prometheus == {
        "/etc/prometheus/prometheus.yml": DOCKER / "prometheus.yml",
        "/etc/prometheus/alerts.yml": DOCKER / "alerts.yml",
    }
    grafana = {target: path for path, target in files_of(services["grafana"])}
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    folder = grafana[str(Path(home).parent)]
    assert (folder / Path(home).name).is_file()
    provider = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/bezel.yaml").read_text())
    assert provider["providers"][0]["options"]["path"] == str(Path(home).parent)
    build = services["bezel"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_prometheus_scrapes_the_server_that_grafana_shows() -> None:
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "bezel"
    assert job["static_configs"] == [{"targets": ["bezel:8000"]}]
    assert [(DOCKER / name).is_file() for name in config["rule_files"]] == [True]
    path = DOCKER / "grafana" / "provisioning" / "datasources" / "prometheus.yaml"
    (source,) = yaml.safe_load(path.read_text(encoding="utf-8"))["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_prometheus_takes_its_configuration() -> None:
    command = [scrape.program("promtool"), "check", "config", str(DOCKER / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("vllm_names", [False, True])
def test_promtool_has_nothing_against_a_scrape(vllm_names: bool) -> None:
    """But for the names that are vLLM's."""
    command = [scrape.program("promtool"), "check", "metrics"]
    text = scrape.full_metrics(vllm_names).render()[0]
    done = subprocess.run(command, input=text, capture_output=True, timeout=60)
    complaints = [line.split(" ", 1) for line in done.stderr.decode().splitlines()]
    ours = [(name, why) for name, why in complaints if not name.startswith("vllm:")]
    assert ours == [
        (
            "bezel_iteration_tokens_total",
            'non-counter metrics should not have "_total" suffix',
        )
    ]
