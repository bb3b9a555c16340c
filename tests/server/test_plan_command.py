"""`bezel plan` and `bezel serve --dry-run` as a user meets them."""

import json
from pathlib import Path

import pytest

from bezel.engine.planning.published import PUBLISHED
from bezel.server import serve as serve_module
from bezel.server.cli import main
from bezel.server.plan_command import _parse_workload


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "plan", "gemma-4-26B-A4B", "--device-memory", "80G")
    assert printed.startswith("gemma-4-26B-A4B: 25.23 billion parameters in bfloat16")
    assert "GPU with 85.90 GB of memory and the speed of H100 SXM" in printed


def test_flags_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "b200", "--max-num-seqs", "7", "--block-size", "32", "--dtype", "float32"]
    flags += ["--kv-cache-dtype", "fp8", "--max-num-batched-tokens", "512", "--json"]
    flags += ["--workload", "1500+300/8K+1K", "--gpu-memory-utilization", "0.5"]
    found = json.loads(run(capsys, "plan", "google/gemma-4-e4b-it", *flags))
    assert (found["model"], found["device"]["name"]) == ("gemma-4-E4B", "B200")
    assert (found["dtype"], found["kv_dtype"]) == ("float32", "fp8")
    assert [layer["page_tokens"] for layer in found["layers"]] == [32, 128]
    assert found["memory"]["usable_bytes"] == 90 * 10**9
    assert found["contexts"][0]["num_at_once"] == 7
    assert (found["workload"]["p50_tokens"], found["workload"]["p95_tokens"]) == (1800, 9216)
    assert any("what-if" in note for note in found["notes"])


def test_what_does_not_fit_is_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "plan", "gemma-4-31B", "--device-memory", "24g")
    assert "DOES NOT FIT" in printed and "22.1 GB may be used" in printed
    found = json.loads(run(capsys, "plan", "gemma-4-31B", "--device-memory", "24g", "--json"))
    assert found["fits"] is False and found["memory"]["short_bytes"] > 41 * 10**9


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["gemma-9"], "gemma-9: no such directory or file, nor a model known by name"),
        (["gemma-4-E2B", "--max-model-len", "200000"], "--max-model-len 200000 is not between"),
        (["gemma-4-E2B", "--workload", "9+1/3+1"], "--workload: the 95th percentile (4 tokens)"),
        (["gemma-4-E2B", "--workload", "100"], "argument --workload: '100' is not prompt +"),
        (["gemma-4-E2B", "--device-memory", "lots"], "argument --device-memory: 'lots' is not"),
        ([], "the following arguments are required: MODEL"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"bezel: error: {message}")


@pytest.mark.parametrize("text", ["", "1+1", "1+1/2", "a+1/2+2", "1+1/2+2/3+3", "1.5+1/2+2"])
def test_other_spellings_of_a_workload_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not prompt"):
        _parse_workload(text)


def test_a_dry_run_plans_and_serves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With flags and variables of `serve`; there are no weights that could be loaded."""
    served: list[object] = []
    monkeypatch.setattr(serve_module, "serve", served.append)
    monkeypatch.setenv("BEZEL_MAX_NUM_SEQS", "3")
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gemma-3-270m"]))
    flags = ["--device", "cpu", "--kv-cache-memory-bytes", "1g", "--dtype", "float32"]
    printed = run(capsys, "serve", str(tmp_path), "--dry-run", *flags)
    assert served == []
    kept = "bfloat16 (100%), else float32"  # as the published weights are stored
    assert printed.startswith(f"{tmp_path.name}: 0.27 billion parameters in {kept}")
    rows = [line.split() for line in printed.splitlines()]
    assert "On a CPU with" in printed and ["KV", "pages", "1.00"] in [row[:3] for row in rows]
    [line] = [line for line in printed.splitlines() if line.startswith("8,192 ")]
    assert line.split()[6:8] == ["3", "--max-num-seqs"]
