"""`cost_growth`, `decode_limit`, `profile_steps`: what they count, on a small model or by hand."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import cost_growth
import decode_limit
import profile_steps
from cost_growth import Point
from decode_limit import Bandwidth
from decoding import Decoding, build_engine

from bezel.kernels.cpu.jit import plain_torch

ROOT = Path(profile_steps.ROOT)


@pytest.fixture
def batch(small_checkpoint: Path) -> Iterator[Decoding]:
    """Two seats; torch computes, as compiling kernels for this model would take longer."""
    with plain_torch():
        yield Decoding(build_engine("float32", str(small_checkpoint), max_num_seqs=2, block_size=8))


def test_a_batch_is_filled_with_those_that_run_and_those_that_wait(batch: Decoding) -> None:
    batch.fill(2, 20, num_waiting=3)
    scheduler = batch.engine.scheduler
    assert [sequence.num_output_tokens for sequence in scheduler.running] == [1, 1]
    assert {sequence.num_tokens for sequence in scheduler.running} == {21}
    assert len(scheduler.waiting) == 3
    assert len(batch.steps_s(4)) == 4
    assert [sequence.num_output_tokens for sequence in scheduler.running] == [5, 5]
    batch.empty()
    assert not batch.engine.has_work
    batch.fill(1, 5)
    assert [sequence.num_tokens for sequence in scheduler.running] == [6]


def test_a_round_has_every_point(batch: Decoding, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "CONTEXTS": (16, 40),
        "BATCHES": (1, 2),
        "WAITING": (0, 3),
        "SEATS": 2,
        "NUM_STEPS": 2,
    }.items():
        monkeypatch.setattr(cost_growth, name, value)
    points = list(cost_growth.one_round(batch, batch))
    assert [(point.growth, point.amount) for point in points] == [
        *(("context", 16), ("context", 40)),
        *(("batch", 1), ("batch", 2)),
        *(("waiting", 0), ("waiting", 3)),
    ]
    for point in points[:2]:
        assert point.local_ms is not None and point.global_ms is not None
        assert 0 < point.local_ms + point.global_ms
        assert min(point.local_ms, point.global_ms) > 0
    assert not batch.engine.has_work
    layers = batch.engine.runner.model.layers
    assert not any(layer.self_attn._forward_hooks for layer in layers)


def test_a_point_is_the_median_of_its_rounds() -> None:
    rounds = [
        Point(growth="context", amount=16, step_ms=step, local_ms=local, global_ms=None)
        for step, local in ((3.0, 1.0), (1.0, 9.0), (2.0, 2.0))
    ]
    wanted = Point(growth="context", amount=16, step_ms=2.0, local_ms=2.0, global_ms=None)
    assert cost_growth.median_of(rounds) == wanted


def test_the_plot_has_every_line_and_is_the_same_for_the_same_numbers(tmp_path: Path) -> None:
    points = [
        Point(growth="context", amount=n, step_ms=7.0, local_ms=1.0, global_ms=0.1 * n)
        for n in (16, 512)
    ]
    points += [Point(growth=kind, amount=1, step_ms=5.0) for kind in ("batch", "waiting")]
    first, second, other = (tmp_path / f"{name}.svg" for name in "abc")
    cost_growth.draw(points, 512, first)
    cost_growth.draw(points, 512, second)
    assert first.read_bytes() == second.read_bytes()
    cost_growth.draw(points[:3], 512, other)
    assert first.read_bytes() != other.read_bytes()
    text = first.read_text(encoding="utf-8")
    for label in ("local layers", "global layers", "window", "requests waiting, 8 running"):
        assert f"<!-- {label} -->" in text


def test_bytes_of_weights_are_those_of_a_step(batch: Decoding) -> None:
    """In float32 nothing is packed, and the tied table is read as the output head."""
    engine = batch.engine
    assert decode_limit.weight_bytes(engine) == 4 * engine.runner.num_parameters


def test_packed_weights_are_counted_as_packed(small_checkpoint: Path) -> None:
    sizes = {
        name: decode_limit.weight_bytes(build_engine(name, str(small_checkpoint)))
        for name in ("float32", "bfloat16", "int8")
    }
    assert sizes["int8"] < 0.7 * sizes["bfloat16"] < 0.5 * sizes["float32"]


def test_a_ratio_is_of_the_round_that_it_was_measured_in() -> None:
    measured = [
        (100, 2.0, Bandwidth(torch_sum=100.0, plain_loop=50.0)),
        (100, 6.0, Bandwidth(torch_sum=100.0, plain_loop=20.0)),
        (100, 4.0, Bandwidth(torch_sum=100.0, plain_loop=100.0)),
    ]
    row = decode_limit.row("int8", measured)
    assert (row.step_ms, row.sum_ratio) == (4000.0, 4.0)
    assert (row.loop_ratio, row.lowest, row.highest) == (1.2, 1.0, 4.0)


@pytest.mark.parametrize(
    ("path", "name", "group"),
    [
        ("kernels/cpu/gemm.py", "multiply", "products"),
        ("engine/layers/linear.py", "forward", "products"),
        ("kernels/linear.py", "packed_embedding", "embedding"),
        ("kernels/decode_attention.py", "decode_attention", "attention"),
        ("kernels/cpu/qkv.py", "rotate", "attention"),
        ("engine/layers/norm.py", "add", "norms and gelu"),
        ("engine/sampler.py", "draw", "sampling"),
        ("engine/scheduler.py", "commit", "scheduler and batch"),
        ("engine/batch.py", "build", "scheduler and batch"),
        ("engine/models/gemma3.py", "forward", "rest"),
        ("tests/test_cost_growth.py", "f", None),
    ],
)
def test_groups_go_by_module(path: str, name: str, group: str | None) -> None:
    assert profile_steps.group_of((str(ROOT / path), 1, name)) == group


def test_groups_are_of_modules_that_there_are() -> None:
    names = [
        path.relative_to(ROOT).as_posix()
        for layer in ("engine", "kernels")
        for path in (ROOT / layer).rglob("*.py")
    ]
    for parts in profile_steps.GROUPS.values():
        assert all(any(part in name for name in names) for part in parts)


def test_time_of_others_belongs_to_their_callers() -> None:
    """`empty` is called by two modules of ours, by one of them through a function of torch."""
    norm = (str(ROOT / "engine/layers/norm.py"), 1, "add")
    gemm = (str(ROOT / "kernels/cpu/gemm.py"), 1, "multiply")
    through, empty = ("/torch/functional.py", 1, "f"), ("~", 0, "<built-in method torch.empty>")
    main = ("~", 0, "<main>")

    def edge(seconds: float) -> tuple[int, int, float, float]:
        return (1, 1, seconds, seconds)

    stats = {
        norm: (1, 1, 2.0, 6.0, {main: edge(2.0)}),
        gemm: (1, 1, 5.0, 9.0, {main: edge(5.0)}),
        through: (1, 1, 1.0, 4.0, {gemm: edge(1.0)}),
        empty: (3, 3, 4.0, 4.0, {norm: edge(1.0), through: edge(3.0)}),
        main: (1, 1, 0.5, 15.5, {}),
    }
    seconds = profile_steps.own_seconds(stats)
    assert seconds["norms and gelu"] == 3.0
    assert seconds["products"] == 9.0
    assert seconds["rest"] == 0.5
    assert sum(seconds.values()) == 12.5


def test_the_output_head_is_timed_apart(batch: Decoding) -> None:
    batch.fill(2, 20)
    milliseconds, stats = profile_steps.profile(batch, 3)
    assert {"output head", "products", "attention"} <= set(milliseconds)
    assert milliseconds["output head"] > 0
    assert not any(name == "compute_logits" for _, _, name in stats)
    assert any(name == "schedule" for _, _, name in stats)
    assert "compute_logits" not in vars(batch.engine.runner.model)
    assert list(milliseconds.values()) == sorted(milliseconds.values(), reverse=True)
