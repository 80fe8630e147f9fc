"""Reads Triton's intermediate form: the shapes of its matrix products, and the integers that its addresses are made of.

An offset in elements passes 2^31 in ordinary use, and a 32-bit product then overflows: the most frequent bug of kernels like
these. An index of a row or a token does not. So of the 32-bit products that take part in an address, those are safe that a 64-bit
product (by a stride) follows, unless they multiply a program id, and those whose factors are known when the kernel is compiled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_BOUNDED_LEAVES = ("arith.constant", "tt.make_range")
_CHANGES_NO_BOUND = re.compile(
    r"arith\.(addi|subi|muli|minsi|maxsi|remsi|divsi|extsi|extui|andi|shli|shrsi)|tt\.(splat|broadcast|expand_dims|reshape|trans)"
)
_LOADS = ("tt.load", "tt.descriptor_load")
_NAME = r"%[\w$.-]+"


@dataclass(eq=False)
class Value:
    """One operation and what it yields. `operands` of a value carried round a loop are its first value and its next one."""

    op: str
    line: str
    operands: list["Value"] = field(default_factory=list)

    @property
    def is_narrow(self) -> bool:
        """Whether it is made of 32-bit integers, by the type that ends the line."""
        return re.search(r"(?:x|[:\s])i32>?$", self.line.rstrip()) is not None


@dataclass(frozen=True)
class Dot:
    m: int
    n: int
    k: int
    dtype: str  # of the operands


def dots(ttir: str) -> list[Dot]:
    """Every tl.dot of the kernel."""
    shapes = re.findall(r"tt\.dot .*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>", ttir)
    return [Dot(int(m), int(n), int(k), dtype) for m, k, dtype, n in shapes]


def unsafe_addresses(ttir: str) -> list[str]:
    """A sentence for each 32-bit product that may overflow and reaches a pointer's offset."""
    found: dict[str, None] = {}
    for value in parse(ttir):
        if value.op == "tt.addptr":
            seen: set[tuple[Value, bool]] = set()
            pending = [(value.operands[1], False)]  # and whether a 64-bit product follows
            while pending:
                part, is_index = pending.pop()
                if (part, is_index) in seen:
                    continue
                seen.add((part, is_index))
                is_product = part.op in ("arith.muli", "arith.shli")
                if is_product and part.is_narrow and not all(map(is_bounded, part.operands)):
                    if not is_index or any(map(is_from_program_id, part.operands)):
                        found[f"a 32-bit product takes part in an address: {part.line.strip()}"] = None
                if part.op not in _LOADS:
                    pending += [(operand, is_index or (is_product and not part.is_narrow)) for operand in part.operands]
    return list(found)


def is_from_program_id(value: Value) -> bool:
    """Whether a value is computed from a program id in 32 bits: not by a load, nor in 64 bits and narrowed to an index after."""
    seen: set[Value] = set()
    pending = [value]
    while pending:
        part = pending.pop()
        if part.op == "tt.get_program_id":
            return True
        if part not in seen and part.op not in (*_LOADS, "arith.trunci"):
            seen.add(part)
            pending += part.operands
    return False


def is_bounded(value: Value) -> bool:
    """Whether a value's size is known when the kernel is compiled."""
    if value.op in _BOUNDED_LEAVES:
        return True
    return _CHANGES_NO_BOUND.fullmatch(value.op) is not None and all(map(is_bounded, value.operands))


def parse(ttir: str) -> list[Value]:
    """All values of the module, in order, with their operands."""
    reader = _Reader()
    for line in ttir.splitlines():
        reader.read(re.sub(r"\s*loc\(.*$", "", line).rstrip())
    return reader.values


@dataclass
class _Region:
    """An open brace: the names defined in it, and the operation whose body it is."""

    names: dict[str, Value]
    results: list[Value] = field(default_factory=list)
    carried: list[Value] = field(default_factory=list)
    is_while: bool = False
    is_after: bool = False


class _Reader:
    def __init__(self) -> None:
        self.values: list[Value] = []
        self.regions = [_Region({})]

    def read(self, line: str) -> None:
        text = line.strip()
        if text.startswith("}"):
            closed = self.regions.pop()
            if re.match(r"\} (else|do) \{", text):
                # The other half of an scf.if, or of an scf.while, whose block names its arguments by a line of its own.
                self.regions.append(_Region({}, closed.results, closed.carried, closed.is_while, is_after=closed.is_while))
            return
        if text.startswith("^"):
            self._block_arguments(text)
        elif "tt.func" in text:
            self.regions.append(_Region({name: self._define("argument", text) for name in re.findall(rf"({_NAME}):", text)}))
        elif text.startswith(("scf.yield", "scf.condition")):
            self._yield(text)
        else:
            self._operation(text)

    def _define(self, op: str, line: str, operands: list[Value] | None = None) -> Value:
        value = Value(op, line, operands or [])
        self.values.append(value)
        return value

    def _lookup(self, name: str) -> Value:
        for region in reversed(self.regions):
            if name in region.names:
                return region.names[name]
        return Value("unknown", name)

    def _operands(self, text: str) -> list[Value]:
        return [self._lookup(name) for name in re.findall(rf"{_NAME}(?:#\d+)?", text)]

    def _operation(self, text: str) -> None:
        match = re.match(rf"(?:({_NAME})(?::(\d+))? = )?\"?([a-z_]+\.[\w.]+)\"?(.*)$", text)
        if match is None:
            if text.endswith("{"):
                self.regions.append(_Region({}))
            return
        name, count, op, rest = match.groups()
        carried = dict(re.findall(rf"({_NAME}) = ({_NAME}(?:#\d+)?)", rest)) if op in ("scf.for", "scf.while") else {}
        bounds = rest.split("iter_args")[0] if op == "scf.for" else rest
        operands = self._operands(re.sub(rf"{_NAME} = ", "", bounds))
        results = [self._define(op, text, list(operands)) for _ in range(int(count or 1))]
        if name is not None:
            here = self.regions[-1].names
            here[name] = results[0]
            here.update({f"{name}#{place}": result for place, result in enumerate(results)})
        if text.endswith("{"):
            arguments = {inner: self._define("carried", text, [self._lookup(first)]) for inner, first in carried.items()}
            region = _Region(dict(arguments), results, list(arguments.values()), is_while=op == "scf.while")
            if op == "scf.for":
                induction = re.match(rf"\s*({_NAME}) =", rest)
                region.names[induction.group(1)] = self._define("induction", text, operands)
                region.carried = [value for inner, value in arguments.items() if inner != induction.group(1)]
            self.regions.append(region)

    def _block_arguments(self, text: str) -> None:
        region = self.regions[-1]
        names = re.findall(rf"({_NAME}):", text)
        if region.is_after:
            # The results of the loop hold what scf.condition passed on, which is also what the second block receives.
            region.names.update(dict(zip(names, region.results)))
        else:
            region.names.update({name: self._define("argument", text) for name in names})

    def _yield(self, text: str) -> None:
        region = self.regions[-1]
        operands = self._operands(text.split(":")[0])
        if text.startswith("scf.condition"):
            operands = operands[1:]
            targets = [region.results]
        elif region.is_while:
            targets = [region.carried]
        else:
            targets = [region.results, region.carried]
        for target in targets:
            for value, operand in zip(target, operands):
                value.operands.append(operand)
