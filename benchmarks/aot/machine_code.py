"""Reading machine code: instructions, loops, and what a kernel does in them.

NVIDIA's comes as a binary, which `nvdisasm` of Triton's own package turns into text; AMD's compiler
leaves assembler text behind. Both become a list of `Instruction`s, whose jumps show the loops:

    0  load
    1  copy       ◄─┐     4 jumps back to 1, and there is no way to 4 but through 1: a loop,
    2  HMMA         │     with a matrix product in it
    3  @P0 jump 6   │
    4  jump 1     ──┘     6 jumps back as well, but 4 can be reached without it: part of the loop,
    5  exit               moved out of the way by the compiler
    6  jump 4
"""

import re
import struct
import subprocess
import tempfile
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

from triton import knobs

_MMA = re.compile(r"HMMA|HGMMA|UTCHMMA|v_mfma")
_LOCAL_MEMORY = re.compile(r"(LDL|STL|scratch_load|scratch_store)(\b|_)")

# LDG loads from global memory into registers, LDGSTS into shared memory without waiting for it.
_SASS_LOAD = re.compile(r"(LDGSTS|LDG)\.")
_SASS_BITS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
_SASS_TENSOR_LOAD = re.compile(r"UTMALDG|UBLKCP")
_GCN_LOAD = re.compile(r"(?:global|buffer)_load_(dwordx4|dwordx2|dword|[us]?short|[us]byte)")
_GCN_BITS = {"dwordx4": 128, "dwordx2": 64, "dword": 32}

_SASS_LINE = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?"
    r"(?P<name>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;"
)
_GCN_LINE = re.compile(
    r"^(?:(?P<label>\.L\w+):|\t(?P<name>[a-z]\w+)(?:\s+(?P<operands>[^;]*?))?)\s*(?:;.*)?$"
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """`target` is the index of the instruction that it jumps to or may jump to."""

    name: str
    target: int | None = None
    goes_on: bool = True  # may be followed by the next one


@dataclass(frozen=True)
class MachineCode:
    """The instructions of one kernel."""

    instructions: Sequence[Instruction]

    @property
    def num_instructions(self) -> int:
        return sum(x.name != "NOP" for x in self.instructions)

    @property
    def mma(self) -> str:
        """The kinds of matrix product, such as `HGMMA`; empty without any."""
        found = {match[0] for x in self.instructions if (match := _MMA.match(x.name))}
        return " ".join(sorted(found))

    @property
    def has_trap(self) -> bool:
        return any(x.name.startswith(("BPT", "s_trap")) for x in self.instructions)

    def num_local_accesses(self, *, in_mma_loop: bool) -> int:
        """Loads and stores of a thread's own memory: what registers had no room for."""
        return sum(
            bool(_LOCAL_MEMORY.match(x.name)) and (i in self.mma_loops) == in_mma_loop
            for i, x in enumerate(self.instructions)
        )

    def global_loads(self, *, in_mma_loop: bool = False) -> list[str]:
        """Each load from global memory, as `LDGSTS.128` with the bits that a thread gets."""
        return [
            load
            for i, x in enumerate(self.instructions)
            if (load := _global_load(x.name)) and (i in self.mma_loops or not in_mma_loop)
        ]

    @cached_property
    def mma_loops(self) -> frozenset[int]:
        """Indices of the instructions of innermost loops that multiply matrices."""
        found: set[int] = set()
        loops = sorted(find_loops(self.instructions), key=len)
        for i, x in enumerate(self.instructions):
            if _MMA.match(x.name) and i not in found:
                found |= next((loop for loop in loops if i in loop), set())
        return frozenset(found)


def _global_load(name: str) -> str | None:
    if _SASS_TENSOR_LOAD.match(name):
        return name.split(".")[0]
    if match := _SASS_LOAD.match(name):
        bits = next((_SASS_BITS[part] for part in name.split(".") if part in _SASS_BITS), 32)
        return f"{match[1]}.{bits}"
    if match := _GCN_LOAD.match(name):
        return f"load.{_GCN_BITS.get(match[1], 16 if 'short' in match[1] else 8)}"
    return None


def find_loops(instructions: Sequence[Instruction]) -> list[set[int]]:
    """Natural loops: a jump back to a block that dominates it, and all on the way to the jump."""
    blocks, after = _control_flow(instructions)
    before: dict[int, list[int]] = {block: [] for block in blocks}
    for block, successors in after.items():
        for successor in successors:
            before[successor].append(block)
    dominators = _dominators(before)
    loops: dict[int, set[int]] = {}
    for block, successors in after.items():
        for head in successors:
            if head not in dominators[block]:
                continue
            loop, waiting = loops.setdefault(head, {head}), [block]
            while waiting:
                member = waiting.pop()
                if member not in loop:
                    loop.add(member)
                    waiting += before[member]
    return [{i for member in loop for i in blocks[member]} for loop in loops.values()]


def _control_flow(
    instructions: Sequence[Instruction],
) -> tuple[dict[int, range], dict[int, list[int]]]:
    """Stretches that are entered at the first and left at the last instruction, and which follow
    which; both by the index of their first instruction."""
    jumps = [i for i, x in enumerate(instructions) if x.target is not None or not x.goes_on]
    targets = {x.target for x in instructions if x.target is not None}
    starts = sorted({0, len(instructions), *targets, *(i + 1 for i in jumps)})
    blocks = {start: range(start, end) for start, end in pairwise(starts)}
    after: dict[int, list[int]] = {}
    waiting = [0]
    while waiting:  # only what can be reached
        start = waiting.pop()
        if start not in after:
            last = instructions[blocks[start][-1]]
            successors = [blocks[start].stop if last.goes_on else None, last.target]
            after[start] = [x for x in successors if x is not None and x in blocks]
            waiting += after[start]
    return {start: blocks[start] for start in sorted(after)}, after


def _dominators(before: dict[int, list[int]]) -> dict[int, set[int]]:
    """For each block those that every way to it leads through, itself included."""
    everything = set(before)
    dominators = dict.fromkeys(before, everything) | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(everything - {0}):
            found = set.intersection(*(dominators[x] for x in before[block])) | {block}
            changed |= found != dominators[block]
            dominators[block] = found
    return dominators


def disassemble(cubins: Sequence[bytes], architecture: str) -> list[MachineCode]:
    """The code of each cubin.

    All go through one `nvdisasm`, which takes a third of a second to start: addresses in jumps are
    relative, so the code of several kernels may stand in one row.
    """
    codes = [_text_section(cubin) for cubin in cubins]
    raw_name = architecture.replace("sm_", "SM") + ("a" if int(architecture[3:]) >= 90 else "")
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "--binary", raw_name, "--no-dataflow", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = _sass_lines(listing)
    addresses = [int(line["address"], 16) for line in lines]
    ends = accumulate(map(len, codes))
    cuts = [0, *(bisect_left(addresses, end) for end in ends)]
    return [_sass(lines[first:last]) for first, last in pairwise(cuts)]


def parse_sass(listing: str) -> MachineCode:
    """From the text of `nvdisasm` or `cuobjdump`, for one kernel."""
    return _sass(_sass_lines(listing))


def _sass_lines(listing: str) -> list[re.Match[str]]:
    return [match for match in map(_SASS_LINE.match, listing.splitlines()) if match]


def _sass(lines: Sequence[re.Match[str]]) -> MachineCode:
    index = {int(line["address"], 16): i for i, line in enumerate(lines)}
    instructions = []
    for line in lines:
        kind = line["name"].split(".")[0]
        target, always = None, line["predicate"] is None
        if kind == "BRA":
            *conditions, address = line["operands"].split(",")
            target = index.get(int(address, 16))
            always = always and not conditions
        goes_on = not (always and kind in ("BRA", "EXIT", "RET"))
        instructions.append(Instruction(line["name"], target, goes_on))
    return MachineCode(instructions)


def _text_section(cubin: bytes) -> bytes:
    """Machine code of the only kernel in an ELF file of 64 bits, little endian."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(number)]
    for name, _, _, _, offset, num_bytes in sections:
        if cubin.startswith(b".text.", sections[names][4] + name):
            return cubin[offset : offset + num_bytes]
    raise AssertionError("a cubin without code")


def registers_and_stack(cubin: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of its own memory."""
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert match, report
    return int(match[1]), int(match[2])


def parse_gcn(assembly: str) -> MachineCode:
    """From the assembler text of one kernel."""
    labels: dict[str, int] = {}
    lines = []
    for match in map(_GCN_LINE.match, assembly.splitlines()):
        if match and match["label"]:
            labels[match["label"]] = len(lines)
        elif match:
            lines.append(match)
    instructions = []
    for line in lines:
        name, target = line["name"], None
        if name.startswith(("s_branch", "s_cbranch")):
            target = labels[line["operands"]]
        instructions.append(Instruction(name, target, name not in ("s_branch", "s_endpgm")))
    return MachineCode(instructions)


def gcn_number(assembly: str, name: str) -> int:
    """A number from the metadata of the only kernel, such as `vgpr_count`."""
    match = re.search(rf"\.{name}:\s+(\d+)", assembly)
    assert match, name
    return int(match[1])
