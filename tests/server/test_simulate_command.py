"""`bezel simulate` as a user meets it."""

import json
from pathlib import Path
from typing import Any

import pytest

from bezel.server.cli import main

SMALL = ("--model", "gemma-3-270m", "--device", "cpu", "--device-memory", "4G")


def simulate(*argv: str) -> int:
    return main(["simulate", *argv])


def results_of(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert simulate(*SMALL, "--json", "-", *argv) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_an_invented_trace_is_written_and_gives_the_same_when_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = str(tmp_path / "trace.jsonl")
    invented = ("--generate", "chats", "--num-requests", "40", "--rate", "2", "--seed", "3")
    first = results_of(capsys, *invented, "--write-trace", trace)
    assert first["results"]["num_answered"] == 40
    assert first["results"]["hit_rate"] > 0.3
    assert len(Path(trace).read_text().splitlines()) == 40
    assert results_of(capsys, trace) == first
    fewer = results_of(capsys, trace, "--max-requests", "7")
    assert fewer["results"]["num_requests"] == 7
    other = results_of(capsys, *invented[:-1], "4")
    assert other["results"] != first["results"]


def test_flags_reach_the_engine_the_device_and_the_workload(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = results_of(
        capsys,
        *("--generate", "poisson", "--num-requests", "5", "--prompt-mean", "70"),
        *("--prompt-sigma", "0", "--output-mean", "9", "--output-sigma", "0"),
        *("--max-num-seqs", "1", "--max-num-batched-tokens", "32", "--block-size", "8"),
        *("--no-enable-prefix-caching", "--kv-cache-memory-bytes", "100m", "--rate", "1000"),
        *("--slo-ttft", "0.5"),
    )
    assert found["device"]["memory_bytes"] == 4 * 2**30
    assert found["memory"]["kv_bytes"] == 100_000_000
    assert found["engine"]["enable_prefix_caching"] is False
    assert found["engine"]["block_size"] == 8
    results = found["results"]
    assert (results["peak_running"], results["num_steps"]) == (1, 5 * (3 + 8))
    assert results["goodput"]["ttft_s"] == 0.5


def test_the_report_is_printed_beside_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"prompt_tokens": 20, "num_output_tokens": 2}\n')
    json_file, png = tmp_path / "out.json", tmp_path / "out.png"
    assert simulate(*SMALL, str(trace), "--json", str(json_file), "--plot", str(png)) == 0
    captured = capsys.readouterr()
    assert "estimated" in captured.out and "1 answered" in captured.out
    assert captured.err == "", "no bar where nobody looks"
    assert json.loads(json_file.read_text())["results"]["num_answered"] == 1
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "simulate needs either a TRACE or --generate"),
        (["x.jsonl", "--generate", "chats"], "simulate needs either a TRACE or --generate"),
        (["x.jsonl", "--rate", "3"], "--rate goes with --generate only"),
        (["x.jsonl", "--write-trace", "y"], "--write-trace goes with --generate only"),
        (["--generate", "poisson", "--rate", "0"], "--rate must be above 0, got 0.0"),
        (["x.jsonl", "--plot", "none/a.png"], "--plot: there is no folder none"),
        (["--generate", "trains"], "argument --generate: invalid choice: 'trains'"),
        (["--generate", "chats", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["x.jsonl", "--max-requests", "0"], "--max-requests must be at least 1, got 0"),
        (["x.jsonl", "--device-memory", "much"], "argument --device-memory: 'much' is not"),
        (["none.jsonl", *SMALL], "none.jsonl: No such file or directory"),
        (["x.jsonl", "--model", "gemma-9"], "gemma-9: no such directory or file"),
        (["x.jsonl", "--max-num-seqs", "0"], "--max-num-seqs must be at least 1, got 0"),
        (
            ["--generate", "poisson", "--num-requests", "1", *SMALL, "--json", "none/out.json"],
            "--json: there is no folder none",
        ),
    ],
    ids=str,
)
def test_mistakes_are_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(*argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"bezel: error: {message}")
    assert captured.err.count("\n") == 1


def test_a_wrong_line_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"prompt_tokens": 20, "num_output_tokens": 2}\n{"prompt_tokens": 20}\n')
    assert simulate(*SMALL, str(trace)) == 2
    error = "line 2 of the trace: Object missing required field `num_output_tokens`"
    assert capsys.readouterr().err == f"bezel: error: {error}\n"
