"""The native backend as a whole: its build's handshake, its threads and instruction sets, and what it must not do to a process.

That its kernels are right is shown beside every op, where "native" is one backend among the others."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psann_kernels
import pytest
import torch
from psann_kernels import damped_sine, linear, native, paged_attention, rms_norm, wave_conv
from psann_kernels.native_build import RECORD, checkout_sources, read_record, source_hash, write_record

NATIVE = native.NATIVE
needs_native = pytest.mark.skipif(NATIVE is None, reason=native.WHY_NOT)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def paged_arguments(lengths, new, dtype=torch.float32, head_dim=40, kv_heads=2, group=3, block_size=8):
    """Sequences of `lengths` tokens, `new` of them new, in shuffled blocks; what nobody owns is NaN or outside the pool."""
    counts = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(1))
    k_cache, v_cache = (torch.full((len(order), block_size, kv_heads, head_dim), float("nan"), dtype=dtype) for _ in range(2))
    table = torch.full((len(lengths), max(counts) + 1), 1 << 30, dtype=torch.int32)
    for b, (length, count) in enumerate(zip(lengths, counts)):
        table[b, :count], order = order[:count], order[count:]
        for t in range(length):
            slot = int(table[b, t // block_size]), t % block_size
            k_cache[slot], v_cache[slot] = draw(2, kv_heads, head_dim, seed=1000 * b + t).to(dtype)
    cu_seqlens_q = torch.tensor([0, *new]).cumsum(0).int()
    q = torch.cat([draw(n, kv_heads * group, head_dim, seed=b) for b, n in enumerate(new)]).to(dtype)
    return q, k_cache, v_cache, table, torch.tensor(lengths, dtype=torch.int32), cu_seqlens_q


def results():
    """Every kernel once, at sizes that are split among threads and leave a part of a vector."""
    z, a, f, d = draw(70, 530), draw(530) + 1, draw(530).abs(), draw(530).abs() / 4
    w, r, taps = draw(530), draw(70, 530, seed=3), draw(530, 4)
    yield from gradients(lambda *t: damped_sine(*t, backend="native"), z, a, f, d)
    yield from gradients(lambda *t: damped_sine(*t, mode="relu", backend="native"), z.bfloat16(), a, f, d)
    yield from gradients(lambda x, w, r: rms_norm(x, w, residual=r, backend="native"), z, w, r)
    yield from gradients(lambda x, w, a, f, d: wave_conv(x, w, a, f, d, dilation=3, backend="native"), z[None], taps, a, f, d)
    for dtype in (torch.float32, torch.bfloat16):
        yield paged_attention(*paged_arguments([300, 21, 9], [1, 19, 4], dtype), backend="native")
        yield linear(draw(3, 530).to(dtype), draw(140, 530).to(dtype), backend="native")


def gradients(function, *tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [draw(*o.shape, seed=9).to(o.dtype) for o in outputs]
    return *(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, grads)


@needs_native
def test_the_number_of_threads_changes_no_bit():
    before = torch.get_num_threads()
    try:
        seen = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.append(list(results()))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert len(other) == len(seen[0]) > 20
        for a, b in zip(seen[0], other):
            assert torch.equal(a, b)


@needs_native
def test_instruction_sets_agree():
    names = native.instruction_sets(NATIVE)
    assert "portable" in names
    try:
        seen = []
        for name in names:
            assert NATIVE.use_isa(name) and NATIVE.isa() == name
            seen.append(list(results()))
    finally:
        NATIVE.use_isa(names[0])
    for name, other in zip(names[1:], seen[1:]):
        for a, b in zip(seen[0], other):
            # They add in different orders; a bfloat16 result may fall on the other side of a rounding.
            tolerance = 2.0**-7 if a.dtype == torch.bfloat16 else 2e-5
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m: f"{names[0]} and {name}: {m}")


@needs_native
def test_threads_are_shared_with_torch():
    assert NATIVE.threading() == "openmp", "torch's OpenMP was not found; a second set of threads would fight it for the cores"


@needs_native
def test_denormals_survive_the_import():
    torch.set_num_threads(max(2, torch.get_num_threads()))
    tiny = torch.full((1 << 16,), 1e-40)
    assert (tiny * 0.5 > 0).all()
    one = torch.ones(1 << 8)
    assert (damped_sine(tiny.view(-1, 1 << 8), one, one, one, backend="native") > 0).all()


def run_python(code, **environment):
    path = os.pathsep.join((str(Path(psann_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


@needs_native
def test_an_unknown_instruction_set_is_an_error():
    done = run_python("import psann_kernels", PSANN_FAST_NATIVE_ISA="avx9000")
    assert done.returncode and "PSANN_FAST_NATIVE_ISA is 'avx9000'; this build and processor have" in done.stderr
    assert "portable" in done.stderr


@needs_native
def test_the_own_pool_gives_the_same_bits_and_survives_a_fork():
    """Where torch brings no OpenMP of GNU's, the kernels run on threads of their own."""
    done = run_python("""
import os, torch
from psann_kernels import damped_sine, native
g = torch.Generator().manual_seed(0)
# Few enough elements that torch itself stays on one thread: its OpenMP does not survive a fork.
z, one = torch.randn(40, 530, generator=g), torch.ones(530)
torch.set_num_threads(1)
expected = damped_sine(z, one, one, one, backend="native")
assert not native.NATIVE.share_openmp("no such library") and native.NATIVE.threading() == "own pool"
torch.set_num_threads(3)
for _ in range(200):
    assert torch.equal(damped_sine(z, one, one, one, backend="native"), expected)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(damped_sine(z, one, one, one, backend="native"), expected) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""")
    assert done.returncode == 0, done.stderr


@needs_native
def test_only_the_module_is_exported():
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    names = subprocess.run(["nm", "-D", "--defined-only", NATIVE.__file__], capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in names.splitlines()] == ["PyInit__native"]


@needs_native
def test_two_copies_live_side_by_side(tmp_path):
    """Hugging Face's loader imports the package a second time under another name: from another folder, or from the same one."""
    folder = Path(psann_kernels.__file__).parent
    shutil.copytree(folder, tmp_path / "second_psann_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    done = run_python(f"""
import importlib.util, sys, torch, psann_kernels, second_psann_kernels
folder = {str(folder)!r}
spec = importlib.util.spec_from_file_location("third", folder + "/__init__.py", submodule_search_locations=[folder])
third = sys.modules["third"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(third)
z, w, one = torch.randn(1, 64, 300), torch.randn(300, 3), torch.ones(300)
a, b, c = (p.wave_conv(z, w, one, one, one, backend="native") for p in (psann_kernels, second_psann_kernels, third))
assert torch.equal(a, b) and torch.equal(a, c)
""", PYTHONPATH=os.pathsep.join((str(folder.parent), str(tmp_path))))
    assert done.returncode == 0, done.stderr


def package_folder(tmp_path):
    folder = tmp_path / "kernels" / "torch-ext" / "psann_kernels"
    folder.mkdir(parents=True)
    return folder


def test_a_missing_build_says_so(tmp_path):
    module, reason = native.load(package_folder(tmp_path))
    assert module is None and "were never built here; pip install" in reason


def test_a_failed_build_says_why(tmp_path):
    folder = package_folder(tmp_path)
    write_record(folder, status="failed", reason="no C++ compiler was found", source_hash="0")
    assert native.load(folder) == (None, "the native kernels were not built: no C++ compiler was found")


def test_changed_sources_make_a_build_stale(tmp_path):
    folder = package_folder(tmp_path)
    csrc = tmp_path / "csrc" / "cpu"
    csrc.mkdir(parents=True)
    (csrc / "a.cpp").write_text("int a;\n")
    write_record(folder, status="built", reason=None, source_hash=source_hash(tmp_path / "csrc"))
    assert "built but do not load" in native.load(folder)[1] or native.load(folder)[0] is None
    (csrc / "a.cpp").write_text("int b;\n")
    module, reason = native.load(folder)
    assert module is None and "stale: csrc changed after they were built" in reason


def test_names_count_in_the_hash(tmp_path):
    (tmp_path / "a.cpp").write_text("x")
    first = source_hash(tmp_path)
    (tmp_path / "a.cpp").rename(tmp_path / "b.cpp")
    assert source_hash(tmp_path) != first and len(first) == 16


@needs_native
def test_a_module_of_other_sources_is_refused(tmp_path):
    folder = package_folder(tmp_path)
    write_record(folder, status="built", reason=None, source_hash="0123456789abcdef")
    module, reason = native.load(folder)
    assert module is None and "was built from other sources than the record says" in reason


def test_the_record_is_readable():
    folder = Path(native.__file__).parent
    record = read_record(folder)
    if record is None:
        pytest.skip(f"{RECORD} is missing: {native.WHY_NOT}")
    assert record["status"] in ("built", "failed", "skipped")
    if record["status"] == "built" and checkout_sources(folder) is not None and NATIVE is not None:
        assert record["source_hash"] == NATIVE.source_hash == source_hash(checkout_sources(folder))


def test_explain_names_the_reason(monkeypatch):
    z, one = torch.ones(2, 3), torch.ones(3)
    op = psann_kernels.OPS["damped_sine"]
    monkeypatch.setattr(op, "implementations", {k: v for k, v in op.implementations.items() if k != "native"})
    monkeypatch.setattr(op, "unavailable", {"native": "the native kernels were not built: no C++ compiler was found"})
    rows = {row["backend"]: row["reason"] for row in psann_kernels.explain("damped_sine", z, one, one, one)}
    assert "no C++ compiler was found" in rows["native"]
    with pytest.raises(psann_kernels.BackendError, match="no C\\+\\+ compiler was found"):
        damped_sine(z, one, one, one, backend="native")


def op(name):
    return getattr(importlib.import_module(f"psann_kernels.{name}_native"), f"{name}_native")


OPCHECKED = {
    "damped_sine": lambda n: (draw(n, 16), *(draw(16).abs() for _ in range(3)), "abs"),
    "rms_norm": lambda n: (draw(n, 16), draw(16), 1e-6, torch.bfloat16),
    "wave_conv": lambda n: (draw(n, 5, 16), draw(16, 3), None, *(draw(16).abs() for _ in range(3)), None, None, 2, "abs"),
    "linear": lambda n: (draw(n, 16), draw(8, 16), None, draw(8)),
}


@needs_native
@pytest.mark.parametrize("rows", [0, 1, 4])
@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name, rows):
    arguments = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in OPCHECKED[name](rows)]
    torch.library.opcheck(op(name), tuple(arguments))


@needs_native
def test_opcheck_paged():
    q, k_cache, v_cache, table, seq_lens, cu_seqlens_q = paged_arguments([9, 4], [1, 3])
    k_cache, v_cache = k_cache.nan_to_num(0), v_cache.nan_to_num(0)
    torch.library.opcheck(
        op("paged_attention"), (q, k_cache, v_cache, table, seq_lens, cu_seqlens_q, None, None, True, 0.2, 0, None)
    )
    k, v = draw(3, 2, 40), draw(3, 2, 40)
    torch.library.opcheck(op("paged_append"), (k, v, k_cache, v_cache, torch.tensor([3, -1, 17]), None, None, None, True))


@needs_native
@pytest.mark.parametrize("mode", ["abs", "relu", "none"])
def test_extreme_parameters_of_the_sine(mode):
    """Amplitudes whose product with the envelope leaves float32 though the result does not, and damping that makes it grow."""
    from sine_bound import judge

    rows = [(a, f, d) for a in (1e30, -1e-30, 2e-38, 1.0) for f in (1e-12, 7.0, 1e5) for d in (-30.0, -1e-3, 0.0, 40.0)]
    amplitude, frequency, damping = (torch.tensor(column) for column in zip(*rows))
    # |z| up to 2: the largest results stay within float32, as do those times the frequency.
    z = torch.cat([torch.linspace(-2, 2, 41), torch.tensor([1e-30, -1e-12])])[:, None].expand(43, len(rows)).contiguous()
    leaves = [t.requires_grad_() for t in (z, amplitude, frequency, damping)]
    y = damped_sine(*leaves, mode=mode, backend="native")
    dy = torch.full_like(y, 1e-6)
    truth = judge(z.detach(), amplitude.detach(), frequency.detach(), damping.detach(), dy, mode)
    truth.check(f"native {mode}", y.detach(), torch.autograd.grad(y, z, dy, retain_graph=True)[0], in_turns=True)


@needs_native
def test_a_denormal_sine_is_rounded_no_more_than_twice():
    from sine_bound import judge

    z = torch.linspace(88, 103, 20001)[:, None]
    one = torch.ones(1)
    y = damped_sine(z, one, 3 * one, one, backend="native")
    assert (y != 0).any() and (y.abs() < 1e-38).all()
    truth = judge(z, one, 3 * one, one, torch.ones_like(z), "abs")
    truth.check("native", y, truth.dz.float(), in_turns=True)
    # Twice at most: the envelope, and its product with the sine.
    assert ((y.double() - truth.y).abs() <= 2.0**-149 + (2e-6 + 2.0**-22 * z.double()) * truth.envelope).all()
