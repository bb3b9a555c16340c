"""The container files fit together and fit the code.

No container engine is needed: the files are read, and the health check, which can be run without
one, is run.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from bezel.server.config import ServerConfig

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
DOCKERFILES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cuda"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(name, arguments) of each instruction, continued lines joined, comments left out."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    split = [line.partition(" ") for line in lines if line]
    return [(name, arguments.strip()) for name, _, arguments in split]


def final_stage(dockerfile: Path) -> dict[str, str]:
    """The last instruction of each name in the last stage."""
    steps = instructions(dockerfile)
    start = max(index for index, (name, _) in enumerate(steps) if name == "FROM")
    return dict(steps[start:])


def health_command(dockerfile: Path) -> list[str]:
    command: list[str] = json.loads(final_stage(dockerfile)["HEALTHCHECK"].partition("CMD ")[2])
    return command


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    document: dict[str, Any] = read_yaml(DOCKER / "compose.yaml")
    return document


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_image_runs_the_server_as_nobody_in_particular(dockerfile: Path) -> None:
    stage = final_stage(dockerfile)
    # By number: Kubernetes can't tell from a name that it isn't root.
    assert int(stage["USER"]) > 0
    assert json.loads(stage["ENTRYPOINT"]) == ["bezel", "serve"]
    assert {"PYTHONSAFEPATH=1", "BEZEL_HOST=0.0.0.0"} <= set(shlex.split(stage["ENV"]))
    assert stage["EXPOSE"] == "8000"


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_image_is_built_from_all_that_the_package_needs(dockerfile: Path) -> None:
    copied = {
        source
        for name, rest in instructions(dockerfile)
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    project = PYPROJECT["project"]
    folders = {name.split(".")[1] for name in PYPROJECT["tool"]["setuptools"]["packages"]}
    assert copied == {"pyproject.toml", project["readme"], *project["license-files"], *folders}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line.strip("!/") for line in ignored if line.startswith("!")} == copied


def test_cuda_image_has_the_same_torch() -> None:
    extra = PYPROJECT["project"]["optional-dependencies"]["cpu"]
    (pin,) = [requirement for requirement in extra if requirement.startswith("torch==")]
    assert f"'{pin}'" in DOCKERFILES[1].read_text(encoding="utf-8")


@contextmanager
def answering(status: int) -> Iterator[tuple[int, list[str]]]:
    """An HTTP server that answers everything with `status`; yields its port and the paths asked."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1], paths
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("status", "is_healthy"), [(200, True), (503, False)])
@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_health_command_asks_ready(dockerfile: Path, status: int, is_healthy: bool) -> None:
    program, *arguments = health_command(dockerfile)
    assert program == "python"
    with answering(status) as (port, paths):
        arguments = [argument.replace("8000", str(port)) for argument in arguments]
        # A proxy that the container was given must not be asked about its own server.
        environment = os.environ | {"http_proxy": "http://127.0.0.1:1"}
        done = subprocess.run([sys.executable, *arguments], env=environment, timeout=30)
    assert (done.returncode == 0) is is_healthy
    assert paths == ["/ready"]


def test_compose_reaches_nothing_beyond_this_machine(compose: dict[str, Any]) -> None:
    ports = {port for service in compose["services"].values() for port in service["ports"]}
    assert ports == {f"127.0.0.1:{port}:{port}" for port in (8000, 9090, 3000)}


def test_compose_mounts_files_and_volumes_that_exist(compose: dict[str, Any]) -> None:
    mounts = [volume for service in compose["services"].values() for volume in service["volumes"]]
    sources = [mount.split(":")[0] for mount in mounts]
    files = {source for source in sources if source.startswith(".")}
    assert all((DOCKER / file).exists() for file in files)
    assert set(sources) - files == set(compose["volumes"])


def test_compose_checks_health_as_the_image_does(compose: dict[str, Any]) -> None:
    service = compose["services"]["bezel"]
    dockerfile = DOCKER / service["build"]["context"] / service["build"]["dockerfile"]
    assert service["healthcheck"]["test"] == ["CMD", *health_command(dockerfile)]


def test_compose_waits_for_the_drain(compose: dict[str, Any]) -> None:
    grace_period = compose["services"]["bezel"]["stop_grace_period"]
    assert int(grace_period.removesuffix("s")) > ServerConfig().shutdown_timeout


def test_prometheus_scrapes_the_server_and_grafana_reads_prometheus(
    compose: dict[str, Any],
) -> None:
    (job,) = read_yaml(DOCKER / "prometheus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["bezel:8000"]}]
    provisioning = DOCKER / "grafana" / "provisioning"
    (source,) = read_yaml(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert {"bezel", "prometheus"} <= set(compose["services"])


def test_grafana_finds_the_dashboard(compose: dict[str, Any]) -> None:
    grafana = compose["services"]["grafana"]
    provisioning = DOCKER / "grafana" / "provisioning"
    (provider,) = read_yaml(provisioning / "dashboards" / "bezel.yaml")["providers"]
    folder = provider["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in grafana["volumes"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/bezel.json"


def test_package_has_every_file() -> None:
    """Those that aren't Python too, which setuptools leaves out unless it is told of them."""
    setuptools = PYPROJECT["tool"]["setuptools"]
    told = {
        path
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
        for path in (ROOT / "/".join(package.split(".")[1:])).glob(pattern)
    }
    files = {
        path for layer in ("server", "engine", "kernels") for path in (ROOT / layer).rglob("*")
    }
    others = {path for path in files if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == told != set()
