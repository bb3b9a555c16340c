"""A plan's numbers by hand, what is in the way first, and the texts made of them."""

import json
from dataclasses import replace
from typing import Any

import pytest

from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError
from bezel.engine.memory import DeviceMemory, activation_bytes
from bezel.engine.model_config import ModelConfig
from bezel.engine.planning.capacity import ContextPlan, Workload
from bezel.engine.planning.device import PRESETS
from bezel.engine.planning.model import PlannedModel
from bezel.engine.planning.plan import Plan, plan_for
from bezel.engine.planning.published import PUBLISHED
from bezel.engine.planning.report import gist, table
from bezel.engine.quantization import choose_formats


def plan(
    size: str, gb: float, workload: Workload | None = None, is_gpu: bool = True, **flags: Any
) -> Plan:
    model = PlannedModel.of(size, ModelConfig.from_hf(PUBLISHED[f"gemma-4-{size}"]))
    memory = DeviceMemory(is_gpu, int(gb * 1e9), int(gb * 1e9))
    return plan_for(model, EngineConfig(**flags), memory, PRESETS["h100"], workload)


def at(found: Plan, num_tokens: int) -> ContextPlan:
    [context] = [context for context in found.contexts if context.num_tokens == num_tokens]
    return context


def test_layers_of_a_model_that_packs_and_of_one_that_shares() -> None:
    local, global_ = plan("31B", 140).layers
    assert (local.num_layers, len(local.kv_layers), local.window) == (50, 50, 1024)
    assert (global_.num_layers, global_.kv_layers) == (10, tuple(range(5, 60, 6)))
    assert (global_.num_heads, global_.num_kv_heads) == (32, 4)
    assert global_.packs_keys_into_values and not local.packs_keys_into_values
    assert global_.values_per_token == 4 * 640 and local.values_per_token == 16 * 512
    local, global_ = plan("E2B", 80).layers
    assert (local.num_layers, len(local.kv_layers), local.donors) == (28, 12, (13,))
    assert (global_.num_layers, len(global_.kv_layers), global_.donors) == (7, 3, (14,))


def test_bytes_of_a_sequence_beside_a_cache_of_full_length() -> None:
    """31B at 256K: 65 local pages and 4,096 global ones, where others keep 236 GB."""
    found = at(plan("31B", 140), 262_144)
    assert found.bytes_per_sequence == 65 * 13_107_200 + 4096 * 3_276_800
    assert found.full_length_bytes == 262_144 * 2 * (50 * 2 * 16 * 256 + 10 * 2 * 4 * 512)
    assert found.window_bytes == 64 * 13_107_200
    assert found.global_bytes == 4096 * 3_276_800


def test_contexts_end_with_the_longest() -> None:
    assert [c.num_tokens for c in plan("E2B", 80).contexts] == [8192, 32_768, 131_072]
    assert [c.num_tokens for c in plan("31B", 140).contexts][-1] == 262_144
    found = plan("31B", 140, max_model_len=10_000)
    assert [c.num_tokens for c in found.contexts] == [8192, 10_000]
    assert found.max_model_len == 10_000


def test_memory_is_divided_without_a_rest() -> None:
    config = EngineConfig()
    found = plan("26B-A4B", 80)
    step = activation_bytes(config, ModelConfig.from_hf(PUBLISHED["gemma-4-26B-A4B"]), 2)
    assert found.memory.activation_bytes == step
    usable = int(80e9 - 80e9 * (1 - config.gpu_memory_utilization))
    assert found.memory.usable_bytes == usable
    assert found.memory.kv_bytes == usable - step - found.memory.weight_bytes
    assert sum(found.weights.values()) == found.memory.weight_bytes == 50_467_507_772
    cpu = plan("E2B", 16, is_gpu=False).memory
    assert cpu.kv_bytes == (16 * 10**9 - cpu.weight_bytes) // 4 and cpu.activation_bytes == 0


def test_packed_weights_take_what_their_format_takes() -> None:
    """INT4: 5 bits a value; INT8: a byte, and four for each row's scale."""
    shape = ModelConfig.from_hf(PUBLISHED["gemma-4-26B-A4B"])
    config = EngineConfig(quantization="int4")
    model = PlannedModel.of("m", shape, choose=lambda m: choose_formats(config, m, False, {}))
    assert model.weights["experts"].num_bytes == 30 * 128 * (3 * 704 * 2816) * 5 // 8
    assert model.weights["MLP"].num_bytes == 30 * (3 * 2112 * 2816) * 5 // 8
    assert model.weights["head"].num_bytes == 262_144 * (2816 + 4)
    plain = PlannedModel.of("m", shape)
    assert model.weights["rest"] == plain.weights["rest"]
    assert model.num_parameters == plain.num_parameters
    memory = DeviceMemory(False, 24 * 10**9, 24 * 10**9)
    found = plan_for(model, config, memory, PRESETS["cpu"])
    assert found.memory.weight_bytes == sum(found.weights.values()) < 16.1e9
    assert found.num_packed["int8"] == 262_144 * 2816
    text = table(found)
    assert "in int4 (97%) and int8 (3%), else bfloat16, KV pages in bfloat16" in text
    assert "Products with packed weights are timed as in bfloat16" in text
    assert "int8" not in table(plan("E2B", 80))


@pytest.mark.parametrize("gb", [24, 60, 68])
def test_what_does_not_fit_is_said_with_numbers(gb: int) -> None:
    found = plan("31B", gb)
    memory = found.memory
    assert not memory.fits and not found.as_json()["fits"]
    needed = memory.weight_bytes + memory.activation_bytes + 2 * memory.sector_bytes
    assert memory.short_bytes == needed - memory.usable_bytes
    assert all(context.num_at_once == 0 for context in found.contexts)
    assert found.max_model_len == 0
    assert found.first_limit.name == ("weights" if gb < 66 else "memory")
    text = table(found)
    assert "DOES NOT FIT" in text and f"{memory.short_bytes / 1e9:,.1f} GB are missing" in text
    bigger = (memory.usable_bytes + memory.short_bytes) / 0.92 / 1e9
    assert plan("31B", bigger + 0.001).memory.fits


def test_pages_that_a_flag_asks_for_have_to_fit_too() -> None:
    assert plan("E2B", 20, kv_cache_memory_bytes=5 * 10**9).memory.fits
    found = plan("E2B", 20, kv_cache_memory_bytes=12 * 10**9)
    assert not found.memory.fits and found.first_limit.name == "memory"
    assert "--kv-cache-memory-bytes" in found.first_limit.moved_by


def test_the_first_limit_and_its_flag() -> None:
    found = plan("E2B", 80)
    assert found.first_limit.name == found.first_limit.moved_by == "--max-num-seqs"
    assert (at(found, 8192).num_at_once, at(found, 8192).stopped_by) == (128, "--max-num-seqs")
    raised = plan("E2B", 80, max_num_seqs=2000)
    assert raised.first_limit.name == "KV pages"
    assert "--gpu-memory-utilization" in raised.first_limit.moved_by
    assert at(raised, 8192).num_at_once == at(raised, 8192).num_fit < 2000
    cut = plan("31B", 80)  # pages for one sequence, but not of the whole length
    assert cut.first_limit.name == "model length" and cut.max_model_len < 262_144
    assert at(cut, 262_144).num_fit == 0 and at(cut, 131_072).num_fit == 1
    short = plan("31B", 100)
    assert short.first_limit.name == "KV pages" and short.max_model_len == 262_144
    tight = plan("31B", 80, kv_cache_memory_bytes=3 * 10**9)
    assert tight.first_limit.name == "model length" and 8192 < tight.max_model_len < 262_144
    refused = plan("31B", 80, kv_cache_memory_bytes=3 * 10**9, max_model_len=200_000)
    assert refused.max_model_len == 0 and "200,000 tokens need" in refused.first_limit.text
    assert "WOULD NOT START" in table(refused)


def test_a_length_that_the_model_has_not_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="--max-model-len 300000 is not between 2 and"):
        plan("31B", 10, max_model_len=300_000)
    with pytest.raises(ConfigError, match="more than the longest, 131072"):
        plan("E2B", 80, Workload(p50=10, p95=131_073))


def test_a_workload_lies_between_its_points() -> None:
    found = plan("31B", 100, Workload(p50=2048, p95=32_768), max_num_seqs=1000).workload
    assert found is not None
    assert found.num_p95_fit < found.num_mixed_fit <= found.num_p50_fit
    same = plan("31B", 100, Workload(p50=8192, p95=8192), max_num_seqs=1000)
    assert same.workload is not None
    assert same.workload.num_mixed_fit == at(same, 8192).num_fit


def test_lengths_of_a_mix_have_the_median_and_the_tail() -> None:
    lengths = Workload(p50=1000, p95=5000).lengths(10**9)
    assert lengths[9] < 1000 < lengths[10] and lengths[18] < 5000 < lengths[19]
    assert max(Workload(p50=1000, p95=5000).lengths(4000)) == 4000
    with pytest.raises(ConfigError, match="can't be below the median"):
        Workload(p50=10, p95=9)


def test_steps_name_what_bounds_them() -> None:
    found = plan("26B-A4B", 80)
    one, *_, most = found.decoding
    assert (one.num_seqs, most.num_seqs) == (1, at(found, 8192).num_at_once)
    assert one.bound == "weights" and most.bound == "experts"
    assert [step.num_tokens for step in found.prompts] == [8192, 32_768, 131_072]
    assert found.prompts[-1].bound == "compute"
    for step in (*found.decoding, *found.prompts):
        low, high = step.estimated_s
        assert step.floor_s <= low < high
    assert one.floor_s == pytest.approx(2.376e-3, rel=1e-3)  # as benchmarks/roofline.py has it


def test_json_has_everything_as_numbers() -> None:
    found = plan("26B-A4B", 80, Workload(p50=2000, p95=9000))
    report = json.loads(json.dumps(found.as_json()))
    assert report["fits"] is True and report["is_measured"] is False
    assert report["memory"]["kv_bytes"] == found.memory.kv_bytes
    assert [c["num_at_once"] for c in report["contexts"]] == [c.num_at_once for c in found.contexts]
    assert report["device"]["bytes_per_s"] == 3.35e12
    assert report["workload"]["p95_tokens"] == 9000


@pytest.mark.parametrize("size", ["E2B", "26B-A4B", "31B"])
def test_the_table_fits_a_screen_and_says_what_is_estimated(size: str) -> None:
    found = plan(size, 80, Workload(p50=2000, p95=9000))
    lines = table(found).splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 120
    text = "\n".join(lines)
    assert "computed, not measured" in text and "Estimated: 70% and 50%" in text
    for context in found.contexts:
        [line] = [line for line in lines if line.startswith(f"{context.num_tokens:,} ")]
        assert f" {context.num_at_once:,}  {context.stopped_by}" in line
    unknown = table(replace(found, device=None, decoding=(), prompts=()))
    assert "Floor" not in unknown


def test_five_lines_for_the_log() -> None:
    lines = gist(plan("31B", 100))
    assert len(lines) == 5 and all(line.startswith("plan: ") for line in lines)
    assert "31B" in lines[0] and "bfloat16" in lines[0] and "262,144" in lines[0]
    assert "61.40 GB" in lines[1] and "1.27 GB at 8,192" in lines[2] and "14.27 GB" in lines[2]
    assert "checkpoint" in lines[4] and "first limit" in lines[4]
