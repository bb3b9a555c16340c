"""What `make audit` makes of pip-audit's answers: a finding is one thing, no answer another."""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "audit.py"
FINE = {"name": "fine", "version": "1.0", "vulns": []}
FLAWED = {
    "name": "flawed",
    "version": "2.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}, {"id": "PYSEC-2", "fix_versions": []}],
}
UNKNOWN = {"name": "unknown", "skip_reason": "Dependency not found on PyPI"}


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def judged(audit: Any, *packages: dict[str, Any]) -> tuple[int, str]:
    output = json.dumps({"dependencies": packages, "fixes": []})
    status, told = audit.judge(output, "Found 2 known vulnerabilities\n")
    return status, told


def test_no_vulnerability_is_a_success(audit: Any) -> None:
    assert judged(audit, FINE, FINE) == (0, "audit: 0 vulnerabilities in 2 packages")


def test_a_vulnerability_is_a_failure(audit: Any) -> None:
    status, told = judged(audit, FINE, FLAWED, UNKNOWN)
    assert status == 1
    assert told.splitlines() == [
        "audit: flawed 2.0: PYSEC-1, fixed in 2.1",
        "audit: flawed 2.0: PYSEC-2, fixed in no version",
        "audit: not known there: unknown",
        "audit: 2 vulnerabilities in 2 packages",
    ]


def test_a_service_that_knows_nothing_is_no_finding_and_no_clean_bill(audit: Any) -> None:
    status, told = judged(audit, UNKNOWN, UNKNOWN)
    assert status == 0
    assert told == "audit: nobody could be asked: none of 2 packages is known there"


@pytest.mark.parametrize("output", ["", "{}", "[]", "null", "no JSON"])
def test_no_answer_is_no_finding(audit: Any, output: str) -> None:
    status, told = audit.judge(output, "a traceback\nERROR: connection refused\n")
    assert (status, told) == (0, "audit: nobody could be asked: ERROR: connection refused")


@pytest.mark.parametrize("error", [OSError("gone"), subprocess.TimeoutExpired("pip", 1)])
def test_without_pip_audit_nobody_can_be_asked(
    audit: Any, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr(audit, "audit", fail)
    assert audit.main([]) == 0
    assert "nobody could be asked" in capsys.readouterr().out
