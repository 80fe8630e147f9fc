"""What a reader of the source can see and no test run on a CPU would: rules over the syntax trees of both packages.

Each rule is a function from a syntax tree to findings, and is itself tried on a line that breaks it.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable, Iterator

import psann_kernels
import pytest
import torch

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "torch-ext" / "psann_kernels"
FAST = ROOT / "psann_fast"
PACKAGES = {"psann_kernels": KERNELS, "psann_fast": FAST}
Rule = Callable[[ast.Module], Iterator[tuple[int, str]]]


def sources(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def called(node: ast.AST) -> str:
    """"tl.load" for a call of tl.load, "" for what is no call by a dotted name."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def keywords(call: ast.Call) -> dict[str, ast.expr]:
    return {k.arg: k.value for k in call.keywords if k.arg is not None}


def masked_load_without_other(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if called(node) == "tl.load":
            is_masked = len(node.args) > 1 or "mask" in keywords(node)
            if is_masked and len(node.args) < 3 and "other" not in keywords(node):
                yield node.lineno, "tl.load with a mask and no other=: a GPU leaves anything in the masked lanes"


def dot_without_precision(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if called(node) in ("tl.dot", "tl.dot_scaled") and "input_precision" not in keywords(node):
            yield node.lineno, f"{called(node)} without input_precision: float32 falls to TF32 on a GPU"


def narrow_program_product(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """A product with a program id, or with what was computed from one, that has not been through .to(tl.int64)."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            yield from _narrow_products(function)


def _narrow_products(function: ast.FunctionDef) -> Iterator[tuple[int, str]]:
    narrow: set[str] = set()

    def is_narrow(node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return node.id in narrow
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr == "to" and "int64" in ast.unparse(node):
                return False
            return called(node) in ("tl.program_id", "tl.num_programs") or any(map(is_narrow, node.args))
        return any(map(is_narrow, ast.iter_child_nodes(node)))

    for _ in range(2):  # a name may become narrow after the line that uses it, in a loop
        for node in ast.walk(function):
            if isinstance(node, (ast.Assign, ast.AugAssign)) and is_narrow(node.value):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                narrow |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            if isinstance(node, ast.For) and is_narrow(node.iter):
                narrow |= {name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)}
    for node in ast.walk(function):
        is_product = isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Mult)
        if is_product and any(is_narrow(side) for side in ast.iter_child_nodes(node)):
            yield node.lineno, f"a program id is multiplied before .to(tl.int64): {ast.unparse(node)}"


def broad_except(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = "everything" if node.type is None else ast.unparse(node.type)
            if re.search(r"\b(everything|Exception|BaseException)\b", caught):
                yield node.lineno, f"catches {caught}; name the type that can be handled better here"


def in_place_autotune(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Autotuning runs a kernel many times: one that reads what it writes must have it restored in between."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        tuners = [d for d in function.decorator_list if called(d) == "triton.autotune" and "restore_value" not in keywords(d)]
        pointers = {argument.arg for argument in function.args.args}
        touched = {"tl.load": set(), "tl.store": set()}
        for node in ast.walk(function):
            if called(node) in touched or called(node).startswith("tl.atomic_"):
                used = {name.id for name in ast.walk(node.args[0]) if isinstance(name, ast.Name)} & pointers
                for kind in touched if called(node).startswith("tl.atomic_") else [called(node)]:
                    touched[kind] |= used
        both = sorted(touched["tl.load"] & touched["tl.store"])
        if tuners and both:
            yield (
                function.lineno,
                f"{function.name} is autotuned and may read what it wrote through {', '.join(both)}; give restore_value",
            )


BREAKS = {
    masked_load_without_other: "x = tl.load(p, mask=m)",
    dot_without_precision: "x = tl.dot(a, b)",
    narrow_program_product: "def k():\n    for i in range(tl.program_id(0), 9):\n        j = i + 1\n        p = j * stride",
    broad_except: "try: pass\nexcept (ValueError, Exception): pass",
    in_place_autotune: "@triton.autotune(configs=[])\n@triton.jit\ndef k(x_ptr, n):\n    tl.store(x_ptr + n, tl.load(x_ptr))",
}
KEEPS = {
    masked_load_without_other: "x = tl.load(p, mask=m, other=0.0)\ny = tl.load(p)\nz = tl.load(p, m, 0.0)",
    dot_without_precision: "x = tl.dot(a, b, input_precision='ieee')",
    narrow_program_product: (
        "def k():\n    p = tl.program_id(0).to(tl.int64) * n\n    q = tl.program_id(1)\n    r = q.to(tl.int64) * n"
    ),
    broad_except: "try: pass\nexcept (ValueError, KeyError): pass",
    in_place_autotune: (
        "@triton.autotune(configs=[], restore_value=['x_ptr'])\ndef k(x_ptr, n):\n    tl.store(x_ptr, tl.load(x_ptr))"
    ),
}


@pytest.mark.parametrize("rule", BREAKS, ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    assert list(rule(ast.parse(BREAKS[rule]))), "the rule misses a line that breaks it"
    assert not list(rule(ast.parse(KEEPS[rule]))), "the rule finds fault with a line that keeps it"
    findings = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for package in PACKAGES.values()
        for path in sources(package)
        for line, what in rule(ast.parse(path.read_text()))
    ]
    assert not findings, "\n".join(findings)


def imports(path: Path, package: str, folder: Path, is_at_load: bool = False) -> Iterator[tuple[int, str, int]]:
    """(line, absolute name, level) of every import in a file, each name of a `from` import apart; of those that run when the
    module is loaded, with `is_at_load`."""
    inside = [package, *path.relative_to(folder).with_suffix("").parts]
    parent = inside[:-1]  # a module's package; __init__'s own
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if is_at_load and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if is_at_load and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parent[: len(parent) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield from ((node.lineno, ".".join([*base, alias.name]), node.level) for alias in node.names)


def test_psann_kernels_imports_the_standard_library_torch_and_itself():
    findings = []
    for path in sources(KERNELS):
        allowed = {*sys.stdlib_module_names, "torch"}
        if path.stem.endswith(("_triton", "_gluon")) or path.stem == "triton_support":
            allowed.add("triton")
        for line, name, level in imports(path, "psann_kernels", KERNELS):
            root = name.split(".")[0]
            if (level and root != "psann_kernels") or (not level and root not in allowed):
                findings.append(f"{path.relative_to(ROOT)}:{line}: imports {name}")
    assert not findings, "\n".join(findings)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_cycles(package):
    folder = PACKAGES[package]
    modules = {
        ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in sources(folder)
    }
    graph = {
        module: {
            target
            for _, name, _ in imports(path, package, folder, is_at_load=True)
            for target in [name if name in modules else name.rpartition(".")[0]]
            if target in modules and target != module
        }
        for module, path in modules.items()
    }
    # The package's __init__ imports its modules to export them; they reach one another by name, never through it.
    while leaves := [module for module, targets in graph.items() if not targets]:
        graph = {module: targets - set(leaves) for module, targets in graph.items() if targets}
    assert not graph, f"import cycle among {sorted(graph)}"


def tracked_texts() -> Iterator[tuple[str, list[str]]]:
    """(name, lines) of every text file that git tracks; skips the test where there is no checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, tracked):
        path = ROOT / name
        if path.is_file() and b"\0" not in (data := path.read_bytes())[:4096]:
            yield name, data.decode(errors="replace").splitlines()


def too_wide(lines: list[str]) -> Iterator[tuple[int, int]]:
    """(line, columns) of the lines of more than 132 columns."""
    yield from ((number, len(line)) for number, line in enumerate(lines, 1) if len(line) > 132)


def test_no_line_of_source_is_over_132_columns():
    assert list(too_wide(["x" * 132, "x" * 133])) == [(2, 133)]
    findings = [
        f"{name}:{number}: {columns} columns; break it"
        for name, lines in tracked_texts()
        if Path(name).suffix in (".py", ".cpp", ".h", ".hpp", ".cu", ".cuh")
        for number, columns in too_wide(lines)
    ]
    assert not findings, "\n".join(findings)


def test_no_machine_paths_in_tracked_files():
    places = re.compile(
        "|".join(["/" + "work/", "/" + r"tmp/\w", "/" + r"root/\w", "/" + r"home/\w", "/" + r"Users/\w", r"\b[A-Z]:" + r"\\Users"])
    )
    findings = [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, lines in tracked_texts()
        for number, line in enumerate(lines, 1)
        if places.search(line)
    ]
    assert not findings, "\n".join(findings)


def test_every_public_function_says_what_it_does():
    public = {name: getattr(psann_kernels, name) for name in psann_kernels.__all__}
    silent = [name for name, value in public.items() if callable(value) and not (value.__doc__ or "").strip()]
    assert not silent, f"no docstring: {silent}"


def test_a_second_copy_of_the_package_works_beside_the_first():
    # Hugging Face's loader imports the folder under a name of its own, into a process that may have the package already.
    name = "a_second_copy"
    spec = importlib.util.spec_from_file_location(name, KERNELS / "__init__.py", submodule_search_locations=[str(KERNELS)])
    second = importlib.util.module_from_spec(spec)
    sys.modules[name] = second
    spec.loader.exec_module(second)
    try:
        assert second.damped_sine is not psann_kernels.damped_sine
        z = torch.linspace(-3, 3, 35).reshape(5, 7).requires_grad_()
        parameters = [torch.linspace(0.5, 1.5, 7) for _ in range(3)]
        for row in psann_kernels.explain("damped_sine", z, *parameters):
            if row["serves"] == "yes":
                first, other = (package.damped_sine(z, *parameters, backend=row["backend"]) for package in (psann_kernels, second))
                assert torch.equal(first, other), row["backend"]
                (gradient,) = torch.autograd.grad(other.sum(), z)
                assert gradient.isfinite().all()
        assert {row["serves"] for row in second.explain("damped_sine", z, *parameters)} & {"yes"}
    finally:
        for module in [module for module in sys.modules if module.split(".")[0] == name]:
            del sys.modules[module]
