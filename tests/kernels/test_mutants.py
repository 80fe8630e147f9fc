"""The kernels' tests can fail: mutants.py makes one fault at a time, and at least 95 % of them must not survive.

`pytest -m campaign --cases=60 tests/kernels/test_mutants.py` judges 60 random ones; `python tests/kernels/mutants.py` judges a
fixed sample, in pieces.
"""

import random
import warnings

import mutants
import pytest

pytest.importorskip("triton")

KERNEL = '''
@triton.jit
def add_kernel(x_ptr, y_ptr, rows, x_stride, D: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * 4 + tl.arange(0, 4)
    here = (r < rows)[:, None] & inside
    x = widen(tl.load(x_ptr + r * x_stride, mask=here, other=0.0))
    x += tl.sum(x, 1)
    tl.store(y_ptr + r, narrow(-x, y_ptr.dtype.element_ty), mask=r < rows)

@triton.jit
def rounded(x):
    if INTERPRET:
        return widen(x)
    return x + 1

def launcher(x):
    return x + 1
'''


def made(kind):
    return {f"{m.before} -> {m.after}" for m in mutants.mutants("add_triton.py", KERNEL) if m.kind == kind}


def test_mutants_of_each_kind():
    assert made("mask") == {
        "(r < rows)[:, None] & inside -> ((r < rows)[:, None])", "(r < rows)[:, None] & inside -> (inside)",
        "here -> ((here) | True)", "r < rows -> ((r < rows) | True)",
    }  # fmt: skip
    assert made("comparison") == {"r < rows -> (r <= rows)"}
    assert made("stride") == {"r * x_stride -> (r)"}
    assert made("cast") == {
        "tl.program_id(0).to(tl.int64) -> (tl.program_id(0))",
        "widen(tl.load(x_ptr + r * x_stride, mask=here, other=0.0)) -> (tl.load(x_ptr + r * x_stride, mask=here, other=0.0))",
        "widen(x) -> (x)",
    }
    assert made("offset") == {"tl.program_id(0) -> (tl.program_id(0) + 1)", "tl.arange(0, 4) -> (tl.arange(0, 4) + 1)"}
    assert made("constant") == {"0 -> 1", "4 -> 5", "0.0 -> 1.0"}
    assert {"x += tl.sum(x, 1) -> x -= tl.sum(x, 1)", "-x -> (x)", "r * x_stride -> ((r) + (x_stride))"} < made("operator")
    whole = list(mutants.mutants("add_triton.py", KERNEL))
    assert {m.function for m in whole} == {"add_kernel", "rounded"} and not any(m.before == "x + 1" for m in whole)


def test_every_mutant_is_another_program_of_its_own_name():
    for file in mutants.kernel_files():
        source = (mutants.ROOT / mutants.PACKAGE / file).read_text()
        found = list(mutants.mutants(file, source))
        assert len(found) >= 30 and len({m.name for m in found}) == len(found)
        for mutant in found[:: len(found) // 15]:
            changed = mutant.applied(source)
            compile(changed, file, "exec")
            assert changed != source


def test_a_sample_is_fixed_and_holds_every_kind():
    drawn = mutants.sample(14, 3)
    assert drawn == mutants.sample(14, 3) != mutants.sample(14, 4)
    kinds = [m.kind for m in drawn]
    assert all(kinds.count(kind) == 2 for kind in ("mask", "comparison", "stride", "cast", "offset", "operator", "constant"))


def test_equivalent_mutants_exist():
    sources = {file: (mutants.ROOT / mutants.PACKAGE / file).read_text() for file in mutants.kernel_files()}
    names = {mutant.name for file, source in sources.items() for mutant in mutants.mutants(file, source)}
    assert sorted(set(mutants.EQUIVALENT) - names) == [], "their kernels have changed: look whether they are equivalent still"


@pytest.mark.campaign(weight=2)
def test_mutants_do_not_survive(campaign):
    survivors, found = [], mutants.all_mutants()
    with mutants.Sandbox() as sandbox:
        for seed in campaign:
            mutant = random.Random(seed).choice(found)
            if not sandbox.judge(mutant):
                survivors.append(mutant.name)
                warnings.warn(f"survived: {mutant.name} ({campaign.reproduction()})")
    # One of few may be an equivalent mutant that nobody has met yet.
    assert len(survivors) <= max(1, 0.05 * campaign.cases), survivors
