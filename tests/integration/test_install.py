"""Installing: with a compiler, without one, and with one that fails; as a wheel, from an sdist, and editable.

Every day setup.py's decisions are tried with compilers that fail at once. The matrix of real builds is a campaign: each case gets
an empty environment that sees torch and nothing else of ours.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
RECORD = "_native_build.json"

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the tests are not in a checkout")


@pytest.fixture
def checkout(tmp_path):
    """A copy without anything that was built."""
    copy = tmp_path / "checkout"
    ignore = shutil.ignore_patterns(
        "__pycache__", "*.so", RECORD, "build", "*.egg-info", ".git", ".venv*", "tests", "bench", "runs"
    )
    shutil.copytree(ROOT, copy, ignore=ignore)
    (copy / "README.md").touch()
    return copy


def python(*arguments, cwd, timeout=900, executable=sys.executable, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "PSANN_FAST_NATIVE", "PSANN_FAST_CUDA")}
    env["PSANN_FAST_CUDA"] = "0"  # a machine with a GPU would build the CUDA kernels for minutes
    return subprocess.run(
        [executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=timeout, env={**env, **environment}
    )


def build(checkout, **environment):
    """Runs setup.py's build alone; the record, or None where it failed, and what was said."""
    out = checkout.parent / "out"
    done = python(
        "setup.py", "build_ext", "--build-lib", out, "--build-temp", checkout.parent / "temp", cwd=checkout, **environment
    )
    record = out / "psann_kernels" / RECORD
    return (json.loads(record.read_text()) if done.returncode == 0 else None), done.stdout + done.stderr


def test_without_a_compiler_it_installs_and_says_so(checkout):
    record, _ = build(checkout, CXX="no-such-compiler")
    assert record["status"] == "failed" and "no C++ compiler was found (looked for no-such-compiler)" in record["reason"]


def test_a_failing_compiler_is_recorded(checkout):
    compiler = checkout / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'simd.h:1: fatal error: everything is wrong' >&2\nexit 1\n")
    compiler.chmod(0o755)
    record, _ = build(checkout, CXX=str(compiler))
    assert record["status"] == "failed" and "fatal error: everything is wrong" in record["reason"]
    record, said = build(checkout, CXX=str(compiler), PSANN_FAST_NATIVE="1")
    assert record is None and "PSANN_FAST_NATIVE=1, and the native kernels cannot be built" in said


def test_it_can_be_skipped(checkout):
    record, _ = build(checkout, PSANN_FAST_NATIVE="0")
    assert record["status"] == "skipped" and "PSANN_FAST_NATIVE=0" in record["reason"]
    record, said = build(checkout, PSANN_FAST_NATIVE="yes")
    assert record is None and "PSANN_FAST_NATIVE is 'yes'; it must be 0" in said


def test_cuda_kernels_are_built_on_request_alone(checkout):
    record, _ = build(checkout, PSANN_FAST_NATIVE="0")
    assert record["cuda"]["status"] == "skipped" and "PSANN_FAST_CUDA=0" in record["cuda"]["reason"]
    # No compiler and no nvidia-smi on the path.
    record, _ = build(checkout, PSANN_FAST_NATIVE="0", PSANN_FAST_CUDA="auto", PATH="")
    assert record["cuda"]["status"] == "skipped" and "nvcc is not on the path" in record["cuda"]["reason"]
    record, said = build(checkout, PSANN_FAST_NATIVE="0", PSANN_FAST_CUDA="1", PATH="")
    assert record is None and "PSANN_FAST_CUDA=1, and the CUDA kernels cannot be built: nvcc is not on the path" in said
    record, said = build(checkout, PSANN_FAST_NATIVE="0", PSANN_FAST_CUDA="yes")
    assert record is None and "PSANN_FAST_CUDA is 'yes'; it must be" in said


def test_setup_needs_no_torch(checkout):
    blocked = checkout.parent / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('setup.py imported torch')\n")
    done = python("setup.py", "--name", cwd=checkout, PYTHONPATH=str(blocked))
    assert done.returncode == 0 and "psann-fast" in done.stdout, done.stderr


def test_an_sdist_carries_the_sources(checkout):
    done = python("setup.py", "-q", "sdist", "--dist-dir", checkout.parent / "dist", cwd=checkout)
    assert done.returncode == 0, done.stderr
    (archive,) = (checkout.parent / "dist").glob("*.tar.gz")
    names = {name.split("/", 1)[1] for name in tarfile.open(archive).getnames() if "/" in name}
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")}
    assert ours and ours <= names
    assert {"setup.py", "pyproject.toml", "kernels/torch-ext/psann_kernels/native_build.py"} <= names


PROBE = """
import json, torch, psann_kernels
from pathlib import Path
z, one = torch.randn(4, 33), torch.ones(33)
rows = {r["backend"]: r for r in psann_kernels.explain("damped_sine", z, one, one, one)}
psann_kernels.damped_sine(z, one, one, one)
record = psann_kernels.native.read_record(psann_kernels.native.FOLDER)
assert (psann_kernels.native.CUDA is not None) == (record["cuda"]["status"] == "built"), psann_kernels.native.WHY_NO_CUDA
print(json.dumps([rows["native"]["serves"], rows["native"]["reason"], str(Path(psann_kernels.__file__).parent)]))
"""
# name: (what is installed, environment, whether native must serve, what the reason must say)
MATRIX = {
    "wheel": ("wheel", {}, "yes", "serves"),
    "sdist": ("sdist", {}, "yes", "serves"),
    "editable": ("editable", {}, "yes", "serves"),
    "no compiler": ("wheel", {"CXX": "no-such-compiler"}, "no", "no C++ compiler was found"),
    "compile error": ("wheel", {"CXX": "c++ -include no-such-header.h"}, "no", "no-such-header.h"),
    "skipped": ("editable", {"PSANN_FAST_NATIVE": "0"}, "no", "PSANN_FAST_NATIVE=0"),
    **({"compiler and nvcc": ("wheel", {"PSANN_FAST_CUDA": "90"}, "yes", "serves")} if shutil.which("nvcc") else {}),
}


@pytest.mark.campaign(weight=1)
@pytest.mark.parametrize("case", MATRIX)
def test_install_matrix(case, checkout, tmp_path, campaign):
    for _ in campaign:
        kind, environment, serves, reason = MATRIX[case]
        python("-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
        inside = tmp_path / "venv" / "bin" / "python"
        pip = ("-m", "pip", "--python", inside, "install", "-q", "--no-deps", "--no-build-isolation", "--no-index")
        (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
        # After its own packages the environment sees those of the one that runs the tests: torch, not ours.
        (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
        if kind == "sdist":
            python("setup.py", "-q", "sdist", "--dist-dir", tmp_path / "dist", cwd=checkout)
            source = next((tmp_path / "dist").glob("*.tar.gz"))
        else:
            source = checkout
        done = python(*pip, *(["-e"] if kind == "editable" else []), source, cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        done = python("-c", PROBE, cwd=tmp_path, executable=str(inside))
        assert done.returncode == 0, done.stderr
        got_serves, got_reason, folder = json.loads(done.stdout.splitlines()[-1])
        assert str(ROOT) not in folder and got_serves == serves and reason in got_reason, (got_serves, got_reason, folder)
        record = json.loads((Path(folder) / RECORD).read_text())
        assert (record["cuda"]["status"] == "built") == ("PSANN_FAST_CUDA" in environment), record["cuda"]
        print(case, {k: record.get(k) for k in ("status", "seconds", "bytes", "compiler", "reason", "cuda")})
        return
