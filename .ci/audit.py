"""Asks an advisory service about known vulnerabilities of what is installed: `make audit`.

    a vulnerability               told, and the exit status is 1
    nobody who could be asked     told, and the exit status is 0: that is no finding
    some packages unknown there   told; the others decide

pip-audit asks. It has an environment of its own, so that it judges what Bezel needs and not what it
needs itself.
"""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

PIP_AUDIT = "pip-audit==2.10.1"
FOLDER = Path(__file__).resolve().parent.parent / "build" / "audit"
TIMEOUT_S = 600


def main(arguments: list[str]) -> int:
    """Judge the packages beside the Python that runs this; returns the exit status."""
    try:
        done = audit(arguments)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"audit: nobody could be asked: {error}")
        return 0
    status, told = judge(done.stdout, done.stderr)
    print(told)
    return status


def audit(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run pip-audit, which is installed first if need be.

    Raises:
        OSError, SubprocessError: it can't be had, or says nothing for too long.
    """
    program = FOLDER / "bin" / "pip-audit"
    if not program.exists():
        pip = [str(FOLDER / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", str(FOLDER)],
            [*pip, "install", "--quiet", PIP_AUDIT],
        ):
            subprocess.run(command, check=True, timeout=TIMEOUT_S)
    installed = ["--skip-editable", "--path", sysconfig.get_path("purelib")]
    command = [str(program), "--progress-spinner=off", "--format=json", *installed, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)


def judge(output: str, errors: str) -> tuple[int, str]:
    """The exit status, and what to say, of what pip-audit wrote."""
    try:
        packages: list[dict[str, Any]] = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = errors.strip().rpartition("\n")[2] or "no answer"
        return 0, f"audit: nobody could be asked: {last}"
    known = [package for package in packages if "skip_reason" not in package]
    found = [
        f"audit: {package['name']} {package['version']}: {flaw['id']}, "
        f"fixed in {', '.join(flaw['fix_versions']) or 'no version'}"
        for package in known
        for flaw in package["vulns"]
    ]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    if not known:
        return 0, f"audit: nobody could be asked: none of {len(unknown)} packages is known there"
    if unknown:
        found.append(f"audit: not known there: {', '.join(unknown)}")
    num_flaws = len(found) - bool(unknown)
    found.append(f"audit: {num_flaws} vulnerabilities in {len(known)} packages")
    return int(num_flaws > 0), "\n".join(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
