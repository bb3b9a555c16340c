"""The cost of a step counts what the engine's models, pages and kernels' cases have, and
`benchmarks/roofline.py` prints it."""

import importlib.util
import json
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import attention_cases
import expert_cases
import roofline
from aot.launches import CONFIGS
from attention_cases import Paged
from kernel_cases import DTYPE, Stock, Work
from roofline import Row, decode_row, most_sequences, parts_of, prefill_row

from bezel.engine.kv_layout import KVLayout
from bezel.engine.model_config import AttentionConfig, LayerConfig, ModelConfig, RotaryConfig
from bezel.engine.models.registry import build_model
from bezel.engine.planning.model import PlannedModel
from bezel.engine.planning.step_cost import Part, distinct_experts

ROOT = Path(__file__).resolve().parent.parent
MODELS = {model.name: model for model in roofline.gemma4_models()}
EACH_MODEL = pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
# Gemma 4's technical report, table 1: millions of parameters of embedding tables and of the rest.
PUBLISHED = {
    "E2B": 400 + 2340 + 1870,
    "E4B": 670 + 2820 + 3940,
    "12B": 1000 + 10_890,
    "26B-A4B": 740 + 24_500,
    "31B": 1410 + 29_290,
}


BYTES_PER_S, FLOPS_PER_S = 3.35e12, 989e12


@dataclass(frozen=True)
class Step:
    """`num_seqs` sequences with `q_len` new tokens each, which are `context` long with these.

    Of the first `num_logits` sequences logits are wanted, of one token each.
    """

    num_seqs: int
    q_len: int
    context: int
    num_logits: int

    @property
    def sequences(self) -> list[tuple[int, int, bool]]:
        start = self.context - self.q_len
        return [(start, self.context, i < self.num_logits) for i in range(self.num_seqs)]


def by_name(model: PlannedModel, step: Step) -> dict[str, Part]:
    return {part.name: part for part in parts_of(model, step.sequences)}


def read(row: Row, kind: str) -> float:
    return row.bytes_by_kind[kind]


@EACH_MODEL
def test_weights_are_all_of_the_engines_and_as_many_as_published(model: PlannedModel) -> None:
    parameters = list(build_model(model.config, DTYPE, torch.device("meta")).parameters())
    assert model.weight_bytes == sum(parameter.nbytes for parameter in parameters)
    num_parameters = sum(parameter.numel() for parameter in parameters)
    assert num_parameters / 1e6 == pytest.approx(PUBLISHED[model.name], rel=0.015)


@EACH_MODEL
def test_components_by_hand(model: PlannedModel) -> None:
    """From the shapes alone: matrices of each layer, and tables."""
    config = model.config
    dim, layers = config.hidden_size, config.layers
    projections = 0
    for layer in layers:
        shape = config.attention(layer)
        kv_heads = (1 if shape.key_is_value else 2) * shape.num_kv_heads if layer.owns_kv else 0
        projections += (2 * shape.num_heads + kv_heads) * shape.head_dim * dim
    per_layer = len(layers) * config.per_layer_input_size
    expected = {
        "projections": projections,
        "MLP": sum(3 * layer.intermediate_size * dim for layer in layers),
        "head": config.vocab_size * dim,
        "rest": 3 * per_layer * dim,
    }
    if config.moe is not None:
        experts = len(layers) * config.moe.num_experts * dim
        expected["experts"] = experts * 3 * config.moe.intermediate_size
        expected["rest"] += experts
    if per_layer:
        expected["per-layer table"] = config.per_layer_vocab_size * per_layer
    assert {name: part.num_products for name, part in model.weights.items()} == expected
    for name, part in model.weights.items():
        assert name == "rest" or part.num_bytes == 2 * part.num_products


@EACH_MODEL
@pytest.mark.parametrize("context", [100, 8192, 65_536])
def test_held_pages_are_the_layouts(model: PlannedModel, context: int) -> None:
    layout = KVLayout.for_model(model.config, 2, 16)
    pages = layout.num_bytes(layout.pages(context))
    row = decode_row(model, context, 8)
    assert row.held_bytes == model.weight_bytes + 8 * pages
    assert row.fits == (row.held_bytes <= 80e9)
    most = most_sequences(model, context)
    assert decode_row(model, context, most).fits
    assert not decode_row(model, context, most + 1).fits


@EACH_MODEL
def test_keys_and_values_read_are_those_held_for_each_layer_that_reads(model: PlannedModel) -> None:
    """At 8K windows begin with a page, so that nothing is held that isn't read."""
    layout, layers = model.layout, model.config.layers
    held = layout.pages(8192)
    local_readers = sum(layer.is_local for layer in layers) / len(model.config.local_kv_layers)
    readers = sum(not layer.is_local for layer in layers) / len(model.config.global_kv_layers)
    expected = held.local * layout.local_page_bytes * local_readers
    expected += held.global_ * layout.global_page_bytes * readers
    assert read(decode_row(model, 8192, 64), "keys and values") == pytest.approx(64 * expected)
    if model.name.startswith("E"):  # 20 of 35 layers, or 18 of 42, have no keys of their own
        assert local_readers > 1.5 and readers > 1.5
    else:
        assert expected == layout.num_bytes(held)


def paged(heads: int, kv_heads: int, window: int | None, turned: int = 0) -> Paged:
    rotary = RotaryConfig(1e4, turned or 16)
    attention = AttentionConfig(heads, kv_heads, 32, 1.0, rotary, window, key_is_value=turned > 0)
    return Paged(attention, 16 if window else 64, 8 if window else 0)


def attention_part(attention: AttentionConfig, step: Step) -> Part:
    """Of a model with seven layers of this shape; one of another takes the place of the other
    kind, which every model has."""
    is_local = attention.window is not None
    base = ModelConfig.from_hf(CONFIGS["12B"])
    other = base.global_ if is_local else base.local
    config = replace(
        base,
        hidden_size=64,
        vocab_size=64,
        local=attention if is_local else other,
        global_=other if is_local else attention,
        layers=tuple(LayerConfig(i, is_local == (i < 7), i, 32) for i in range(8)),
    )
    name = "local attention" if is_local else "global attention"
    return by_name(PlannedModel.of("seven", config), step)[name]


STOCK = Stock("cpu", 8 << 20)
decode = attention_cases.decode


@pytest.mark.parametrize(
    ("shape", "step", "build"),
    [
        (paged(8, 2, 40), Step(3, 1, 100, 3), partial(decode, context=100, batch=3, q_len=1)),
        (paged(8, 2, 40), Step(3, 1, 20, 3), partial(decode, context=20, batch=3, q_len=1)),
        (paged(8, 2, 40), Step(3, 4, 100, 3), partial(decode, context=100, batch=3, q_len=4)),
        (paged(8, 2, None), Step(2, 1, 300, 2), partial(decode, context=300, batch=2, q_len=1)),
        (paged(8, 2, None, 4), Step(2, 1, 300, 2), partial(decode, context=300, batch=2, q_len=1)),
        (
            paged(8, 2, 40),
            Step(1, 64, 64, 0),
            partial(attention_cases.prefill_local, context=0, num_tokens=64),
        ),
        (
            paged(8, 2, 40),
            Step(1, 64, 164, 0),
            partial(attention_cases.prefill_local, context=100, num_tokens=64),
        ),
        (
            paged(8, 2, None, 4),
            Step(1, 64, 164, 0),
            partial(attention_cases.prefill_global, context=100, num_tokens=64),
        ),
    ],
)
def test_attention_is_counted_as_its_cases_count(shape: Paged, step: Step, build: Any) -> None:
    work: Work = build(STOCK, shape)
    part = attention_part(shape.attention, step)
    assert part.num_bytes + part.activation_bytes == 7 * work.num_bytes
    assert part.num_flops == 7 * work.num_flops


def small_experts() -> PlannedModel:
    config = CONFIGS["26B-A4B"] | {
        "num_hidden_layers": 6,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "vocab_size": 256,
    }
    return PlannedModel.of("small", ModelConfig.from_hf(config))


def test_experts_are_counted_as_their_cases_count() -> None:
    """Of 200 tokens with 2 of 8 experts each, somebody chooses every expert."""
    model, num_tokens = small_experts(), 200
    moe = model.config.moe
    assert moe is not None
    work = expert_cases.experts(STOCK, num_tokens, moe, dim=64, dense_width=96)
    part = by_name(model, Step(num_tokens, 1, 300, num_tokens))["experts"]
    rows = num_tokens * (64 * 2 + 2 * 4 + 2 * 64 * 2)  # taken in, choices, put out
    assert part.num_bytes == pytest.approx(6 * (work.num_bytes - rows))
    assert part.num_flops == 6 * work.num_flops


def test_fewer_tokens_read_fewer_experts() -> None:
    model = small_experts()
    one = by_name(model, Step(1, 1, 300, 1))["experts"]
    assert one.num_bytes == pytest.approx(model.weights["experts"].num_bytes * 2 / 8)
    assert by_name(model, Step(2, 1, 300, 2))["experts"].num_bytes < 2 * one.num_bytes


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (5, 2), (4, 3)])
def test_distinct_experts_is_the_mean_over_all_choices(
    num_experts: int, top_k: int, num_tokens: int
) -> None:
    choices = list(combinations(range(num_experts), top_k))
    counts = [len(set().union(*chosen)) for chosen in product(choices, repeat=num_tokens)]
    mean = sum(counts) / len(counts)
    assert distinct_experts(num_experts, top_k, num_tokens) == pytest.approx(mean)


@EACH_MODEL
def test_products_turn_from_memory_to_compute_at_295_rows(model: PlannedModel) -> None:
    """989 TFLOP/s over 3.35 TB/s is 295.2 FLOP for each byte, or for each row of a bfloat16."""
    few = by_name(model, Step(295, 1, 8192, 295))
    many = by_name(model, Step(296, 1, 8192, 296))
    for name in ("projections", "MLP", "head"):
        assert not few[name].is_compute_bound and many[name].is_compute_bound
        assert few[name].floor_s == pytest.approx(few[name].num_bytes / 3.35e12)
        assert many[name].floor_s == pytest.approx(many[name].num_flops / 989e12)
    assert not any(part.is_compute_bound for name, part in many.items() if "attention" in name)


def test_experts_turn_when_each_has_295_rows() -> None:
    """8 of 128: at sixteen times as many tokens, when all experts are read."""
    model, turn = MODELS["26B-A4B"], 295.2 * 128 / 8
    for num_tokens in (4000, 4700, 4750, 6000):
        experts = by_name(model, Step(1, num_tokens, num_tokens, 1))["experts"]
        assert experts.is_compute_bound == (num_tokens > turn)


def test_decoding_is_bound_by_memory_and_prefill_by_compute() -> None:
    for model in MODELS.values():
        assert decode_row(model, 8192, 64).compute_share == 0
        assert 0 < decode_row(model, 8192, 512).compute_share < 0.5
        assert prefill_row(model, 8192, 8192).compute_share > 0.9
    # In chunks of 2,048 an expert gets 128 rows.
    assert prefill_row(MODELS["26B-A4B"], 8192, 2048).compute_share < 0.5


@EACH_MODEL
def test_the_floor_is_above_that_of_bytes_alone_and_of_flops_alone(model: PlannedModel) -> None:
    for row in (decode_row(model, 8192, 512), prefill_row(model, 8192, 2048)):
        alone = row.num_bytes / BYTES_PER_S, row.num_flops / FLOPS_PER_S
        assert max(alone) < row.seconds < sum(alone)
    row = decode_row(model, 8192, 1)
    assert row.seconds == pytest.approx(row.num_bytes / BYTES_PER_S)
    assert row.tokens_per_s == pytest.approx(1 / row.seconds)


@EACH_MODEL
def test_prefill_in_chunks_computes_the_same_and_reads_more(model: PlannedModel) -> None:
    whole, chunked = prefill_row(model, 8192, 8192), prefill_row(model, 8192, 2048)
    uneven = prefill_row(model, 8192, 3000)
    assert whole.num_flops == chunked.num_flops == uneven.num_flops
    once = sum(model.weights[name].num_bytes for name in ("projections", "MLP", "rest"))
    assert read(chunked, "weights") == read(whole, "weights") + 3 * once
    assert read(uneven, "weights") == read(whole, "weights") + 2 * once
    assert read(chunked, "keys and values") > read(whole, "keys and values")
    # Logits of one token only, whatever the number of chunks.
    assert [part.name for part in chunked.parts].count("head") == 1


def test_the_device_is_the_one_that_timings_are_compared_with() -> None:
    spec = importlib.util.spec_from_file_location("timings", ROOT / "benchmarks" / "kernels.py")
    assert spec is not None and spec.loader is not None
    timings = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(timings)
    peaks = timings.PEAKS["NVIDIA H100 80GB HBM3"]
    assert (peaks.bandwidth * 1e9, peaks.flops * 1e12) == (BYTES_PER_S, FLOPS_PER_S)


def test_the_docs_have_this_table() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    models, stale = list(MODELS.values()), "stale: put in what benchmarks/roofline.py prints"
    assert roofline.table("Sequences", roofline.decode_rows(models, 8192)) in page, stale
    assert roofline.table("Chunk", roofline.prefill_rows(models)) in page, stale
    assert roofline.what_fits(models, 8192) in page.replace("\n", " "), stale
    assert "Computed, not measured" in page


def test_json_has_all_parts_and_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main(["--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["is_measured"] is False
    assert len(report["decode"]) == 2 * 5 * 4 and len(report["prefill"]) == 5 * 2
    for row in report["decode"] + report["prefill"]:
        parts = row["parts"]
        assert row["floor_s"] == pytest.approx(sum(part["floor_s"] for part in parts))
        assert sum(row["bytes"].values()) == pytest.approx(sum(p["num_bytes"] for p in parts))
    [row] = [
        row
        for row in report["decode"]
        if (row["model"], row["context"], row["size"]) == ("31B", 8192, 64)
    ]
    assert not row["fits"] and row["held_bytes"] == pytest.approx(141.9e9, rel=1e-3)


def test_what_is_printed_says_that_it_is_computed(capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main([])
    printed = capsys.readouterr().out
    assert printed.startswith("Computed for one H100 SXM, not measured.")
    assert printed.count("| 31B | 64 |") == 2 and printed.count("**no**") > 10
