"""Mutation testing: are the everyday tests of the Triton kernels able to fail? Makes one small fault at a time in a private copy of
the package and runs that copy's tests on it.

    python tests/kernels/mutants.py --cases 60 --seed 0 --results FILE     a sample over all kernels; the same command goes on
                                                                           where FILE ends, and tries its survivors again

Mutants come from the syntax trees of every @triton.jit function: masks widened, comparisons shifted, strides dropped, casts left
out, offsets moved, operators exchanged, constants off by one. Left out is what no run without a GPU executes (what follows
`if INTERPRET: return`, what only `HAS_FAST_SINE` chooses; the gate compiles it), numbers that give a shape or an axis, for which
every change is an error of Triton's own, `narrow` before a store, which a GPU does by itself, and casts to int32, which save time
alone.

A mutant is killed by a test that fails, crashes or takes many times as long as without the mutant. The tests are the everyday
ones of the mutant's operation, cheapest first; then lints and guard pages; a cast that survived them must also pass the gate,
because the interpreter's integers and floats are not a GPU's.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import kernel_list

ROOT = Path(__file__).parents[2]
PACKAGE = Path("kernels/torch-ext/psann_kernels")

# Mutants that compute the same, found by looking at survivors: name and reason. Those of the name are never drawn.
_UNUSED = "what masked lanes load is multiplied by another masked 0 and then not stored"
_ROW = "rows that do not exist meet no other and are not stored"
_EXISTS = "a tile's first query exists, or there were no tile"
_COLUMN = "columns past the last feature meet no other and are not stored"
_SCALE = "scales of masked heads are not used"
EQUIVALENT: dict[str, str] = {
    "float8_triton.py from_float8 constant: 0x7E00 -> 32257": "another NaN",
    "float8_triton.py to_float8 constant: 448.0 -> 449.0": "449 is rounded to 448 too",
    "float8_triton.py to_float8 comparison: size < 0.015625 -> (size <= 0.015625)": (
        "both ways give the least normal number its bits"
    ),
    "float8_triton.py to_float8 cast: (code | ((y.to(tl.uint32, bitcast=True) >> 31) << 7)).to(tl.uint8)"
    " -> (code | y.to(tl.uint32, bitcast=True) >> 31 << 7)": "the store casts",
    "paged_attention_triton.py _append_kernel constant: 1.0 -> 2.0": _SCALE,
    "paged_attention_triton.py _append_kernel constant: 1.0 -> 2.0 (2)": _SCALE,
    "paged_attention_triton.py _load_cached constant: 0 -> 1": (
        "masked keys have probability 0, masked columns meet a 0 or are not stored"
    ),
    "paged_attention_triton.py _attend constant: 0 -> 1": "keys and values of masked table entries are masked themselves",
    "paged_attention_triton.py _append_kernel constant: 0.0 -> 1.0 (2)": "values of masked lanes are not stored",
    "paged_attention_triton.py _attend constant: 0.0 -> 1.0": _ROW,
    "rms_norm_triton.py _backward_kernel constant: 0.0 -> 1.0": _UNUSED,
    "rms_norm_triton.py _backward_wide_kernel constant: 0.0 -> 1.0 (3)": _UNUSED,
    "rope_attention_tiles_triton.py key_range comparison: i < queries -> (i <= queries)": _EXISTS,
    "wave_conv_triton.py _backward_kernel constant: 0.0 -> 1.0 (4)": _COLUMN,
    "wave_conv_triton.py _backward_kernel mask: (token >= 0) & (token < end) & inside -> ((token >= 0) & (token < end))": (
        f"{_COLUMN}; a block is narrower than two rows and these tokens are followed by another, so that nothing past x is read"
    ),
    **{
        f"wave_conv_triton.py {kernel} cast: widen(tl.load(bias_ptr + c, mask=inside, other=0.0))"
        " -> (tl.load(bias_ptr + c, mask=inside, other=0.0))": "it is added to a float32, which widens it"
        for kernel in ("_forward_kernel", "_backward_kernel")
    },
    "wave_conv_triton.py _forward_kernel constant: 0.0 -> 1.0 (3)": _COLUMN,
}


@dataclass(frozen=True)
class Mutant:
    """One fault: the text from `begin` to `end` (bytes) of a file of the package becomes `after`."""

    file: str
    function: str
    kind: str
    before: str
    after: str
    occurrence: int  # among those of the same text in the function
    begin: int
    end: int

    @property
    def name(self) -> str:
        again = f" ({self.occurrence + 1})" if self.occurrence else ""
        return f"{self.file} {self.function} {self.kind}: {self.before} -> {self.after}{again}"

    def applied(self, source: str) -> str:
        data = source.encode()
        return (data[: self.begin] + self.after.encode() + data[self.end :]).decode()


# ---- where mutants come from

Site = tuple[str, ast.expr | ast.stmt, str]  # kind, what is replaced, by what

_SHIFTED = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
_EXCHANGED = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//", ast.BitAnd: "|", ast.RShift: "<<",
}  # fmt: skip
_TWINS = {"tl.maximum": "tl.minimum", "tl.minimum": "tl.maximum"}
_ROUNDINGS = ("widen", "narrow", "operand")
# Calls whose numbers are shapes or axes.
_SHAPED = ("tl.arange", "tl.zeros", "tl.full", "tl.reshape", "tl.permute", "tl.sum", "tl.max")


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """Every mutant of the kernels in one file."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in function.decorator_list):
            seen: dict[tuple[str, str, str], int] = {}
            for kind, node, after in (site for statement in _executed(function.body) for site in _sites(statement)):
                begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
                before = " ".join(source.encode()[begin:end].decode().split())
                occurrence = seen[kind, before, after] = seen.get((kind, before, after), -1) + 1
                yield Mutant(file, function.name, kind, before, after, occurrence, begin, end)


def _executed(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that the interpreter can reach."""
    for statement in body:
        if isinstance(statement, ast.If) and "HAS_FAST_SINE" in ast.unparse(statement.test):
            continue
        yield statement
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "INTERPRET":
            return


def _called(node: ast.AST) -> str:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def _sites(node: ast.AST, in_shape: bool = False) -> Iterator[Site]:
    called = _called(node)
    if isinstance(node, ast.BinOp):
        left, right = ast.unparse(node.left), ast.unparse(node.right)
        exchanged = _EXCHANGED.get(type(node.op))
        if exchanged is not None and not isinstance(node.left, ast.Tuple) and not isinstance(node.right, ast.Tuple):
            yield "operator", node, f"(({left}) {exchanged} ({right}))"
        if isinstance(node.op, ast.BitAnd):
            yield "mask", node, f"({left})"
            yield "mask", node, f"({right})"
        if isinstance(node.op, ast.Mult) and isinstance(node.right, ast.Name):
            yield "stride", node, f"({left})"
    elif isinstance(node, ast.AugAssign):
        exchanged = _EXCHANGED.get(type(node.op))
        if exchanged is not None:
            yield "operator", node, f"{ast.unparse(node.target)} {exchanged}= {ast.unparse(node.value)}"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "operator", node, f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _SHIFTED:
        yield "comparison", node, f"({ast.unparse(node.left)} {_SHIFTED[type(node.ops[0])]} {ast.unparse(node.comparators[0])})"
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float) and not in_shape:
        yield "constant", node, repr(node.value + 1)
    elif called in _TWINS:
        yield "operator", node.func, _TWINS[called]
    elif called in _ROUNDINGS:
        yield "cast", node, f"({ast.unparse(node.args[0])})"
    elif called.endswith(".to") and ast.unparse(node.args[0]) != "tl.int32":
        yield "cast", node, f"({ast.unparse(node.func.value)})"
    elif called in ("tl.arange", "tl.program_id"):
        yield "offset", node, f"({ast.unparse(node)} + 1)"
    elif called in ("tl.load", "tl.store"):
        for keyword in node.keywords:
            if keyword.arg == "mask":
                yield "mask", keyword.value, f"(({ast.unparse(keyword.value)}) | True)"

    if isinstance(node, ast.Call):
        # The value reduced is an expression like any other, the shape or axis after it is not.
        for place, argument in enumerate(node.args):
            if called == "tl.store" and _called(argument) == "narrow":
                argument = argument.args[0]
            yield from _sites(argument, called in _SHAPED and (place > 0 or called in ("tl.arange", "tl.zeros", "tl.full")))
        if isinstance(node.func, ast.Attribute):
            yield from _sites(node.func.value)
        for keyword in node.keywords:
            yield from _sites(keyword.value, keyword.arg not in ("mask", "other"))
    else:
        for child in ast.iter_child_nodes(node):
            yield from _sites(child, in_shape)


def kernel_files() -> list[str]:
    """triton_support.py and every *_triton.py that has kernels."""
    return ["triton_support.py", *(path.name for path in kernel_list.files() if kernel_list.jitted(ast.parse(path.read_text())))]


def all_mutants() -> list[Mutant]:
    """Every mutant of every kernel but the EQUIVALENT ones, in the order of files and lines."""
    found = [mutant for file in kernel_files() for mutant in mutants(file, (ROOT / PACKAGE / file).read_text())]
    return [mutant for mutant in found if mutant.name not in EQUIVALENT]


def sample(count: int, seed: int) -> list[Mutant]:
    """`count` mutants of all kernels, equally many of each kind; a change to one kernel hardly changes what is drawn of others."""
    rank = {mutant: hashlib.sha256(f"{seed}:{mutant.name}".encode()).digest() for mutant in all_mutants()}
    kinds: dict[str, list[Mutant]] = {}
    for mutant in sorted(rank, key=rank.get):
        kinds.setdefault(mutant.kind, []).append(mutant)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*(kinds[kind] for kind in sorted(kinds))))
    return list(itertools.islice(filter(None, turns), count))


# ---- what kills them

# Operations whose tests a file's kernels answer to, where these are more than its own.
_SERVED = {
    "triton_support.py": ("damped_sine", "rms_norm", "wave_conv", "rope_attention"),
    "rope_attention_tiles_triton.py": ("rope_attention", "paged_attention"),
    "damped_sine_triton.py": ("damped_sine", "wave_conv"),
    "float8_triton.py": ("paged_attention",),
}


def operations(file: str) -> tuple[str, ...]:
    """Which operations' tests say whether a file's kernels are right."""
    return _SERVED.get(file) or (kernel_list.operation(file.removesuffix(".py")),)


class Sandbox:
    """A private copy of package and tests. Used as a context: the copy goes with it.

    store   where to keep how long the sound package's tests take, for another run on the same sources; None: nowhere
    """

    def __init__(self, store: Path | None = None) -> None:
        self.store = store
        self.measured: dict[str, dict[str, float]] = {}  # operation, test, seconds

    def __enter__(self) -> "Sandbox":
        self.folder = tempfile.TemporaryDirectory(prefix="mutants")
        self.root = Path(self.folder.name)
        # Without the native build: it plays no part, and the copies are many.
        built = shutil.ignore_patterns("*.so", "_native_build.json", "__pycache__")
        shutil.copytree(ROOT / PACKAGE, self.root / PACKAGE, ignore=built)
        ignored = shutil.ignore_patterns("lm", "integration", "__pycache__", ".*")
        shutil.copytree(ROOT / "tests", self.root / "tests", ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", self.root)
        sources = sorted(path for path in self.root.rglob("*.py"))
        self.sources = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
        if self.store is not None and self.store.exists():
            self.measured = json.loads(self.store.read_text()).get(self.sources, {})
        return self

    def __exit__(self, *error: object) -> None:
        self.folder.cleanup()

    def _pytest(self, *arguments: str, timeout: float | None = None) -> tuple[int | None, str]:
        """(exit status, output); status None if the time ran out."""
        paths = [self.root / PACKAGE.parent, self.root / "tests", self.root / "tests" / "kernels"]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": str(self.root / "cache"),
        }  # fmt: skip
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
        # A session of its own, so that what a test starts (guard pages) ends with it.
        process = subprocess.Popen(
            command, cwd=self.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return None, output
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, output

    def tests(self, file: str) -> tuple[list[str], float]:
        """The tests that a mutant of `file` must pass, cheapest first, and their seconds. They are run once on the sound package,
        which must pass: what fails without a fault kills nothing."""
        found: dict[str, float] = {}
        for operation in operations(file):
            if operation not in self.measured:
                self.measured[operation] = self._measure(operation)
                if self.store is not None:
                    self.store.write_text(json.dumps({self.sources: self.measured}))
            found |= self.measured[operation]
        return sorted(found, key=found.get), sum(found.values())

    def _measure(self, operation: str) -> dict[str, float]:
        ids = ["tests/kernels/test_lint.py::test_rule_holds"]
        ids += sorted(str(path.relative_to(self.root)) for path in self.root.glob(f"tests/kernels/test_{operation}*.py"))
        for guard in ("test_nothing_is_touched_past_the_end", "test_offsets_past_2_to_the_31_are_right"):
            ids.append(f"tests/kernels/test_guard_pages.py::{guard}[triton-{operation}]")
        report = self.root / "durations.xml"
        chosen = "triton or emulation or zero_keeps_its_sign or rule_holds"
        status, output = self._pytest("-k", chosen, f"--junit-xml={report}", *ids)
        if status != 0:
            raise RuntimeError(f"the tests of {operation} fail without a mutant:\n{output[-3000:]}")
        cases = ElementTree.parse(report).iter("testcase")
        return {f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}": float(case.get("time")) for case in cases}

    def judge(self, mutant: Mutant) -> str:
        """What killed the mutant; "" if it survived."""
        tests, seconds = self.tests(mutant.file)
        path = self.root / PACKAGE / mutant.file
        sound = path.read_text()
        path.write_text(mutant.applied(sound))
        try:
            killer = self._killer(*self._pytest(*tests, timeout=60 + 10 * seconds))
            if not killer and mutant.kind == "cast":
                killer = self._gate(mutant.file)
        finally:
            path.write_text(sound)
        return killer

    @staticmethod
    def _killer(status: int | None, output: str) -> str:
        if status == 0:
            return ""
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)
        return failed.group(1) if failed else "takes too long" if status is None else f"exit status {status}"

    def _gate(self, file: str) -> str:
        for operation in operations(file):
            command = [sys.executable, "tests/kernels/gate.py", "--workers", "1", "--only", operation]
            environment = os.environ | {"XDG_CACHE_HOME": str(self.root / "cache" / "gate")}
            gate = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)
            shutil.rmtree(self.root / "cache" / "gate", ignore_errors=True)
            if gate.returncode:
                return "gate: " + (gate.stdout + gate.stderr).strip().splitlines()[-1]
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, required=True, help="a line of JSON a mutant; an earlier run's is continued")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))  # and ends what it started
    drawn = sample(options.cases, options.seed)
    killed: dict[str, str] = {}
    if options.results.exists():
        known = [json.loads(line) for line in options.results.read_text().splitlines()]
        killed = {row["mutant"]: row["killer"] for row in known if row["killer"]}
    with Sandbox(options.results.with_suffix(".tests")) as sandbox:
        # File by file, so that a run that is cut short has measured few operations' tests; what may need the gate comes last.
        for mutant in sorted(drawn, key=lambda mutant: (mutant.kind == "cast", mutant.file)):
            if mutant.name not in killed:
                started = time.perf_counter()
                killer = sandbox.judge(mutant)
                row = {"mutant": mutant.name, "killer": killer, "seconds": round(time.perf_counter() - started, 1)}
                with options.results.open("a") as results:
                    results.write(json.dumps(row) + "\n")
                print(f"{row['seconds']:6.1f} s  {killer or 'SURVIVED'}  {mutant.name}", flush=True)
                if killer:
                    killed[mutant.name] = killer
    survivors = [mutant.name for mutant in drawn if mutant.name not in killed]
    print(f"{len(drawn) - len(survivors)} of {len(drawn)} killed, seed {options.seed}", *survivors, sep="\nsurvived: ")
    return 1 if len(survivors) > 0.05 * len(drawn) else 0


if __name__ == "__main__":
    sys.exit(main())
