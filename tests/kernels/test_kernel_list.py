"""No kernel is forgotten: each is in the gate's table (which checks its addresses too), before guard pages, in a campaign."""

import ast
import re
from pathlib import Path

import gate
import pytest
from guard_pages import CASES
from kernel_list import files, jitted, kernels, operation

pytest.importorskip("triton")


def test_there_are_kernels():
    assert len(kernels()) >= 18 and "rms_norm_triton._backward_wide_kernel" in kernels()
    assert operation("rope_attention_tiles_triton.rotate_kernel") == "rope_attention"


def test_what_is_launched_is_called_a_kernel():
    """The lists go by the name, so a launch of anything else would escape them."""
    launched = [
        f"{path.stem}.{ast.unparse(node.func.value)}"
        for path in files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    assert len(launched) >= len(kernels()) and all(name.endswith("_kernel") for name in launched), launched
    helpers = [name for path in files() for name in jitted(ast.parse(path.read_text())) if not name.endswith("_kernel")]
    assert not [name for name in helpers if any(launch.endswith(f".{name}") for launch in launched)]


def test_every_kernel_is_in_the_table():
    # Its configurations are compiled by test_gate.py, which finds 32-bit products in addresses, spills and TF32.
    table = gate.configurations(None)
    listed = {f"{c.kernel.fn.__module__.removeprefix('psann_kernels.')}.{c.kernel.__name__}" for c in table}
    assert sorted(set(kernels()) - listed) == []


@pytest.mark.parametrize("kernel", kernels())
def test_every_kernel_has_guard_pages_and_a_campaign(kernel):
    # test_guard_pages.py sees to it that the operation's cases launch the kernel.
    assert operation(kernel) in CASES, f"guard_pages.py has no case for {operation(kernel)}"
    tests = [path.read_text() for path in Path(__file__).parent.glob(f"test_{operation(kernel)}*.py")]
    assert any(re.search(r"^@pytest\.mark\.campaign", text, re.MULTILINE) for text in tests), f"no campaign for {operation(kernel)}"
