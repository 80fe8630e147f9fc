"""Maps the two import packages of the distribution and builds csrc into psann_kernels._native.

Imports no torch, so it installs into an empty environment. A kernel that cannot be built never fails the install: the
reason is recorded where `explain` finds it. Environment:

    PSANN_FAST_NATIVE   auto (default) builds if it can; 1 makes a failed build fatal; 0 builds nothing
    PSANN_FAST_CUDA     auto (default) builds csrc/cuda where nvcc and a GPU are, for that GPU; 1 builds it for all of CUDA_TARGETS,
                        and a failed build is fatal; 0 does not. A list like 80,90 builds for those.
    CXX                 the C++ compiler, GCC or Clang; default: the first of c++, g++, clang++ on the path
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
PACKAGE = "kernels/torch-ext/psann_kernels"


def load_native_build():
    spec = importlib.util.spec_from_file_location("native_build", ROOT / PACKAGE / "native_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


native_build = load_native_build()

# Contraction is written out where it is meant (fma), so that every instruction set rounds alike. No -ffast-math: kernels
# promise NaN and infinity; linking with it would flush denormals in the whole process. No -march=native: wheels travel.
COMPILE = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=off -Wall -Wextra -Wno-psabi".split()
)
INSTRUCTION_SETS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    # gcc 12 warns about its own header's undefined vectors.
    "avx512": [
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-mprefer-vector-width=512"),
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
    ],
}
INSTRUCTION_SETS["avx512_bf16"] = [*INSTRUCTION_SETS["avx512"], "-mavx512bf16"]
# The files that make use of a set; without a name here, all do. What is left out is served by avx512's, see dispatch.cpp.
FILES = {"avx512_bf16": ("paged_attention", "muon_rounds")}


CUDA_COMPILE = "-std=c++17 -O3 -Werror all-warnings -Xcompiler -fPIC,-fvisibility=hidden,-Wall".split()
CUDA_TARGETS = (80, 86, 89, 90, 100, 120)


class BuildFailed(Exception):
    """The native part cannot be built; the message says why."""


def find_compiler():
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [[name] for name in ("c++", "g++", "clang++")]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    raise BuildFailed(
        f"no C++ compiler was found (looked for {', '.join(c[0] for c in candidates)}); install g++ or clang, or set CXX"
    )


def find_ninja():
    try:
        import ninja
    except ImportError:
        if shutil.which("ninja"):
            return "ninja"
        raise BuildFailed("ninja is not installed; pip install ninja, or install with build isolation") from None
    return os.path.join(ninja.BIN_DIR, "ninja")


def find_pybind11():
    try:
        import pybind11
    except ImportError:
        raise BuildFailed("pybind11 is not installed; pip install pybind11, or install with build isolation") from None
    return pybind11.get_include()


def instruction_sets(compiler):
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["portable"]
    # GCC before 10 and Clang before 9 know nothing of bf16.
    asked = subprocess.run([*compiler, "-mavx512bf16", "-E", "-x", "c++", os.devnull], capture_output=True)
    return ["portable", "avx2", "avx512", *(["avx512_bf16"] if asked.returncode == 0 else [])]


def ninja_file(folder, compiler, target, source_hash):
    """The build's rules: every csrc/cpu/*.cpp once per instruction set that it makes use of, the rest once."""

    def quote(words):
        return " ".join(shlex.quote(str(w)) for w in words).replace("$", "$$")

    def path(p):
        return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    isas = instruction_sets(compiler)
    flags = [*COMPILE, f"-ffile-prefix-map={ROOT}=.", f"-I{CSRC}"]
    has = [f"-DPSANN_HAS_{isa.upper()}" for isa in isas if isa != "portable"]
    python = [f"-I{find_pybind11()}", f"-I{sysconfig.get_paths()['include']}", f'-DPSANN_SOURCE_HASH="{source_hash}"']
    # What templates of the standard library leave visible stays inside too: nobody else's copy is to be used, nor ours by others.
    (folder / "exports").write_text("{ global: PyInit_*; local: *; };\n")
    link = ["-shared", "-Wl,--version-script=exports", "-pthread", "-ldl"]
    if sys.platform == "darwin":
        link = ["-bundle", "-undefined", "dynamic_lookup", "-Wl,-exported_symbol,_PyInit__native"]
    edges, objects = [], []

    def compile_edge(source, name, extra):
        edges.append(f"build {name}.o: compile {path(source)}\n  extra = {quote(extra)}")
        objects.append(f"{name}.o")

    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        for isa in (isa for isa in isas if source.stem in FILES.get(isa, (source.stem,))):
            compile_edge(source, f"{source.stem}.{isa}", [*INSTRUCTION_SETS[isa], f"-DPSANN_NAMESPACE={isa}"])
    for name in ("threads", "memory", "checks"):
        compile_edge(CSRC / f"{name}.cpp", name, ["-O2"])
    compile_edge(CSRC / "dispatch.cpp", "dispatch", ["-O2", *has])
    for name in ("at_once", "bindings"):
        compile_edge(CSRC / f"{name}.cpp", name, ["-O2", *python])
    (folder / "build.ninja").write_text(
        f"rule compile\n  command = {quote([*compiler, *flags])} $extra -MMD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n"
        f"rule link\n  command = {quote(compiler)} $in -o $out {quote(link)}\n"
        + "\n".join(edges)
        + f"\nbuild {path(target)}: link {' '.join(objects)}\n"
    )


def cuda_targets(wanted):
    """The architectures to compile csrc/cuda for; raises BuildFailed where it is not to be built."""
    if wanted == "0":
        raise BuildFailed("it was installed with PSANN_FAST_CUDA=0, which skips the CUDA kernels")
    if shutil.which("nvcc") is None:
        raise BuildFailed("nvcc is not on the path; install CUDA's toolkit and set PSANN_FAST_CUDA=1")
    if wanted == "1":
        return CUDA_TARGETS
    if wanted != "auto":
        return tuple(sorted(int(word) for word in wanted.split(",")))
    if shutil.which("nvidia-smi") is None:
        raise BuildFailed("no GPU was visible at install; PSANN_FAST_CUDA=1 builds the CUDA kernels all the same")
    asked = subprocess.run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True)
    found = tuple(sorted({int(word.replace(".", "")) for word in asked.stdout.split() if word.replace(".", "").isdigit()}))
    if not found:
        raise BuildFailed("no GPU was visible at install; PSANN_FAST_CUDA=1 builds the CUDA kernels all the same")
    return found


def build_cuda(folder, target, source_hash, targets):
    """Compile csrc/cuda with nvcc, PTX of the newest target included, and link `target`. Raises BuildFailed."""
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    codes = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
    codes.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
    python = [f"-I{find_pybind11()}", f"-I{sysconfig.get_paths()['include']}", f'-DPSANN_SOURCE_HASH="{source_hash}"']
    commands, objects = [], []
    for source in sorted([*(CSRC / "cuda").glob("*.cu"), CSRC / "cuda" / "bindings.cpp"]):
        objects.append(str(folder / f"{source.stem}.cuda.o"))
        own = codes if source.suffix == ".cu" else python
        commands.append(["nvcc", *CUDA_COMPILE, *own, f"-I{CSRC}", "-c", str(source), "-o", objects[-1]])
    # The runtime is linked in, so that no other copy of it is needed; the context is the one that torch made.
    commands.append(["nvcc", "-shared", "-cudart", "static", *objects, "-o", str(target)])
    started = time.monotonic()
    for command in commands:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            print(done.stdout)
            raise BuildFailed(f"nvcc failed: {first_error(done.stdout)}")
    return {"seconds": round(time.monotonic() - started, 1), "bytes": target.stat().st_size, "targets": list(targets)}


def first_error(output):
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next(
        (line for line in lines if "error" in line.lower() and not line.startswith("ninja:")), lines[-1] if lines else "no output"
    )


def build_native(folder, target, source_hash):
    """Compile and link `target`, working in `folder`. Returns what the record keeps; raises BuildFailed."""
    if sys.platform == "win32":
        raise BuildFailed("the kernels are built with GCC or Clang; on Windows psann-fast runs without them")
    if not CSRC.is_dir():
        raise BuildFailed(f"the sources are missing: {CSRC} is no folder")
    compiler, ninja = find_compiler(), find_ninja()
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    ninja_file(folder, compiler, target, source_hash)
    started = time.monotonic()
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[:1]
        done = subprocess.run([ninja, "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildFailed(f"the compiler could not be started: {error}") from error
    print(done.stdout)
    if done.returncode:
        raise BuildFailed(f"{' '.join(compiler)} failed: {first_error(done.stdout)}")
    return {
        "compiler": "".join(version),
        "seconds": round(time.monotonic() - started, 1),
        "bytes": target.stat().st_size,
        "instruction_sets": instruction_sets(compiler),
    }


class BuildNative(build_ext):
    def run(self):
        self.in_source = bool(self.inplace)  # setuptools clears `inplace` while it builds
        super().run()

    def build_extensions(self):
        extension, cuda_extension = self.extensions
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        wanted = os.environ.get("PSANN_FAST_NATIVE", "auto")
        if wanted not in ("0", "1", "auto"):
            raise SystemExit(
                f"PSANN_FAST_NATIVE is {wanted!r}; it must be 0 (build nothing), 1 (fail where the build fails) or auto"
            )
        source_hash = native_build.source_hash(CSRC)
        record = {"status": "skipped", "reason": "it was installed with PSANN_FAST_NATIVE=0, which skips the native kernels"}
        if wanted != "0":
            try:
                details = build_native(Path(self.build_temp).resolve(), target, source_hash)
                record = {"status": "built", "reason": None, **details}
            except BuildFailed as failure:
                if wanted == "1":
                    raise SystemExit(f"PSANN_FAST_NATIVE=1, and the native kernels cannot be built: {failure}") from failure
                print(f"psann-fast installs without native kernels: {failure}")
                record = {"status": "failed", "reason": str(failure)}
        if record["status"] != "built":
            self.extensions.remove(extension)
        record["cuda"] = self.build_cuda_extension(cuda_extension, wanted, record["status"] == "built")
        if record["cuda"]["status"] != "built":
            self.extensions.remove(cuda_extension)
        folders = {target.parent} | ({ROOT / PACKAGE} if self.in_source else set())
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            native_build.write_record(folder, **record, source_hash=source_hash)


    def build_cuda_extension(self, extension, native, is_native_built):
        """What the record says of the CUDA kernels."""
        wanted = os.environ.get("PSANN_FAST_CUDA", "0" if native == "0" else "auto")
        if not (wanted in ("0", "1", "auto") or all(word.isdigit() for word in wanted.split(","))):
            raise SystemExit(f"PSANN_FAST_CUDA is {wanted!r}; it must be 0 (no), 1 (all targets), auto, or targets such as 80,90")
        source_hash = native_build.source_hash(CSRC, cuda=True)
        try:
            targets = cuda_targets(wanted)
            if not is_native_built:
                raise BuildFailed("they are loaded beside the C++ kernels, which were not built")
        except BuildFailed as failure:
            if wanted not in ("0", "auto"):
                raise SystemExit(f"PSANN_FAST_CUDA={wanted}, and the CUDA kernels cannot be built: {failure}") from failure
            return {"status": "skipped", "reason": str(failure), "source_hash": source_hash}
        try:
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            details = build_cuda(Path(self.build_temp).resolve() / "cuda", target, source_hash, targets)
        except BuildFailed as failure:
            if wanted != "auto":
                raise SystemExit(f"PSANN_FAST_CUDA={wanted}, and the CUDA kernels cannot be built: {failure}") from failure
            return {"status": "failed", "reason": str(failure), "source_hash": source_hash}
        return {"status": "built", "reason": None, **details, "source_hash": source_hash}


def sources():
    """Everything of csrc, named as an extension's sources so that an sdist carries it."""
    return sorted(str(p.relative_to(ROOT)) for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))


setup(
    packages=find_packages(include=["psann_fast", "psann_fast.*"]) + ["psann_kernels"],
    package_dir={"psann_kernels": PACKAGE},
    package_data={
        "psann_fast": ["py.typed", "presets/*.yaml", "generate/server/*.html"],
        "psann_kernels": ["py.typed", "metadata.json"],
    },
    ext_modules=[Extension("psann_kernels._native", sources=sources()), Extension("psann_kernels._native_cuda", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
