"""The quick interpreter computes what Triton's own computes, and looks through the language less often."""

from __future__ import annotations

import pytest
import quick_interpreter
import torch
from psann_kernels import damped_sine, rope_attention

if not quick_interpreter.SLOW:
    pytest.skip("Triton's interpreter is not used: there is no Triton, or there is a GPU", allow_module_level=True)

from triton.runtime import interpreter  # noqa: E402 (only where it is used)


def outputs() -> list[torch.Tensor]:
    """Of kernels that call jitted functions of other modules and of triton.language itself, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    sine = [torch.rand(*size, generator=generator).requires_grad_() for size in ((3, 70), (70,), (70,), (70,))]
    attention = [torch.randn(1, 9, 2, 16, generator=generator).requires_grad_() for _ in range(3)]
    y, o = damped_sine(*sine, backend="triton"), rope_attention(*attention, backend="triton")
    return [y, o, *torch.autograd.grad(y.sum() + o.square().sum(), sine + attention)]


def test_the_bits_are_those_of_the_slow_one(monkeypatch):
    searches: list[str] = []

    def counted(kind):
        patch = interpreter._patch_builtin

        def search(*args):
            searches.append(kind)
            return patch(*args)

        return search

    with monkeypatch.context() as patches:
        patches.setattr(interpreter, "_patch_builtin", counted("quick"))
        quick = outputs()
    with monkeypatch.context() as patches:
        for (owner, name), function in quick_interpreter.SLOW.items():
            patches.setattr(owner, name, function)
        patches.setattr(interpreter, "_patch_builtin", counted("slow"))
        slow = outputs()
    assert all(torch.equal(a, b) for a, b in zip(quick, slow, strict=True))
    assert searches.count("quick") * 5 < searches.count("slow")


def test_the_language_is_given_back():
    before = {name: vars(interpreter.tl)[name] for name in ("load", "store", "range", "arange")}
    outputs()
    assert before == {name: vars(interpreter.tl)[name] for name in before}
