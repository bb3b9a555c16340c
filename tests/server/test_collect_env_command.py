"""`bezel collect-env`: complete, and fit to be shown to others."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from bezel.server.cli import main
from bezel.server.collect_env_command import shown_variables
from bezel.server.version import VERSION


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "homes" / "marie-curie"
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("BEZEL_MODEL", f"{folder}/models/gemma")
    monkeypatch.setenv("BEZEL_SERVED_MODEL_NAME", "/data/marie-curie/gemma")
    monkeypatch.setenv("BEZEL_HOST", "lab.example.org")
    monkeypatch.setenv("BEZEL_URL", "http://me:pass@lab.example.org")
    monkeypatch.setenv("BEZEL_API_KEY", "sesame")
    monkeypatch.setenv("BEZEL_APIKEY", "sesame")
    for name in ("socket.gethostname", "platform.node"):
        monkeypatch.setattr(name, lambda: "lab.example.org")
    monkeypatch.setenv("BEZEL_MAX_NUM_SEQS", "4")
    return folder


def test_nobody_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect-env"]) == 0
    printed = capsys.readouterr().out
    for private in ("marie", "curie", "lab.example", "sesame", "pass", str(home)):
        assert private not in printed
    assert "BEZEL_MODEL ~/models/gemma\n" in printed
    assert "BEZEL_SERVED_MODEL_NAME /data/~/gemma\n" in printed


def test_what_a_report_needs_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect-env", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["bezel"].startswith(VERSION)
    assert found["python"].startswith(platform.python_version())
    assert platform.machine() in found["system"] and "cores for this process" in found["cpu"]
    assert found["memory"].endswith(" GB") and isinstance(found["gpus"], list)
    for name in ("torch", "transformers", "numba", "fastapi"):
        assert found["packages"][name] == version(name)
    assert found["variables"] == {}


def test_values_are_shown_of_known_settings_only() -> None:
    environ = {
        **{"BEZEL_MAX_NUM_SEQS": "4", "BEZEL_MAX_NUM_BATCHED_TOKENS": "64", "BEZEL_API_KEY": "a"},
        **{"BEZEL_API_KEY_FILE": "/a", "BEZEL_HOST": "a", "BEZEL_ALLOWED_ORIGINS": "a"},
        **{"BEZEL_SECRET": "a", "BEZEL_URL": "a", "HOME": "/home/a"},
    }
    shown = shown_variables(environ)
    assert {name for name, value in shown.items() if value == "***"} == {
        *("BEZEL_API_KEY", "BEZEL_API_KEY_FILE", "BEZEL_HOST", "BEZEL_ALLOWED_ORIGINS"),
        *("BEZEL_SECRET", "BEZEL_URL"),
    }
    assert shown["BEZEL_MAX_NUM_SEQS"] == "4" and shown["BEZEL_MAX_NUM_BATCHED_TOKENS"] == "64"
    assert "HOME" not in shown
