"""What `make` would run, in a folder where nothing is set up yet; nothing is installed."""

import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., str]:
    """What make would run in a folder where nothing is set up yet."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}

    def plan(*arguments: str, **variables: str) -> str:
        done = subprocess.run(
            ["make", "--dry-run", *arguments],
            cwd=tmp_path,
            env=environment | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    return plan


def test_serve_without_arguments_leaves_all_to_the_defaults(planned: Callable[..., str]) -> None:
    commands = planned("serve", HOST="elsewhere", PORT="1", MODEL="other").splitlines()
    assert commands[-1].split() == ["exec", ".venv/bin/bezel", "serve"]
    assert commands[-2] == ".venv/bin/python -m bezel.engine.default_model"


def test_serve_hands_its_variables_to_the_command(planned: Callable[..., str]) -> None:
    variables = ["MODEL=/a b/c.gguf", "HOST=::1", "PORT=9000", "ARGS=--seed 3 --dtype float32"]
    plan = planned("serve", *variables)
    assert "default_model" not in plan
    assert "trl" not in plan
    words = ["exec", ".venv/bin/bezel", "serve", "/a b/c.gguf", "--host", "::1", "--port", "9000"]
    assert shlex.split(plan.splitlines()[-1]) == [*words, "--seed", "3", "--dtype", "float32"]


def test_test_sets_itself_up(planned: Callable[..., str]) -> None:
    plan = planned("test", "ARGS=-k scheduler")
    assert "-m venv .venv" in plan
    assert "-e '.[cpu,default-model,otel,plot,test]'" in plan
    assert "--no-deps trl==" in plan
    assert plan.splitlines()[-1] == ".venv/bin/python -m pytest -k scheduler"


def test_audit_judges_the_environment_of_the_server(planned: Callable[..., str]) -> None:
    plan = planned("audit")
    assert "-e '.[cpu,default-model]'" in plan
    assert plan.splitlines()[-1].split() == [".venv/bin/python", ".ci/audit.py"]


def test_extras_of_the_makefile_exist(planned: Callable[..., str]) -> None:
    extras = re.findall(r"-e '\.\[(.*)\]'", planned("lint"))
    assert [set(names.split(",")) for names in extras] == [set(PROJECT["optional-dependencies"])]


def test_ci_runs_the_readmes_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8").splitlines()
