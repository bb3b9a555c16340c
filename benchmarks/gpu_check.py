"""All that only a GPU can tell, in one command and one file: `make gpu-check`.

Runs the kernel tests on compiled kernels, the engine against transformers, decode steps in CUDA
graphs and the kernels' timings, each in a process of its own with a time limit, and writes
gpu-check.json. A part that fails or dies doesn't stop the others. Exit status: 0 if all passed, 1
if not, 2 without a GPU.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).resolve().parent.parent
KERNEL_TESTS = ROOT / "tests" / "kernels" / "simulated"
TAIL = 4000  # characters kept of the output of what didn't pass
MESSAGE = 1000  # and of the message of a failure
PACKAGES = ("torch", "triton", "transformers", "numpy")


@dataclass(frozen=True)
class Part:
    """A command that writes its report to the path put in place of REPORT."""

    name: str
    command: tuple[str, ...]
    limit_s: float

    @property
    def is_pytest(self) -> bool:
        return "pytest" in self.command


REPORT = "{report}"


@dataclass
class Outcome:
    """How a part went: passed, failed, timed out, or died without a report."""

    name: str
    command: str
    result: str = "died"
    seconds: float = 0.0
    exit_status: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    output: str = ""
    timings: dict[str, Any] | None = None

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {kind}" for kind, number in self.counts.items() if number)
        return f"{self.name:34} {self.result:9} {self.seconds:6.0f} s   {counts}"


def all_parts(quick: bool) -> list[Part]:
    tests = sorted(KERNEL_TESTS.glob("test_*.py"))
    parts = [
        _pytest(f"kernels {path.stem.removeprefix('test_')}", 1800, path, "--native", "cuda")
        for path in tests
        if path.name != "test_simulator.py"
    ]
    e2e = ROOT / "tests" / "e2e"
    on_gpu = ("--device", "cuda")
    parts += [
        _pytest("parity with transformers", 3600, e2e / "test_transformers_parity.py", *on_gpu),
        _pytest("parity of the default model", 1200, e2e / "test_default_model.py", *on_gpu),
        _pytest("decode steps in CUDA graphs", 1800, e2e / "test_cuda_graphs.py"),
    ]
    script = str(ROOT / "benchmarks" / "kernels.py")
    options = ("--quick",) if quick else ()
    timings = (sys.executable, script, "--json", REPORT, *options)
    return [*parts, Part("timings", timings, 900)]


def _pytest(name: str, limit_s: float, path: Path, *options: str) -> Part:
    report = ("-q", "-o", "junit_family=xunit1", "--junit-xml", REPORT)
    command = (sys.executable, "-m", "pytest", str(path.relative_to(ROOT)), *options, *report)
    return Part(name, command, limit_s)


def run(part: Part, folder: Path) -> Outcome:
    report, log = folder / "report", folder / "log"
    report.unlink(missing_ok=True)
    command = [word.replace(REPORT, str(report)) for word in part.command]
    outcome = Outcome(part.name, " ".join(part.command))
    started = time.monotonic()
    with log.open("wb") as output:
        outcome.exit_status = _status(command, output, part.limit_s)
    outcome.seconds = round(time.monotonic() - started, 1)
    try:
        (read_tests if part.is_pytest else read_timings)(report.read_text("utf-8"), outcome)
    except (OSError, ValueError, ElementTree.ParseError, KeyError):
        outcome.counts = {}
    if outcome.exit_status is None:
        outcome.result = "timed out"
    elif outcome.exit_status == 0 and outcome.counts.get("passed"):
        outcome.result = "passed"
    elif outcome.counts:
        outcome.result = "failed"
    if outcome.result != "passed":
        outcome.output = log.read_text("utf-8", errors="replace")[-TAIL:]
    return outcome


def _status(command: Sequence[str], output: Any, limit_s: float) -> int | None:
    """The command's exit status; None if it had to be ended, with all that it started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def read_tests(report: str, outcome: Outcome) -> None:
    """From the XML that pytest writes."""
    counts: Counter[str] = Counter(passed=0, failed=0, skipped=0)
    for case in ElementTree.fromstring(report).iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        skip = case.find("skipped")
        counts["failed" if bad else "skipped" if skip is not None else "passed"] += 1
        for child in bad:
            message = child.get("message") or child.text or ""
            outcome.failures.append({"test": case.get("name", ""), "message": message[:MESSAGE]})
        if skip is not None and not bad:
            reason = skip.get("message", "")
            outcome.skipped[reason] = outcome.skipped.get(reason, 0) + 1
    outcome.counts = dict(counts)


def read_timings(report: str, outcome: Outcome) -> None:
    """From the JSON that kernels.py writes."""
    outcome.timings = json.loads(report)
    results = outcome.timings["results"]
    for result in results:
        if result["failed"]:
            name = f"{result['kernel']} {result['models']} {result['sizes']}"
            outcome.failures.append({"test": name, "message": result["failed"][:MESSAGE]})
    outcome.skipped = dict(Counter(x["skipped"] for x in results if x["skipped"]))
    num_skipped = sum(outcome.skipped.values())
    num_failed = len(outcome.failures)
    num_passed = len(results) - num_failed - num_skipped
    outcome.counts = {"passed": num_passed, "failed": num_failed, "skipped": num_skipped}


def describe_machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "num_gpus": torch.cuda.device_count(),
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": _answer("nvidia-smi", "--query-gpu=clocks.max.sm,power.limit", "--format=csv"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "num_cpus": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _answer(*command: str) -> str | None:
    """What a command prints; None if it can't be had."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def check(parts: Sequence[Part], machine: dict[str, Any], path: Path) -> bool:
    """Run the parts; the file is written anew after each, so that it holds what there is."""
    figures: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _answer("git", "rev-parse", "HEAD"),
        "changed_files": (_answer("git", "status", "--porcelain") or "").splitlines(),
        "machine": machine,
        "passed": False,
    }
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            print(f"{part.name:34} …", end="\r", flush=True)
            outcomes.append(run(part, Path(folder)))
            print(outcomes[-1], flush=True)
            figures["passed"] = all(outcome.result == "passed" for outcome in outcomes)
            figures["is_complete"] = len(outcomes) == len(parts)
            figures["parts"] = [asdict(outcome) for outcome in outcomes]
            path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for outcome in outcomes:
        for failure in outcome.failures:
            first_line = failure["message"].strip().partition("\n")[0]
            print(f"  {outcome.name}: {failure['test']}: {first_line}")
    print(f"{'all passed' if figures['passed'] else 'NOT all passed'}; everything is in {path}")
    return bool(figures["passed"])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="time one size of each kernel")
    parser.add_argument("--only", default="", metavar="TEXT", help="parts whose names have TEXT")
    parser.add_argument("--output", type=Path, default=ROOT / "gpu-check.json", metavar="FILE")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("make gpu-check needs a GPU, and torch finds none here", file=sys.stderr)
        return 2
    parts = [part for part in all_parts(options.quick) if options.only in part.name]
    if not parts:
        parser.error(f"no part has {options.only!r} in its name")
    machine = describe_machine()
    print(f"{machine['gpu']}, driver {machine['driver']}, {machine['packages']}")
    return 0 if check(parts, machine, options.output) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
