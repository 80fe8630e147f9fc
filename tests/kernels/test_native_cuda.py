"""csrc/cuda compiles for every target, warnings as errors, without spills. Nothing here runs a kernel: that takes a GPU.

Every day sm_90 is compiled from the memory-bound kernels' files; the campaign compiles every file for every target, with PTX.
test_install.py, case "compiler and nvcc", builds and imports the module.
"""

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from psann_kernels import native

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
TARGETS = (80, 86, 89, 90, 100, 120)
FILES = sorted(p.stem for p in CUDA.glob("*.cu"))

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def compile_for(name, targets, folder):
    """Compile csrc/cuda/<name>.cu; {kernel and target: (registers, bytes spilled)}, as ptxas says."""
    codes = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
    codes.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
    command = ["nvcc", "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", *codes]
    command += ["-c", str(CUDA / f"{name}.cu"), "-o", str(folder / f"{name}.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    entries = re.findall(
        r"Compiling entry function '(\S+)' for '(sm_\d+)'"
        r".*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        re.S,
    )
    return {(kernel, target): (int(registers), int(stores) + int(loads)) for kernel, target, stores, loads, registers in entries}


def check(name, targets, folder, record):
    found = compile_for(name, targets, folder)
    assert len(found) >= 3 * len(targets), f"{name}: ptxas told of {len(found)} kernels"
    for (kernel, target), (registers, spilled) in sorted(found.items()):
        record(f"{name} {target} {kernel}", f"{registers} registers, {spilled} bytes spilled")
        assert spilled == 0, f"{name} {target} {kernel}: {spilled} bytes spilled"


@needs_nvcc
@pytest.mark.parametrize("name", ["damped_sine", "rms_norm"])
def test_memory_bound_kernels_compile_without_spills(name, tmp_path, record_property):
    check(name, (90,), tmp_path, record_property)


@needs_nvcc
@pytest.mark.campaign(weight=1)
@pytest.mark.parametrize("name", FILES)
def test_every_kernel_compiles_for_every_target(name, tmp_path, record_property, campaign):
    for _ in campaign:
        check(name, TARGETS, tmp_path, record_property)
        return


def test_a_missing_build_is_a_reason():
    if native.CUDA is not None:
        pytest.skip("the CUDA kernels are built here")
    assert "CUDA kernels were" in native.WHY_NO_CUDA
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0))
    assert native.refuses_device(on_gpu) == f"the tensors are on cuda:0; {native.WHY_NO_CUDA}"


@pytest.mark.skipif(native.NATIVE is None, reason=native.WHY_NOT)
def test_many_new_tokens_and_wide_heads_are_refused(monkeypatch):
    from psann_kernels import paged_attention_native

    monkeypatch.setattr(paged_attention_native, "CUDA", SimpleNamespace(paged_attention_max_tokens=16))
    refuses, table = paged_attention_native._refuses_cuda, torch.zeros(2, 3, dtype=torch.int32)
    assert refuses(torch.ones(32, 4, 64), table) is None
    assert "q has 33 tokens of 2 sequences; the CUDA kernel serves at most 16 new tokens" in refuses(torch.ones(33, 4, 64), table)
    assert refuses(torch.ones(2, 4, 288), table) == "head_dim is 288; the CUDA kernel serves at most 256"


def test_auto_takes_nothing_on_a_gpu_that_no_gpu_has_run():
    from psann_kernels.registry import AUTO_ORDER

    assert "native" not in AUTO_ORDER["cuda"]
