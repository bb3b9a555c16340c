"""The gate of `make kernels-aot`: reading machine code, judging it, comparing it with a table."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bezel.engine.model_config import ModelConfig

if importlib.util.find_spec("triton") is None:
    pytest.skip("there is no Triton for this system", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import kernels_aot as gate
from aot.launches import CONFIGS
from aot.machine_code import MachineCode, find_loops, gcn_number, parse_gcn, parse_sass
from aot.occupancy import ARCHITECTURES, blocks_at_once

ROOT = Path(__file__).resolve().parent.parent
NOT_LAUNCHED_BY_THE_ENGINE = {"rms_norm"}


def sass(*lines: str) -> MachineCode:
    """Code of instructions at addresses 0, 10, 20 … (hexadecimal), as nvdisasm prints them."""
    return parse_sass("\n".join(f"        /*{16 * i:04x}*/  {x} ;" for i, x in enumerate(lines)))


# The 64 registers of a tile and its spilled neighbours: one loop in another, the wait for a barrier
# moved behind the end, and the endless loop that follows every kernel.
NESTED = sass(
    "LDC R1, c[0x0][0x28]",
    "STL [R1], R4",  # 0x10, before the loops
    "LDG.E.U16 R7, desc[UR4][R8.64]",
    "LDL R2, [R1]",  # 0x30, head of the outer loop
    "LDGSTS.E.BYPASS.128 [R3], desc[UR4][R6.64]",  # 0x40, head of the inner one
    "@!P1 BRA 0xd0",
    "HMMA.16816.F32.BF16 R8, R4, R2, R8",
    "@P0 LDL.LU.64 R4, [R1+0x8]",
    "@P2 BRA 0x40",
    "STL.64 [R1], R4",
    "BRA.U UP0, 0x30",
    "EXIT",
    "BRA 0xc0",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R5",  # 0xd0
    "BRA 0x60",
    "NOP",
)


def test_loops_are_found_through_code_that_was_moved_away() -> None:
    loops = sorted(find_loops(NESTED.instructions), key=len)
    assert loops == [{4, 5, 6, 7, 8, 13, 14}, {3, 4, 5, 6, 7, 8, 9, 10, 13, 14}]


def test_a_jump_back_is_no_loop_if_its_target_is_reached_otherwise() -> None:
    code = sass("@P0 BRA 0x40", "HMMA.16816.F32 R0, R1, R2, R0", "LDL R1, [R2]", "EXIT", "BRA 0x10")
    assert find_loops(code.instructions) == []
    assert code.num_local_accesses(in_mma_loop=True) == 0


def test_a_jump_under_a_uniform_predicate_may_go_on() -> None:
    code = sass("HMMA.16816.F32 R0, R1, R2, R0", "BRA.U UP0, 0x30", "BRA 0x0", "EXIT")
    assert find_loops(code.instructions) == [{0, 1, 2}]


def test_only_the_innermost_loop_around_a_product_counts() -> None:
    assert NESTED.mma_loops == {4, 5, 6, 7, 8, 13, 14}
    assert NESTED.num_local_accesses(in_mma_loop=True) == 1
    assert NESTED.num_local_accesses(in_mma_loop=False) == 3
    assert NESTED.global_loads() == ["LDG.16", "LDGSTS.128"]
    assert NESTED.global_loads(in_mma_loop=True) == ["LDGSTS.128"]
    assert NESTED.mma == "HMMA"
    assert NESTED.num_instructions == 15


@pytest.mark.parametrize(
    ("instruction", "load"),
    [
        ("LDG.E R0, desc[UR4][R2.64]", ["LDG.32"]),
        ("@!P0 LDG.E.64.CONSTANT R0, desc[UR4][R2.64]", ["LDG.64"]),
        ("LDG.E.ENL2.256 R0, R4, desc[UR4][R2.64]", ["LDG.256"]),
        ("LDG.E.U8 R0, desc[UR4][R2.64]", ["LDG.8"]),
        ("LDGSTS.E.LTC128B [R1], desc[UR4][R2.64]", ["LDGSTS.32"]),
        ("UTMALDG.2D [UR8], [UR4]", ["UTMALDG"]),
        ("LDS.128 R0, [R1]", []),
        ("LDGDEPBAR", []),
    ],
)
def test_width_of_loads(instruction: str, load: list[str]) -> None:
    assert sass(instruction).global_loads() == load


GCN = """\
	.globl	attend                          ; -- Begin function attend
attend:                                 ; @attend
; %bb.0:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
	global_load_dwordx4 v[0:3], v4, s[0:1]
	s_cbranch_scc1 .LBB0_1
	s_branch .LBB0_3
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_ushort v5, v6, s[8:11], 0 offen ; 2-byte Folded Reload
	scratch_load_dword v7, off, s32
	v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
	s_cbranch_scc0 .LBB0_1
; %bb.2:
	scratch_store_dwordx4 off, v[0:3], s32
	s_branch .LBB0_3
.LBB0_2:
	s_branch .LBB0_1
.LBB0_3:
	s_endpgm
    .private_segment_fixed_size: 16
    .vgpr_count:     96
    .vgpr_spill_count: 4
"""


def test_gcn_is_read_like_sass() -> None:
    code = parse_gcn(GCN)
    assert find_loops(code.instructions) == [{4, 5, 6, 7}]
    assert code.mma == "v_mfma"
    assert code.num_local_accesses(in_mma_loop=True) == 1
    assert code.num_local_accesses(in_mma_loop=False) == 1
    assert code.global_loads() == ["load.128", "load.16"]
    assert gcn_number(GCN, "vgpr_count") == 96


@pytest.mark.parametrize(
    ("usage", "blocks"),
    [
        # 8 warps · 256 registers · 32 threads are all that a multiprocessor has.
        (("sm_80", 255, 8, 0), 1),
        (("sm_80", 32, 8, 0), 8),  # 64 warps
        (("sm_89", 32, 8, 0), 6),  # 48 warps
        (("sm_90", 16, 1, 0), 32),  # the most blocks
        # 168 · 32 = 21 · 256 registers a warp: 3 warps in each quarter, 12 in all.
        (("sm_90", 168, 4, 0), 3),
        (("sm_90", 96, 1, 0), 20),  # 5 warps in each quarter, though 21 would fit into the whole
        (("sm_90", 32, 4, 101 * 1024), 2),  # 2 · (101 + 1) of 228 KiB
        (("sm_90", 32, 4, 227 * 1024), 1),
        (("sm_89", 32, 4, 99 * 1024 + 1), 0),
        (("sm_100", 32, 4, 0, 256), 2),
        (("sm_100", 32, 4, 0, 1024), 0),
        (("gfx942", 128, 4, 0), 4),  # 4 waves in each of 4 SIMDs
        (("gfx942", 129, 4, 0), 3),
        (("gfx942", 24, 4, 20 * 1024), 3),
    ],
)
def test_blocks_at_once(usage: tuple[Any, ...], blocks: int) -> None:
    assert blocks_at_once(*usage) == blocks


ROW = gate.Row(
    kernel="decode_attention.attend",
    constants="BLOCK_N=32",
    arguments="-",
    architecture="sm_100",
    models="E2B 31B",
    steps="decode",
    warps=4,
    stages=3,
    registers=96,
    spilled_bytes=0,
    loop_spills=0,
    other_spills=0,
    shared_bytes=103_424,
    tensor_columns=0,
    blocks=2,
    mma="HMMA",
    loads="LDG.64 LDGSTS.128",
)
LOOP = sass(
    "LDGSTS.E.BYPASS.128 [R3], desc[UR4][R6.64]",
    "LDG.E.64 R3, desc[UR4][R6.64]",
    "HMMA.16816.F32.BF16 R8, R4, R2, R8",
    "@P0 BRA 0x0",
    "EXIT",
)
NARROW = sass(
    "LDG.E.U16 R3, desc[UR4][R6.64]", "HMMA.16816.F32 R8, R4, R2, R8", "@P0 BRA 0x0", "EXIT"
)


def test_a_good_kernel_has_no_faults() -> None:
    assert gate.faults(ROW, LOOP, has_dot=True) == []
    code = sass("LDG.E.U16 R3, desc[UR4][R6.64]", "EXIT")
    assert gate.faults(replace(ROW, mma=""), code, has_dot=False) == []


@pytest.mark.parametrize(
    ("change", "code", "fault"),
    [
        ({"loop_spills": 3}, LOOP, "3 loads and stores of spilled registers in its inner loop"),
        ({"shared_bytes": 232_449}, LOOP, "232449 bytes of shared memory, of 232448"),
        ({"tensor_columns": 576}, LOOP, "576 columns of tensor memory, of 512"),
        ({"blocks": 0}, LOOP, "not even one block fits on a multiprocessor"),
        ({"mma": ""}, LOOP, "a product of matrices without matrix instructions"),
        ({}, sass("BPT.TRAP 0x1", "EXIT"), "the compiler gave up and left a trap"),
        ({}, NARROW, "1 of 1 loads in its inner loop are narrow"),
    ],
)
def test_each_rule(change: dict[str, Any], code: MachineCode, fault: str) -> None:
    found = gate.faults(replace(ROW, **change), code, has_dot=True)
    assert found == [f"decode_attention.attend(BLOCK_N=32; -): {fault}"]


def run_compiling(source: str, folder: Path) -> str:
    """What a script prints in a process whose kernels are compiled, not interpreted."""
    script = folder / "script.py"
    script.write_text(source, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT / "benchmarks")}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


BAD_KERNELS = """
import sys
import torch, triton, triton.language as tl
import kernels_aot
from aot.driver import compiling_for

@triton.jit
def product(
    a_ptr, b_ptr, c_ptr, K, stride, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr
):
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    b_c = tl.zeros((M, N), tl.float32)
    for k in range(0, K, BLOCK_K):
        b_a = tl.load(a_ptr + o_m[:, None] * stride + k + o_k[None, :])
        b_b = tl.load(b_ptr + o_n[:, None] * stride + k + o_k[None, :])
        b_c = tl.dot(b_a, b_b.T, b_c)
    tl.store(c_ptr + o_m[:, None] * N + o_n[None, :], b_c)

def launch(architecture, M, N, BLOCK_K, K, num_warps):
    shapes = (M, K), (N, K), (M, N)
    a, b, c = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    with compiling_for(architecture) as driver:
        product[1,](a, b, c, K, K, M, N, BLOCK_K, num_warps=num_warps, num_stages=2)
    _, found = kernels_aot.judge(driver)
    print(*found or ["fine"], sep="; ")

launch("sm_90", 64, 64, 64, 4096, 4)
launch("sm_80", 64, 256, 32, 4096, 2)
launch("sm_90", 64, 64, 64, 4097, 4)
launch("sm_89", 128, 128, 256, 4096, 8)
"""


def test_faults_of_kernels_that_are_really_bad(tmp_path: Path) -> None:
    """Too large a tile, rows that 16 doesn't divide, too much shared memory."""
    output = run_compiling(BAD_KERNELS, tmp_path)
    fine, spilled, narrow, shared = output.splitlines()
    assert fine == "fine"
    assert "loads and stores of spilled registers in its inner loop" in spilled
    assert narrow.endswith("64 of 64 loads in its inner loop are narrow")
    assert "131072 bytes of shared memory, of 101376" in shared


def test_rows_that_differ_in_arguments_only_become_one() -> None:
    other = replace(ROW, arguments="~stride", models="12B", steps="prefill")
    spilling = replace(ROW, arguments="stride=1", other_spills=2)
    assert gate.merged([ROW, other, spilling]) == [
        replace(ROW, arguments="- | ~stride", models="E2B 12B 31B", steps="decode prefill"),
        spilling,
    ]


def test_the_table_can_be_read_back_and_keeps_architectures_in_order() -> None:
    rows = [replace(ROW, architecture=name, arguments="a=1, b") for name in ARCHITECTURES]
    assert gate.read_table(gate.write_table(reversed(rows))) == rows


def test_differences_from_the_table() -> None:
    gone, new = replace(ROW, constants="BLOCK_N=16"), replace(ROW, constants="BLOCK_N=64")
    changed = replace(ROW, registers=97, mma="")
    name = "decode_attention.attend"
    assert gate.differences([ROW], [ROW]) == []
    assert gate.differences([changed, new], [ROW, gone]) == [
        f"{name}(BLOCK_N=16; -): no longer launched",
        f"{name}(BLOCK_N=64; -): not in the table",
        f"{name}(BLOCK_N=32; -): registers was 96, is 97",
        f"{name}(BLOCK_N=32; -): mma was HMMA, is none",
    ]


def test_the_committed_table_covers_everything_and_breaks_no_rule() -> None:
    text = gate.TABLE.read_text(encoding="utf-8")
    rows = gate.read_table(text)
    assert gate.write_table(rows) == text
    assert len({row.key for row in rows}) == len(rows)
    assert {row.architecture for row in rows} == set(ARCHITECTURES)
    assert {model for row in rows for model in row.models.split()} == set(CONFIGS)
    multiplying = {name: set() for name in ARCHITECTURES}
    for row in rows:
        assert row.loop_spills == 0 and row.blocks > 0, row
        if row.mma:
            multiplying[row.architecture].add(row.kernel)
    assert multiplying["sm_90"]
    assert all(kernels == multiplying["sm_90"] for kernels in multiplying.values())


def test_the_committed_table_has_every_kernel_that_is_launched() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*.py")]
    launched = {
        name for source in sources for name in re.findall(r"^ +(\w+)\[.+\]\(", source, re.M)
    }
    rows = gate.read_table(gate.TABLE.read_text(encoding="utf-8"))
    names = {name.removeprefix("_").removesuffix("_kernel") for name in launched}
    assert names - {row.kernel.split(".")[1] for row in rows} == NOT_LAUNCHED_BY_THE_ENGINE


FLOAT32_LAUNCHES = """
import json
from triton import knobs
from aot.driver import compiling_for, multiplies
from aot.launches import launch_in_float32

for architecture in ("sm_80", "sm_89", "sm_90", "sm_100"):
    launches = set()

    def note(*, fn, compile, **_):
        function = fn.jit_function
        if multiplies(function):
            module, name = fn.module.rpartition(".")[2], fn.name.removeprefix("_")
            kernel = f"{module}.{name.removesuffix('_kernel')}"
            names = function.arg_names
            constants = {names[i]: value for (i,), value in compile["constants"].items()}
            options = {"warps": compile["num_warps"], "stages": compile["num_stages"]}
            launches.add(json.dumps([kernel, constants | options]))
        return True  # which keeps it from being compiled

    with compiling_for(architecture) as driver:
        knobs.runtime.jit_cache_hook = note
        failures = launch_in_float32(driver)
    print(json.dumps([sorted(launches), failures]))
"""


def test_float32_has_every_width_and_one_tile_for_all_of_nvidias(tmp_path: Path) -> None:
    """Which is why three models on one of these architectures tell enough."""
    first, *others = run_compiling(FLOAT32_LAUNCHES, tmp_path).splitlines()
    assert set(others) == {first}
    launches, failures = json.loads(first)
    assert failures == []

    def widths(kernel: str, constants: dict[str, Any]) -> tuple[str, ...]:
        names = ("VALUE_DIM", "HEAD_DIM", "TURNED", "NUM_TURNED")
        return (kernel, *(f"{name}={constants[name]}" for name in names if name in constants))

    in_float32 = [json.loads(launch) for launch in launches]
    rows = [row for row in gate.read_table(gate.TABLE.read_text(encoding="utf-8")) if row.mma]
    in_table = [(row.kernel, dict(x.split("=") for x in row.constants.split())) for row in rows]
    assert {widths(*launch) for launch in in_float32} == {widths(*launch) for launch in in_table}
    heights = [
        {int(constants["BLOCK_M"]) for kernel, constants in some if kernel.startswith("moe")}
        for some in (in_float32, in_table)
    ]
    assert [(min(some), max(some)) for some in heights] == [(16, 128), (16, 128)]


def test_models_are_those_of_the_published_configs() -> None:
    path = ROOT / "tests" / "engine" / "conftest.py"
    spec = importlib.util.spec_from_file_location("engine_conftest", path)
    assert spec is not None and spec.loader is not None
    published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)
    for name, config in published._REAL_CONFIGS.items():
        assert ModelConfig.from_hf(CONFIGS[name]) == ModelConfig.from_hf(config), name
