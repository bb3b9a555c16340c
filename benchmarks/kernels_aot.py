"""Compiles every kernel launch of every model for every architecture, without a GPU, and judges it.

`make kernels-aot` fails if a kernel breaks one of the rules in `faults`, or if the compiler makes
something else of it than kernels_aot.csv says; `ARGS=--update` writes that table anew. What its
columns mean, and what this can't tell, stands in docs/kernels.md.
"""

import argparse
import csv
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from aot.driver import COMPILE_ALL, CompilingDriver, Kernel, compiling_for
from aot.launches import CONFIGS, launch_everything
from aot.machine_code import (
    MachineCode,
    disassemble,
    gcn_number,
    parse_gcn,
    registers_and_stack,
)

TABLE = Path(__file__).with_suffix(".csv")


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a multiprocessor has, in bytes, warps, blocks and columns of tensor memory.

    From "Technical Specifications per Compute Capability" in NVIDIA's CUDA C++ Programming Guide,
    and from AMD's CDNA 3 instruction set architecture.
    """

    shared_bytes: int
    max_block_shared_bytes: int
    max_warps: int
    max_blocks: int
    max_tensor_columns: int = 0


KIB = 1024
ARCHITECTURES = {
    "sm_80": Architecture(164 * KIB, 163 * KIB, 64, 32),
    "sm_89": Architecture(100 * KIB, 99 * KIB, 48, 24),
    "sm_90": Architecture(228 * KIB, 227 * KIB, 64, 32),
    "sm_100": Architecture(228 * KIB, 227 * KIB, 64, 32, max_tensor_columns=512),
    "sm_120": Architecture(100 * KIB, 99 * KIB, 48, 24),
    "gfx942": Architecture(64 * KIB, 64 * KIB, 32, 32),
}
TRAP_INSTRUCTIONS = 64  # a kernel of fewer that can trap does nothing else


def blocks_at_once(
    architecture: str, registers: int, warps: int, shared_bytes: int, tensor_columns: int = 0
) -> int:
    """Blocks of a kernel that one multiprocessor holds; 0 if not even one fits.

    A quarter of a multiprocessor has a quarter of the registers: on NVIDIA 16,384, given to warps
    of 32 threads in units of 256; on AMD 512 for each of a wave's lanes, in units of 8.
    """
    limits, is_amd = ARCHITECTURES[architecture], architecture.startswith("gfx")
    per_quarter = 512 // _up_to(registers, 8) if is_amd else 16_384 // _up_to(32 * registers, 256)
    blocks = min(min(4 * per_quarter, limits.max_warps) // warps, limits.max_blocks)
    # NVIDIA's system software keeps a KiB for itself for each block.
    block_bytes = shared_bytes if is_amd else _up_to(shared_bytes, 128) + KIB
    if block_bytes:
        blocks = min(blocks, limits.shared_bytes // block_bytes)
    if tensor_columns:
        blocks = min(blocks, limits.max_tensor_columns // tensor_columns)
    return blocks


def _up_to(number: int, unit: int) -> int:
    return -(-number // unit) * unit


@dataclass(frozen=True, slots=True, order=True)
class Row:
    """What the compiler made of one specialisation of a kernel on one architecture."""

    kernel: str
    constants: str
    arguments: str  # what the compiler was told of them, in each specialisation that comes to this
    architecture: str
    models: str
    steps: str
    warps: int
    stages: int
    registers: int
    spilled_bytes: int  # of a thread's own memory
    loop_spills: int  # loads and stores of it in loops that multiply matrices
    other_spills: int
    shared_bytes: int
    tensor_columns: int
    blocks: int  # on a multiprocessor at once
    mma: str
    loads: str  # from global memory, by kind and bits

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.kernel, self.constants, self.arguments, self.architecture

    def __str__(self) -> str:
        return f"{self.architecture} {self.kernel}({self.constants}; {self.arguments})"


def merged(rows: Iterable[Row]) -> list[Row]:
    """One row for all specialisations that differ in their arguments and users only."""
    groups: dict[Row, list[Row]] = {}
    for row in rows:
        groups.setdefault(replace(row, arguments="", models="", steps=""), []).append(row)
    return [
        replace(
            same,
            arguments=" | ".join(sorted(row.arguments for row in group)),
            models=_words(row.models for row in group),
            steps=_words(row.steps for row in group),
        )
        for same, group in groups.items()
    ]


def _words(texts: Iterable[str]) -> str:
    """All their words once, the models in the order of their size."""
    words = {word for text in texts for word in text.split()}
    return " ".join([x for x in CONFIGS if x in words] + sorted(words - CONFIGS.keys()))


def _constants_and_arguments(source: Any) -> tuple[str, str]:
    """Declared constants, then arguments: `x=1` is compiled in, `~x` is no multiple of 16."""
    constants, arguments = [], []
    for i, (name, kind) in enumerate(source.signature.items()):
        if (i,) in source.constants:
            into = constants if source.fn.params[i].is_constexpr else arguments
            into.append(f"{name}={source.constants[i,]}")
        elif kind[0] in "*i" and ["tt.divisibility", 16] not in source.attrs.get((i,), []):
            arguments.append(f"~{name}")
    return " ".join(constants), " ".join(arguments) or "-"


def measure(architecture: str) -> tuple[list[Row], list[str]]:
    """Compile all for one architecture: the rows, and what is wrong with them."""
    with compiling_for(architecture) as driver:
        failures = launch_everything(driver)
    rows, found = judge(driver)
    return rows, failures + found


def judge(driver: CompilingDriver) -> tuple[list[Row], list[str]]:
    """The rows of all that was launched, and what is wrong with them."""
    architecture = driver.architecture
    kernels = [kernel for kernel in driver.kernels.values() if kernel.users]
    rows, found = [], []
    for kernel, code in zip(kernels, _machine_codes(kernels, architecture), strict=True):
        row = _row(kernel, code, architecture)
        rows.append(row)
        found += faults(row, code, has_dot="tt.dot" in kernel.files["ttir"].read_text())
    return merged(rows), found


def _machine_codes(kernels: Sequence[Kernel], architecture: str) -> list[MachineCode]:
    if architecture.startswith("gfx"):
        return [parse_gcn(kernel.files["amdgcn"].read_text()) for kernel in kernels]
    return disassemble([kernel.files["cubin"].read_bytes() for kernel in kernels], architecture)


def _row(kernel: Kernel, code: MachineCode, architecture: str) -> Row:
    metadata, function = kernel.metadata, kernel.source.fn
    module = function.__module__.rpartition(".")[2]
    constants, arguments = _constants_and_arguments(kernel.source)
    if architecture.startswith("gfx"):
        assembly = kernel.files["amdgcn"].read_text()
        registers = gcn_number(assembly, "vgpr_count")
        stack = gcn_number(assembly, "private_segment_fixed_size")
    else:
        registers, stack = registers_and_stack(kernel.files["cubin"])
    warps, shared = metadata["num_warps"], metadata["shared"]
    columns = metadata.get("tmem_size") or 0
    return Row(
        kernel=f"{module}.{function.__name__.removeprefix('_').removesuffix('_kernel')}",
        constants=constants,
        arguments=arguments,
        architecture=architecture,
        models=_words(model for model, _ in kernel.users),
        steps=_words(step for _, step in kernel.users),
        warps=warps,
        stages=metadata["num_stages"],
        registers=registers,
        spilled_bytes=stack,
        loop_spills=code.num_local_accesses(in_mma_loop=True),
        other_spills=code.num_local_accesses(in_mma_loop=False),
        shared_bytes=shared,
        tensor_columns=columns,
        blocks=blocks_at_once(architecture, registers, warps, shared, columns),
        mma=code.mma,
        loads=" ".join(sorted(set(code.global_loads()))),
    )


def faults(row: Row, code: MachineCode, *, has_dot: bool) -> list[str]:
    """What no kernel may have, in words."""
    limits = ARCHITECTURES[row.architecture]
    found = []
    if row.loop_spills:
        found.append(f"{row.loop_spills} loads and stores of spilled registers in its inner loop")
    if row.shared_bytes > limits.max_block_shared_bytes:
        found.append(
            f"{row.shared_bytes} bytes of shared memory, of {limits.max_block_shared_bytes}"
        )
    if row.tensor_columns > limits.max_tensor_columns:
        found.append(
            f"{row.tensor_columns} columns of tensor memory, of {limits.max_tensor_columns}"
        )
    if not row.blocks:
        found.append("not even one block fits on a multiprocessor")
    if code.has_trap and code.num_instructions < TRAP_INSTRUCTIONS:
        found.append("the compiler gave up and left a trap")
    if has_dot and not row.mma:
        found.append("a product of matrices without matrix instructions")
    loads = code.global_loads(in_mma_loop=True)
    num_narrow = sum(load in ("LDG.16", "load.16", "LDGSTS.32", "LDGSTS.64") for load in loads)
    if 2 * num_narrow > len(loads):
        found.append(f"{num_narrow} of {len(loads)} loads in its inner loop are narrow")
    return [f"{row}: {fault}" for fault in found]


def differences(rows: Iterable[Row], table: Iterable[Row]) -> list[str]:
    """How the rows differ from the table, a line each."""
    new, old = {row.key: row for row in rows}, {row.key: row for row in table}
    found = [f"{old[key]}: no longer launched" for key in sorted(old.keys() - new.keys())]
    found += [f"{new[key]}: not in the table" for key in sorted(new.keys() - old.keys())]
    for key in sorted(new.keys() & old.keys()):
        for column in (field.name for field in fields(Row)):
            was, now = getattr(old[key], column), getattr(new[key], column)
            if was != now:
                found.append(f"{new[key]}: {column} was {was or 'none'}, is {now or 'none'}")
    return found


def write_table(rows: Iterable[Row]) -> str:
    """The rows as CSV, those of one kernel together, architectures in the order of their age."""
    order = list(ARCHITECTURES)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Row))
    for row in sorted(rows, key=lambda r: (*r.key[:3], order.index(r.architecture))):
        writer.writerow(astuple(row))
    return text.getvalue()


def read_table(text: str) -> list[Row]:
    return [
        Row(**{f.name: f.type(line[f.name]) for f in fields(Row)})
        for line in csv.DictReader(io.StringIO(text))
    ]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the table anew")
    parser.add_argument("architectures", nargs="*", help="all, unless some are named")
    options = parser.parse_args(arguments)
    names = options.architectures or list(ARCHITECTURES)
    names.sort(key=lambda name: name not in COMPILE_ALL)  # these take longest
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        # For the workers, which import Triton anew: it must compile, and all of it.
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1"}
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
            measured = list(pool.map(measure, names))
    rows = [row for own, _ in measured for row in own]
    reasons = [fault for _, own in measured for fault in own]
    table = read_table(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else []
    if options.update:
        others = [row for row in table if row.architecture not in names]
        TABLE.write_text(write_table([*rows, *others]), encoding="utf-8")
    else:
        reasons += differences(rows, [row for row in table if row.architecture in names])
    print(f"{len(rows)} kernels for {', '.join(names)} in {time.monotonic() - started:.0f} s")
    print("\n".join(reasons), end="\n" if reasons else "")
    return bool(reasons)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
