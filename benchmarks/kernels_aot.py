"""Compiles every kernel launch of every model for every architecture, without a GPU, and judges it.

`make kernels-aot` fails if a kernel breaks one of the rules in `faults`, or if the compiler makes
something else of it than kernels_aot.csv says; `ARGS=--update` writes that table anew. What its
columns mean, and what this can't tell, stands in docs/kernels.md. In float32, which is for
comparisons, kernels have to compile and to fit; how well they do is of no concern, and the table
doesn't have them.
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
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from aot.driver import COMPILE_ALL, COMPILE_FLOAT32, CompilingDriver, Kernel, compiling_for
from aot.launches import CONFIGS, launch_everything, launch_in_float32
from aot.machine_code import (
    MachineCode,
    disassemble,
    gcn_number,
    parse_gcn,
    registers_and_stack,
)
from aot.occupancy import ARCHITECTURES, blocks_at_once

TABLE = Path(__file__).with_suffix(".csv")
TRAP_INSTRUCTIONS = 64  # a kernel of fewer that can trap does nothing else


@dataclass(frozen=True, slots=True)
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
        return f"{self.kernel}({self.constants}; {self.arguments})"


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


def _constants_and_arguments(source: Any, is_amd: bool) -> tuple[str, str]:
    """Declared constants, then arguments: `x=1` is compiled in, `~x` may be no multiple of 16, and
    x in `x>2GiB` is too large for AMD's 32-bit offsets."""
    constants, arguments = [], []
    for i, (name, kind) in enumerate(source.signature.items()):
        parameter, known = source.fn.params[i], source.attrs.get((i,), [])
        if (i,) in source.constants:
            into = constants if parameter.is_constexpr else arguments
            into.append(f"{name}={source.constants[i,]}")
        elif parameter.do_not_specialize or parameter.do_not_specialize_on_alignment:
            continue  # the kernel has asked for one specialisation
        elif kind[0] in "*i" and ["tt.divisibility", 16] not in known:
            arguments.append(f"~{name}")
        elif is_amd and kind[0] == "*" and ["tt.pointer_range", 32] not in known:
            arguments.append(f"{name}>2GiB")
    return " ".join(constants), " ".join(arguments) or "-"


def measure(architecture: str) -> tuple[list[Row], list[str]]:
    """Compile all for one architecture: the rows, and what is wrong with them or in float32."""
    # One driver for both, as Triton would launch with the first what it has compiled for it.
    with compiling_for(architecture) as driver:
        failures = launch_everything(driver)
        rows, found = judge(driver)
        judged = set(driver.kernels)
        if architecture in COMPILE_FLOAT32:
            failures += launch_in_float32(driver)
    for key in driver.kernels.keys() - judged:
        row = _row(driver.kernels[key], MachineCode([]), architecture)
        found += [f"{row} in float32: {fault}" for fault in memory_faults(row)]
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
    is_amd = architecture.startswith("gfx")
    constants, arguments = _constants_and_arguments(kernel.source, is_amd)
    if is_amd:
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
    found = memory_faults(row)
    if row.loop_spills:
        found.append(f"{row.loop_spills} loads and stores of spilled registers in its inner loop")
    if code.has_trap and code.num_instructions < TRAP_INSTRUCTIONS:
        found.append("the compiler gave up and left a trap")
    if has_dot and not row.mma:
        found.append("a product of matrices without matrix instructions")
    loads = code.global_loads(in_mma_loop=True)
    num_narrow = sum(load in ("LDG.16", "load.16", "LDGSTS.32", "LDGSTS.64") for load in loads)
    if 2 * num_narrow > len(loads):
        found.append(f"{num_narrow} of {len(loads)} loads in its inner loop are narrow")
    return [f"{row}: {fault}" for fault in found]


def memory_faults(row: Row) -> list[str]:
    """What of a multiprocessor's memory a block takes too much of."""
    limits, found = ARCHITECTURES[row.architecture], []
    most_shared, most_columns = limits.max_block_shared_bytes, limits.max_tensor_columns
    if row.shared_bytes > most_shared:
        found.append(f"{row.shared_bytes} bytes of shared memory, of {most_shared}")
    if row.tensor_columns > most_columns:
        found.append(f"{row.tensor_columns} columns of tensor memory, of {most_columns}")
    if not row.blocks:
        found.append("not even one block fits on a multiprocessor")
    return found


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
    options = parser.parse_args(arguments)
    names = sorted(ARCHITECTURES, key=lambda name: name not in COMPILE_ALL)  # these take longest
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        # For the workers, which import Triton anew: it must compile, and all of it.
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1"}
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
            measured = list(pool.map(measure, names))
    table = {name: [] for name in ARCHITECTURES}
    if TABLE.exists():
        for row in read_table(TABLE.read_text(encoding="utf-8")):
            table[row.architecture].append(row)
    where: dict[str, list[str]] = {}
    for name, (rows, reasons) in zip(names, measured, strict=True):
        news = [] if options.update else differences(rows, table[name])
        table[name] = rows
        for reason in (*reasons, *news):
            where.setdefault(reason, []).append(name)
    if options.update:
        TABLE.write_text(write_table(chain(*table.values())), encoding="utf-8")
    num_rows, seconds = sum(len(rows) for rows, _ in measured), time.monotonic() - started
    print(f"{num_rows} rows for {len(names)} architectures in {seconds:.0f} s")
    for reason, architectures in where.items():
        print(f"{', '.join(architectures)}: {reason}")
    return bool(where)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
