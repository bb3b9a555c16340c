"""`make gpu-check` as far as it goes without a GPU: kernel tests on another device, and the report.

Here the other device is the CPU again: kernels are interpreted, on copies of their tensors.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None or os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu_check
import simulator.watch  # noqa: F401  # puts the interpreter's arithmetic right
from gpu_check import REPORT, Outcome, Part
from simulator import native
from triton.runtime.interpreter import InterpretedFunction

from bezel.kernels.decode_attention import decode_attention
from bezel.kernels.jit import triton_on_cpu
from bezel.kernels.kv_pages import write_kv

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def launch(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kernel = SimpleNamespace(__name__="kernel")
    return native.launching_on(CPU, run)(kernel, *args, grid=(1,), warmup=False, **kwargs)


def test_a_launch_gets_copies_of_storages_and_what_it_writes_comes_back() -> None:
    arena = torch.arange(48.0).view(2, 2, 12)
    k, v = arena[:, 0, 2:8], arena[:, 1].t()
    before = arena.clone()

    def run(self: Any, x: Tensor, *, grid: Any, warmup: bool, rest: Any, size: int) -> str:
        (y, nothing), empty = rest
        assert (x.stride(), x.storage_offset(), y.stride()) == ((24, 1), 2, (1, 24))
        assert torch.equal(x, k) and torch.equal(y, v) and nothing is None and size == 3
        assert x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() != arena.data_ptr()
        assert empty.shape == (0, 4) and empty.dtype == torch.int64
        x += 100
        y[3, 1] = -1
        assert torch.equal(arena, before)
        return f"{grid} {warmup}"

    rest = ((v, None), torch.empty(0, 4, dtype=torch.int64))
    assert launch(run, k, rest=rest, size=3) == "(1,) False"
    before[:, 0, 2:8] += 100
    before[1, 1, 3] = -1
    assert torch.equal(arena, before)


def test_a_storage_too_large_to_copy_skips_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MAX_BYTES", 1024)
    launch(lambda *args, **kwargs: None, torch.zeros(256)[:2])
    with pytest.raises(pytest.skip.Exception, match="not copied"):
        launch(lambda *args, **kwargs: None, torch.zeros(257)[:2])


def test_a_lost_gpu_is_told_of_with_the_kernel_that_lost_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lose(self: native.Copies) -> None:
        raise RuntimeError("illegal memory access")

    run = native.launching_on(CPU, lambda *args, **kwargs: None)
    monkeypatch.setattr(native.Copies, "bring_back", lose)
    for name in ("culprit", "victim"):
        with pytest.raises(RuntimeError, match="lost in culprit: illegal memory access"):
            run(SimpleNamespace(__name__=name), torch.zeros(1), grid=(1,), warmup=False)


@pytest.fixture
def on_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    run = native.launching_on(CPU, InterpretedFunction.run)
    monkeypatch.setattr(InterpretedFunction, "run", run)


def paged_step() -> list[Tensor]:
    """A step that writes to pages of a middle layer and attends to them; all it leaves behind."""
    generator = torch.Generator().manual_seed(0)
    arena = torch.randn(5, 3, 2, 8, 2, 16, generator=generator)
    k_cache, v_cache = arena[:, 1].unbind(1)
    new, q = torch.randn(2, 3, 4, 16, generator=generator)
    slots, lens = torch.tensor([9, -1, 30]), torch.tensor([10, 0, 31])
    table = torch.tensor([[4, 1, 0, 0], [0, 0, 0, 0], [0, 2, 1, 3]])
    with triton_on_cpu():
        write_kv(new[:, 1:3], k_cache, slots)
        o = decode_attention(q, k_cache, v_cache, table, lens, 0.3, None, 16)
    return [o, arena]


def test_kernels_compute_the_same_on_copies(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    expected = paged_step()
    request.getfixturevalue("on_copies")
    copy, num_copies = native.Copies.of, 0

    def counting_copy(self: native.Copies, x: Tensor) -> Tensor:
        nonlocal num_copies
        num_copies += 1
        return copy(self, x)

    monkeypatch.setattr(native.Copies, "of", counting_copy)
    for actual, expected_one in zip(paged_step(), expected, strict=True):
        assert torch.equal(actual, expected_one)
    assert num_copies > 8


def test_what_nobody_wrote_is_known() -> None:
    given = torch.zeros(2, 4, dtype=torch.bfloat16)[:, 1:]
    with native.watched({"given": given}, uninitialised=[given], shuffle=False) as watch:
        floats, ints = torch.empty(2, 3), torch.empty(4, dtype=torch.int32)
        floats[0], ints[1:] = torch.nan, 7
        given[1, 2] = 0
    assert (watch.unwritten(floats), watch.unwritten(ints), watch.unwritten(given)) == (3, 1, 5)
    assert floats.isnan().all() and given.isnan().sum() == 5


def test_a_test_that_reads_counters_runs_to_its_end_and_is_skipped() -> None:
    native.skip_if_counters_were_read()
    with native.watched() as watch:
        pass
    native.skip_if_counters_were_read()
    assert watch.by_name["k"].loaded == watch.by_name["v"].stored == 7 and "k" in watch.by_name
    assert sum(watch.by_name[name].loaded for name in "kv") <= 2 * watch.bytes_stored + 1
    with pytest.raises(pytest.skip.Exception, match="interpreter"):
        native.skip_if_counters_were_read()
    native.skip_if_counters_were_read()


def test_kernel_tests_pass_on_copies() -> None:
    """In another process: tests that were imported before have the simulator's watch."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "--native", "cpu"]
    path = "tests/kernels/simulated/test_logits.py"
    done = subprocess.run([*command, path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d passed, \d+ skipped", done.stdout)
    assert native.NO_BUGS in done.stdout and native.NOT_COUNTED in done.stdout


TESTS = """
import pytest

def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
@pytest.fixture
def broken(): raise OSError("no such thing")
def test_broken(broken): pass
@pytest.mark.parametrize("i", range(2))
def test_skipped(i): pytest.skip("not today")
"""


def run_python(code: str, folder: Path, limit_s: float = 120, name: str = "part") -> Outcome:
    return gpu_check.run(Part(name, (sys.executable, "-c", code, REPORT), limit_s), folder)


def run_tests(tests: str, folder: Path) -> Outcome:
    path = folder / "test_it.py"
    path.write_text(tests, encoding="utf-8")
    command = (sys.executable, "-m", "pytest", str(path), "--junit-xml", REPORT)
    return gpu_check.run(Part("part", command, 120), folder)


def test_tests_are_counted_and_failures_keep_their_messages(tmp_path: Path) -> None:
    outcome = run_tests(TESTS, tmp_path)
    assert (outcome.result, outcome.exit_status) == ("failed", 1)
    assert outcome.counts == {"passed": 1, "failed": 2, "skipped": 2}
    assert outcome.skipped == {"not today": 2}
    messages = {failure["test"]: failure["message"] for failure in outcome.failures}
    assert messages.keys() == {"test_bad", "test_broken"}
    assert "one is not two" in messages["test_bad"] and "no such thing" in messages["test_broken"]
    assert "one is not two" in outcome.output


def test_a_part_passes_only_if_something_did(tmp_path: Path) -> None:
    outcome = run_tests("def test_good(): pass", tmp_path)
    assert (outcome.result, outcome.output) == ("passed", "")
    outcome = run_tests("import pytest\ndef test_it(): pytest.skip('no GPU')", tmp_path)
    assert (outcome.result, outcome.exit_status) == ("failed", 0)
    assert run_tests("", tmp_path).result == "failed"
    assert run_tests("import nothing_of_that_name", tmp_path).counts["failed"] == 1


def test_a_part_that_dies_or_hangs_is_ended_and_told_of(tmp_path: Path) -> None:
    dead = run_python("import os; print('about to', flush=True); os.abort()", tmp_path)
    assert dead.result == "died" and dead.exit_status != 0 and "about to" in dead.output
    hanging = "import signal; print('hanging', flush=True); signal.pause()"
    hung = run_python(hanging, tmp_path, limit_s=2)
    assert (hung.result, hung.exit_status, hung.output) == ("timed out", None, "hanging\n")


def test_a_report_of_the_part_before_counts_for_nothing(tmp_path: Path) -> None:
    assert run_tests("def test_good(): pass", tmp_path).result == "passed"
    assert run_tests("import os\nos._exit(0)", tmp_path).result == "died"


TIMINGS = """
import json, os, sys
assert os.environ["TRITON_INTERPRET"] == "0"
def case(**how):
    return dict(kernel="gelu", models="12B", sizes={}, skipped="", failed="") | how
results = [case(), case(skipped="out of memory"), case(failed=sys.argv[2])]
open(sys.argv[1], "w").write(json.dumps({"device": "B200", "results": results}))
sys.exit(bool(sys.argv[2]))
"""


@pytest.mark.parametrize(("failed", "result"), [("off by a mile", "failed"), ("", "passed")])
def test_timings_are_taken_over(tmp_path: Path, failed: str, result: str) -> None:
    part = Part("timings", (sys.executable, "-c", TIMINGS, REPORT, failed), 60)
    outcome = gpu_check.run(part, tmp_path)
    assert outcome.result == result and outcome.skipped == {"out of memory": 1}
    assert outcome.counts["passed"] == 1 + (not failed)
    assert [failure["message"] for failure in outcome.failures] == [failed] * bool(failed)
    assert outcome.timings is not None and outcome.timings["device"] == "B200"


def test_one_bad_part_stops_nothing_and_the_file_tells_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def part(name: str, failed: str) -> Part:
        return Part(name, (sys.executable, "-c", TIMINGS, REPORT, failed), 60)

    path, machine = tmp_path / "check.json", {"gpu": "B200"}
    assert not gpu_check.check([part("bad", "off by a mile"), part("good", "")], machine, path)
    figures = json.loads(path.read_text("utf-8"))
    assert [p["result"] for p in figures["parts"]] == ["failed", "passed"]
    assert not figures["passed"] and figures["is_complete"] and figures["machine"] == machine
    assert figures["date"].startswith("20")
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", figures["commit"])
    assert "off by a mile" in capsys.readouterr().out
    assert gpu_check.check([part("good", "")], machine, path)
    assert json.loads(path.read_text("utf-8"))["passed"]


def test_every_kernel_test_is_a_part() -> None:
    parts = gpu_check.all_parts(quick=True)
    words = [word for part in parts for word in part.command]
    folder = ROOT / "tests" / "kernels" / "simulated"
    files = {str(path.relative_to(ROOT)) for path in folder.glob("test_*.py")}
    named = {word for word in words if word.startswith("tests/")}
    assert files - named == {"tests/kernels/simulated/test_simulator.py"}
    assert all((ROOT / word).is_file() for word in named)
    assert len({part.name for part in parts}) == len(parts)
    assert all(REPORT in part.command for part in parts) and "--quick" in words


def test_without_a_gpu_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "GPU" in printed.err
