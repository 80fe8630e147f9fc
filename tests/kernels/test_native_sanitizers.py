"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, each buffer allocated to the byte.

The same run compares instruction sets, among them 16 lanes as AVX-512 has, made of two AVX2 vectors where there is no AVX-512, with
its products of bf16 pairs made of others.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = "-std=c++17 -O1 -g1 -fno-math-errno -fno-trapping-math -ffp-contract=off -Wno-psabi -pthread".split()
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all".split()
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
VARIANTS = {"portable": [], **({"avx2": AVX2, "lanes16": [*AVX2, "-DPSANN_LANES=16", "-DPSANN_PAIRS"]} if X86 else {})}

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is installed"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="csrc is not beside the tests"),
]


def run(folder, variant, extra):
    if variant != "portable" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    sources = [
        *sorted((CSRC / "cpu").glob("*.cpp")),
        CSRC / "threads.cpp",
        CSRC / "memory.cpp",
        Path(__file__).with_name("sanitize.cpp"),
    ]
    flags = [*FLAGS, *extra, *VARIANTS[variant], f"-DPSANN_NAMESPACE={variant}", f"-I{CSRC}"]
    processes = [
        subprocess.Popen([COMPILER, *flags, "-c", str(s), "-o", str(folder / f"{s.stem}.o")], stderr=subprocess.PIPE, text=True)
        for s in sources
    ]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
    program = folder / "sanitize"
    subprocess.run([COMPILER, *FLAGS, *extra, *map(str, folder.glob("*.o")), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return np.frombuffer(done.stdout, np.float32)


@pytest.mark.campaign(weight=1)
def test_every_variant_is_clean_and_agrees(tmp_path, campaign):
    for _ in campaign:
        results = {}
        for variant in VARIANTS:
            folder = tmp_path / variant
            folder.mkdir(exist_ok=True)
            results[variant] = run(folder, variant, SANITIZERS)
        for variant, result in results.items():
            assert len(result) == len(results["portable"])
            # Different orders of addition; half-precision results may fall on the other side of a rounding.
            np.testing.assert_allclose(result, results["portable"], rtol=2.0**-6, atol=2e-4, err_msg=variant)
        return
