"""The Triton kernels that psann_kernels launches, read from its syntax trees: what every rule about all kernels goes through."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "kernels" / "torch-ext" / "psann_kernels"


def files() -> list[Path]:
    return sorted(PACKAGE.glob("*_triton.py"))


def jitted(tree: ast.Module) -> list[str]:
    """Names of the @triton.jit functions of a file."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if any("triton.jit" in ast.unparse(decorator) for decorator in f.decorator_list)]


def kernels() -> list[str]:
    """"module.kernel" of every jitted function that is launched, which is called ..._kernel."""
    return [f"{path.stem}.{name}" for path in files() for name in jitted(ast.parse(path.read_text())) if name.endswith("_kernel")]


def operation(kernel: str) -> str:
    """The operation whose tests cover a kernel ("module.kernel", or a module): the longest beginning of the module's name that has
    a test file, the whole name if none has."""
    whole = kernel.split(".")[0].removesuffix("_triton")
    words = whole.split("_")
    beginnings = ("_".join(words[:count]) for count in range(len(words), 0, -1))
    return next((name for name in beginnings if Path(__file__).with_name(f"test_{name}.py").exists()), whole)
