"""Reads NVIDIA machine code: which instructions a kernel holds, and how many run for each element."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_RESOURCES = re.compile(r"Function \w+:\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with its suffixes: "HGMMA.64x128x16.F32.BF16"
    operands: str


@dataclass(frozen=True)
class Code:
    """One kernel for one GPU. `stack` is in bytes a thread: spilled registers and arrays that do not fit into registers."""

    instructions: list[Instruction]
    registers: int
    stack: int

    def count(self, *opcodes: str) -> int:
        return count(self.instructions, *opcodes)

    def main_loop(self) -> list[Instruction]:
        """The body of the longest innermost loop, or [] where the code runs straight through."""
        loops = []
        for place, instruction in enumerate(self.instructions):
            target = re.search(r"0x([0-9a-f]+)", instruction.operands) if instruction.name.split(".")[0] == "BRA" else None
            if target and int(target.group(1), 16) < instruction.address:
                start = next(i for i, other in enumerate(self.instructions) if other.address >= int(target.group(1), 16))
                loops.append((start, place + 1))
        innermost = [loop for loop in loops if not any(o != loop and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)]
        if not innermost:
            return []
        start, end = max(innermost, key=lambda loop: loop[1] - loop[0])
        return self.instructions[start:end]


def count(instructions: list[Instruction], *opcodes: str) -> int:
    """How many instructions have one of these opcodes; "MUFU" takes in MUFU.EX2, "MUFU.EX2" does not take in MUFU.SIN."""
    return sum(any(i.name == opcode or i.name.startswith(opcode + ".") for opcode in opcodes) for i in instructions)


def parse(listing: str, resources: str) -> Code:
    """From what cuobjdump prints with -sass and with -res-usage. Padding after the last exit is left out."""
    instructions = [Instruction(int(m[1], 16), m[2], m[3].strip()) for m in map(_LINE.match, listing.splitlines()) if m]
    while instructions and (instructions[-1].name == "NOP" or _is_self_loop(instructions[-1])):
        instructions.pop()
    usage = _RESOURCES.search(resources)
    if not instructions or usage is None:
        raise ValueError(f"cuobjdump's output is not understood; it begins {listing[:200]!r} and {resources[:200]!r}")
    registers, stack, local = map(int, usage.groups())
    return Code(instructions, registers, stack + local)


def _is_self_loop(instruction: Instruction) -> bool:
    return instruction.name == "BRA" and instruction.operands.replace("`", "").strip() == f"{instruction.address:#x}"


def disassemble(cubin: bytes, cuobjdump: Path) -> Code:
    """The code in a cubin of one kernel. `cuobjdump` is the program's path: Triton's wheel carries it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing, resources = (
            subprocess.run([cuobjdump, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    return parse(listing, resources)
