"""Every configuration that dispatch can choose compiles and is what it should be, on a machine without a GPU (gate.py).

Everyday for sm_90 with the installed Triton and with 3.6.0, which is fetched once into the cache folder; in the campaign for the
other targets too. A second run takes the results from the cache.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import gate
import pytest

triton = pytest.importorskip("triton")
CACHE = gate.default_cache()
PINNED = "3.6.0"


@pytest.fixture(scope="session")
def pinned_triton():
    """Folder of Triton 3.6.0, or None where it is the installed one."""
    if triton.__version__ == PINNED:
        return None
    folder = CACHE / f"triton-{PINNED}"
    if not (folder / "triton").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as part:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            command += ["--target", f"{part}/new", f"triton=={PINNED}"]
            fetched = subprocess.run(command, capture_output=True, text=True)
            if fetched.returncode:
                pytest.skip(f"pip cannot get triton {PINNED}: {fetched.stderr.strip().splitlines()[-1:]}")
            if not folder.exists():
                Path(part, "new").replace(folder)
    return folder


def assert_no_faults(targets, triton_path):
    results = gate.run(targets, CACHE / "gate", triton_path, workers=min(os.cpu_count() or 1, 8))
    faults = [fault for result in results for fault in result.faults()]
    assert not faults, f"{len(results)} compilations, {len(faults)} faults:\n" + "\n".join(faults)


def test_every_configuration_passes_with_the_installed_triton():
    assert_no_faults(["sm_90"], None)


def test_every_configuration_passes_with_the_pinned_triton(pinned_triton):
    assert_no_faults(["sm_90"], pinned_triton)


OTHERS = [target for target in gate.TARGETS if target != "sm_90"]


@pytest.mark.campaign
@pytest.mark.parametrize("target", OTHERS)
def test_every_configuration_passes_for_the_other_targets(target):
    assert_no_faults([target], None)


@pytest.mark.campaign
@pytest.mark.parametrize("target", OTHERS)
def test_every_configuration_passes_for_the_other_targets_with_the_pinned_triton(target, pinned_triton):
    assert_no_faults([target], pinned_triton)


@pytest.fixture(scope="module")
def bad_faults():
    """{name of a bad kernel: its faults, as one text}"""
    results = gate.run(["sm_90"], CACHE / "gate", kernels=Path(__file__).with_name("bad_kernels.py"))
    return {result.name: "\n".join(result.faults()) for result in results}


@pytest.mark.parametrize(
    "name, fault",
    [
        ("narrow product", "a 32-bit product takes part in an address"),
        ("does not compile", "does not compile"),
        ("TF32", "TF32 instructions; float32 products must be exact"),
        ("one warp has no HGMMA", "does not use HGMMA"),
        ("spills", "bytes a thread, 0 accepted"),
        ("much shared memory", "bytes of shared memory; sm_90 has 232448"),
    ],
)
def test_the_gate_finds(name, fault, bad_faults):
    assert fault in bad_faults[name]


def test_the_gate_finds_no_fault_where_there_is_none(bad_faults):
    assert bad_faults["no fault"] == ""


def test_the_gate_holds_the_sine_to_its_budget():
    result = gate.Result("damped_sine forward bf16 abs", "sm_90", "0", per_element=24.0, mufu_per_element=2.0)
    assert result.faults() == []
    result.per_element, result.mufu_per_element = 24.1, 2.1
    assert [fault.split(": ")[1] for fault in result.faults()] == [
        "24.1 instructions per element, 24 allowed",
        "2.10 special function results per element, 2 allowed",
    ]


def test_the_gate_wants_descriptors_to_be_used():
    result = gate.Result("by descriptors", "sm_90", "0", descriptors=2, tma=8)
    assert result.faults() == []
    result.tma = 0
    assert "has 2 tensor descriptors and no UTMALDG" in result.faults()[0]


def test_the_gate_wants_two_programs_where_the_tiles_count_on_it():
    name = "damped_sine_mlp forward bf16 by descriptors"
    result = gate.Result(name, "sm_90", "0", registers=128, shared=113 * 1024, warps=8)
    assert result.faults() == []
    result.registers = 129
    assert "1 programs a multiprocessor, 2 needed: 129 registers, 115712 bytes" in result.faults()[0]
    result.registers, result.shared = 128, 113 * 1024 + 1
    assert "1 programs a multiprocessor, 2 needed: 128 registers, 115713 bytes" in result.faults()[0]
    result.name = "another kernel"
    assert result.faults() == []


DEADLY = """
import os
from dataclasses import replace

import bad_kernels


class Deadly:
    cache_key = "deadly"
    fn = bad_kernels.product.fn

    @property
    def arg_names(self):
        os.kill(os.getpid(), 9)


def configurations():
    bad = {configuration.name: configuration for configuration in bad_kernels.configurations()}
    return [replace(bad["narrow product"], kernel=Deadly(), name="dies"), bad["no fault"]]
"""


def test_a_compiler_that_dies_is_a_fault_of_the_configuration_it_compiled(tmp_path):
    (tmp_path / "deadly.py").write_text(DEADLY)
    dies, other = gate.run(["sm_90"], tmp_path / "cache", kernels=tmp_path / "deadly.py", workers=1)
    assert "the compiling process ended with status -9" in dies.error and dies.faults()
    assert other.faults() == []
