"""What `benchmarks/kernels.py` times, as far as it goes without a GPU: bytes, FLOPs, verdicts."""

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None or os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import attention_cases
import expert_cases
import kernel_cases
from attention_cases import Paged
from kernel_cases import Stock, Work, worst_error
from simulator.watch import watched

from bezel.engine.model_config import AttentionConfig, MoEConfig, RotaryConfig
from bezel.kernels.decode_attention import decode_attention
from bezel.kernels.jit import triton_on_cpu

ROOT = Path(__file__).resolve().parent.parent


def load_kernels() -> Any:
    """benchmarks/kernels.py; there is a folder of that name too."""
    path = ROOT / "benchmarks" / "kernels.py"
    spec = importlib.util.spec_from_file_location("timed_kernels", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kernels = load_kernels()


def test_without_a_gpu_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "GPU" in printed.err


class FakeTimer:
    """A kernel takes a millisecond, torch four."""

    def median(self, run: Callable[[], str], num_runs: int, num_warm_runs: int) -> float:
        assert num_runs >= kernels.MIN_BASELINE_RUNS
        return {"kernel": 1e-3, "torch": 4e-3}[run()]

    def once(self, run: Callable[[], str]) -> float:
        return 4e-3


STOCK = Stock("cpu", 8 << 20)


def measure(work: Work | Exception, page_bytes: int = 0) -> Any:
    def build(stock: Stock) -> Work:
        if isinstance(work, Exception):
            raise work
        return work

    case = kernel_cases.Case("gelu", "12B", {"tokens": 1}, build, page_bytes)
    return kernels.measure(case, STOCK, FakeTimer(), kernels.Peaks(1000, 2))


def work_of(error: float, baseline: Callable[[], str] | None = lambda: "torch") -> Work:
    return Work(lambda: "kernel", lambda: error, 10**8, 10**9, baseline)


def test_a_time_comes_with_what_it_means() -> None:
    result = measure(work_of(0.01))
    assert result.microseconds == pytest.approx(1000)
    assert result.gigabytes_per_s == pytest.approx(100)
    assert result.tflops == pytest.approx(1)
    assert result.share_of_bandwidth == pytest.approx(0.1)
    assert result.share_of_flops == pytest.approx(0.5)
    assert result.speedup == pytest.approx(4)
    line = str(result)
    assert "50% of peak" in line and "4.00 × torch" in line and "1000.0 µs" in line


@pytest.mark.parametrize("error", [0.03, float("inf"), float("nan")])
def test_a_wrong_kernel_gets_no_time(error: float) -> None:
    result = measure(work_of(error))
    assert "off from the reference" in result.failed and result.microseconds is None
    assert "FAILED" in str(result)


def no_memory() -> str:
    raise torch.cuda.OutOfMemoryError("no memory")


def test_what_does_not_fit_is_skipped_and_what_breaks_fails() -> None:
    assert "needs 1.0 GiB" in measure(work_of(0), page_bytes=1 << 30).skipped
    assert measure(torch.cuda.OutOfMemoryError("no memory")).skipped == "out of memory"
    assert measure(ValueError("bad\nshape")).failed == "ValueError: bad"
    result = measure(work_of(0, no_memory))
    assert result.microseconds and result.speedup is None and not result.skipped


def test_the_row_that_is_worst_off_counts() -> None:
    expected = torch.randn(1000, 4, 16)
    actual = expected.clone()
    assert worst_error([actual, None], [expected, None]) == 0
    actual[500, 2] *= 1.5
    assert worst_error([actual], [expected]) == pytest.approx(0.5)
    actual[0, 0, 0] = torch.nan
    assert worst_error([actual], [expected]) == float("inf")
    with pytest.raises(AssertionError):
        worst_error([None], [expected])


def test_every_kernel_has_a_quick_case_and_the_largest_pages_fit_an_h100() -> None:
    cases = kernels.all_cases()
    assert {case.kernel for case in kernels.quick(cases)} == {case.kernel for case in cases}
    assert max(case.page_bytes for case in cases) < 0.6 * 75 * 2**30
    batches = {c.sizes["batch"] for c in cases if c.kernel == "decode global"}
    assert batches == {1, 8, 64}


def heads(num: int, kv: int, dim: int, window: int | None = None, turned: int = 0) -> Paged:
    rotary = RotaryConfig(1e4, turned or dim // 2)
    attention = AttentionConfig(num, kv, dim, 1.0, rotary, window, key_is_value=turned > 0)
    return Paged(attention, 16 if window else 64, 4 if window else 0)


LOCAL, GLOBAL, PACKED = heads(8, 2, 32, window=40), heads(8, 2, 32), heads(8, 2, 32, turned=4)
MOE = MoEConfig(num_experts=8, top_k=2, intermediate_size=64)
EXPERTS = {"moe": MOE, "dim": 128, "dense_width": 128}
attend, chunk = attention_cases.decode, attention_cases.prefill_global
local_chunk = attention_cases.prefill_local
qkv = partial(kernel_cases.qkv, has_norm=True)
BUILDERS = {
    "decode local": partial(attend, paged=LOCAL, context=100, batch=3, q_len=1),
    "decode within a window": partial(attend, paged=LOCAL, context=20, batch=3, q_len=1),
    "decode global": partial(attend, paged=GLOBAL, context=300, batch=2, q_len=1),
    "decode packed": partial(attend, paged=PACKED, context=300, batch=2, q_len=1),
    "verify local": partial(attend, paged=LOCAL, context=100, batch=3, q_len=4),
    "verify packed": partial(attend, paged=PACKED, context=300, batch=2, q_len=4),
    "first chunk local": partial(local_chunk, paged=LOCAL, context=0, num_tokens=130),
    "chunk local": partial(local_chunk, paged=LOCAL, context=70, num_tokens=130),
    "first chunk packed": partial(chunk, paged=PACKED, context=0, num_tokens=130),
    "chunk global": partial(chunk, paged=GLOBAL, context=70, num_tokens=130),
    "qkv local": partial(qkv, attention=LOCAL.attention, num_tokens=9),
    "qkv of a chunk": partial(qkv, attention=LOCAL.attention, num_tokens=70),
    "qkv global": partial(qkv, attention=GLOBAL.attention, num_tokens=9),
    "qkv packed": partial(qkv, attention=PACKED.attention, num_tokens=9),
    "norms": partial(kernel_cases.norms, num_tokens=5, width=96, num_next=3),
    "gelu": partial(kernel_cases.gelu, num_tokens=5, width=96),
    "route": partial(expert_cases.routing, num_tokens=40, moe=MOE),
    "one token's experts": partial(expert_cases.experts, num_tokens=1, **EXPERTS),
    "experts": partial(expert_cases.experts, num_tokens=6, **EXPERTS),
    "experts alone": partial(expert_cases.experts, num_tokens=70, **EXPERTS),
    "combine": partial(expert_cases.combination, num_tokens=5, **EXPERTS),
    "combine with a dense MLP": partial(expert_cases.combination, num_tokens=70, **EXPERTS),
    "greedy": partial(kernel_cases.draw, num_seqs=2, vocab_size=3000, kind="greedy"),
    "uncut": partial(kernel_cases.draw, num_seqs=2, vocab_size=3000, kind="uncut"),
    "cut": partial(kernel_cases.draw, num_seqs=2, vocab_size=3000, kind="top-k top-p"),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_case_is_right_and_its_bytes_are_what_it_has_to_move(name: str) -> None:
    """All but page tables, lengths and parameters: less than one key of the smallest of these."""
    work = BUILDERS[name](STOCK)
    with torch.inference_mode(), triton_on_cpu():
        with watched() as watch:
            work.run()
        assert work.error() < kernels.TOLERANCE
    assert 0 <= watch.minimum_bytes - work.num_bytes <= 120
    if work.baseline is not None:
        work.baseline()


@pytest.mark.parametrize(
    ("build", "padding"),
    [
        # A full tile of 16 rows and blocks without a masked key: all is asked for.
        (partial(attend, paged=heads(16, 1, 32), context=256, batch=2, q_len=1), (1, 1)),
        (partial(attend, paged=heads(16, 1, 64, window=32), context=64, batch=2, q_len=1), (1, 1)),
        # One row of 16, and tiles on the diagonal.
        (partial(expert_cases.experts, num_tokens=1, **EXPERTS), (16, 16)),
        (partial(chunk, paged=heads(16, 1, 32), context=512, num_tokens=64), (1, 1.1)),
        (
            partial(local_chunk, paged=heads(16, 1, 64, window=48), context=64, num_tokens=64),
            (1, 2.5),
        ),
    ],
)
def test_flops_are_the_products_without_padding(
    build: Callable[[Stock], Work], padding: tuple[float, float]
) -> None:
    work = build(STOCK)
    with watched() as watch, triton_on_cpu():
        work.run()
    low, high = padding
    assert low * work.num_flops <= watch.dot_flops <= high * work.num_flops


def test_a_bug_in_a_kernel_shows_in_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one head of one sequence's last query."""

    def broken(*args: Any) -> Tensor:
        o_THK = decode_attention(*args)
        o_THK[-1, 3] *= 1.1
        return o_THK

    monkeypatch.setattr(attention_cases, "decode_attention", broken)
    work = BUILDERS["verify packed"](STOCK)
    with triton_on_cpu():
        assert work.error() > kernels.TOLERANCE
