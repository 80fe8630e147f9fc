"""The offline gate: compiles every configuration that dispatch can choose, without a GPU, and reads what came out.

    python tests/kernels/gate.py --targets sm_90,sm_80 --triton-path FOLDER --report table.md

Each *_triton.py lists its configurations; the gate compiles exactly those, in processes of their own, with the Triton that is
installed and the one under --triton-path (`pip install --no-deps --target FOLDER triton==3.6.0`). Results are kept in a cache by
source, Triton version and target. What is asserted: shared memory within the target's limit; no spilled registers on sm_80 and
sm_90; tensor-core instructions where the tiles allow them; TMA loads where there are descriptors; no TF32; instructions of the
sine kernels within budget; no 32-bit product in an address; on sm_90, two programs a multiprocessor where tiles count on them.

Instructions per element are static ones: of the main loop where there is one, else of the whole kernel with its prologue,
divided by the elements that a thread handles in a pass (tile / 32 / warps). Every thread runs all of them, as nothing branches.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "torch-ext" / "psann_kernels"
MOST_CONFIGURATIONS = 100
SECONDS_PER_COMPILE = 900  # a guard against hanging, generous because machines are shared


@dataclass(frozen=True)
class Target:
    backend: str
    arch: int | str
    warp: int
    shared: int  # bytes that one program may have


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166912),
    "sm_90": Target("cuda", 90, 32, 232448),
    "sm_100": Target("cuda", 100, 32, 232448),
    "sm_120": Target("cuda", 120, 32, 101376),
    "gfx942": Target("hip", "gfx942", 64, 65536),
}

# (configuration, target): bytes of stack a thread that are known and accepted, and why.
_WIDE = "float32 heads of 256: two tiles of 256 columns and their sums do not fit 255 registers; smaller tiles than 16 do not exist"
_ROUNDED = "Triton 3.6.0 alone, since bounds are rounded to tiles in 64 bits; outside the loop over tiles"
SPILLS: dict[tuple[str, str], tuple[int, str]] = {
    ("rope_attention dq full fp32 D=256", "sm_80"): (936, _WIDE),
    ("rope_attention dq full fp32 D=256", "sm_90"): (976, _WIDE),
    ("paged_attention split fp32 D=256 ROTARY=pairs BLOCK_SIZE=16 GROUP=2", "sm_90"): (8, _WIDE + " (Triton 3.6.0 alone)"),
    ("rope_attention dk_dv full bf16 D=32", "sm_90"): (104, _ROUNDED),
    ("rope_attention dk_dv full bf16 D=128", "sm_90"): (16, _ROUNDED),
}

# The programs that a multiprocessor of sm_90 must hold at a time: one computes while another waits or finishes.
RESIDENT = {
    "damped_sine_mlp forward bf16 by descriptors": 2,
    "damped_sine_mlp forward bf16 without z by descriptors": 2,
    "damped_sine_mlp backward bf16 by descriptors": 2,
}

# Per element on sm_90, whole rows of a multiple of 16: how a name begins, and dtype -> (instructions, special function results).
SINE_BUDGETS = {
    "damped_sine forward": {"bf16": (24, 2), "fp16": (24, 2), "fp32": (40, 1)},
    "damped_sine backward": {"bf16": (36, 3), "fp16": (36, 3), "fp32": (60, 1)},
}


@dataclass
class Result:
    """What one compilation gave. `error` is empty if it succeeded; `unsafe` names 32-bit products in addresses."""

    name: str
    target: str
    triton: str
    error: str = ""
    registers: int = 0
    stack: int = 0
    shared: int = 0
    warps: int = 0
    instructions: int = 0
    per_element: float = 0.0
    mufu_per_element: float = 0.0
    hgmma: int = 0
    hmma: int = 0
    tf32: int = 0
    descriptors: int = 0  # among the arguments
    tma: int = 0
    dots: list[dict[str, Any]] = field(default_factory=list)
    unsafe: list[str] = field(default_factory=list)

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor of sm_90 holds at a time: 64 Ki registers, given to a warp by 256, and 228 KiB, of which
        each program takes one more."""
        return min(65536 // (-(-self.registers // 8) * 8 * 32 * self.warps), 233472 // (self.shared + 1024))

    def faults(self) -> list[str]:
        """A sentence for each rule that this compilation breaks."""
        return [f"{self.name}, {self.target}, Triton {self.triton}: {fault}" for fault in self._faults()]

    def _faults(self) -> Iterator[str]:
        if self.error:
            yield self.error
            return
        limit = TARGETS[self.target].shared
        if self.shared > limit:
            yield f"{self.shared} bytes of shared memory; {self.target} has {limit}"
        accepted, _ = SPILLS.get((self.name, self.target), (0, ""))
        if self.target in ("sm_80", "sm_90") and self.stack > accepted:
            yield f"spills {self.stack} bytes a thread, {accepted} accepted"
        if self.tf32:
            yield f"{self.tf32} TF32 instructions; float32 products must be exact"
        yield from self.unsafe
        if self.descriptors and self.target.startswith("sm_") and not self.tma:
            yield f"has {self.descriptors} tensor descriptors and no UTMALDG; tiles must be read by the tensor memory accelerator"
        if self.target == "sm_90":
            half = [dot for dot in self.dots if dot["dtype"] in ("f16", "bf16")]
            if any(dot["m"] >= 64 for dot in half) and not self.hgmma:
                yield f"a half-precision product of at least 64 rows does not use HGMMA: {half}"
            if any(dot["m"] < 64 for dot in half) and not self.hmma:
                yield f"a half-precision product of fewer than 64 rows does not use HMMA: {half}"
            if self.name in RESIDENT and self.resident < RESIDENT[self.name]:
                yield (
                    f"{self.resident} programs a multiprocessor, {RESIDENT[self.name]} needed: {self.registers} registers, "
                    f"{self.shared} bytes of shared memory"
                )
            yield from self._budget_faults()

    def _budget_faults(self) -> Iterator[str]:
        for start, budgets in SINE_BUDGETS.items():
            if self.name.startswith(start) and not self.name.endswith("unaligned"):
                instructions, mufu = next(budget for dtype, budget in budgets.items() if f" {dtype} " in self.name)
                if self.per_element > instructions:
                    yield f"{self.per_element:.1f} instructions per element, {instructions} allowed"
                if self.mufu_per_element > mufu:
                    yield f"{self.mufu_per_element:.2f} special function results per element, {mufu} allowed"


# ---- in the worker's process, where the Triton under test is the one imported


def configurations(file: str | None) -> list[Any]:
    """The table: what every *_triton.py of psann_kernels lists, or only the Python file given."""
    if file is not None:
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.configurations()
    listing = [module for module in triton_modules() if hasattr(module, "configurations")]
    return [configuration for module in listing for configuration in module.configurations()]


def triton_modules() -> list[Any]:
    return [importlib.import_module(f"psann_kernels.{path.stem}") for path in sorted(PACKAGE.glob("*_triton.py"))]


def unlisted(table: list[Any]) -> list[str]:
    """Kernels of psann_kernels (what launchers start is called ..._kernel) of which the table has no configuration."""
    listed = {(c.kernel.fn.__module__, c.kernel.__name__) for c in table}
    kernels = {
        (value.fn.__module__, name)
        for module in triton_modules()
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "cache_key")
    }
    return sorted(f"{module}.{name}" for module, name in kernels - listed)


def key_of(configuration: Any, target: str) -> str:
    """Changes with anything that a compilation depends on: source of kernel and gate, options, Triton, target."""
    import triton

    here = Path(__file__).parent
    parts = [triton.__version__, target, str(dataclasses.astuple(dataclasses.replace(configuration, kernel=None)))]
    parts += [configuration.kernel.cache_key, Path(configuration.kernel.fn.__code__.co_filename).read_text()]
    parts += [path.read_text() for path in (PACKAGE / "triton_support.py", here / "gate.py", here / "sass.py", here / "ttir.py")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def specialized(configuration: Any) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """The signature, constants and attributes that a compiler takes, from hints such as "i32:16" and "i32:1"."""
    signature, constexprs, attributes = {}, dict(configuration.constexprs), {}
    for place, name in enumerate(configuration.kernel.arg_names):
        kind, _, hint = configuration.signature.get(name, "constexpr").partition(":")
        signature[name] = kind
        if hint == "16":
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif hint == "1":
            signature[name], constexprs[name] = "constexpr", 1
    return signature, constexprs, attributes


def compile_one(configuration: Any, target_name: str) -> Result:
    import sass
    import triton
    import ttir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = TARGETS[target_name]
    arguments = list(configuration.signature) + list(configuration.constexprs)
    if sorted(arguments) != sorted(configuration.kernel.arg_names):
        raise ValueError(
            f"{configuration.name}: lists the arguments {arguments}, the kernel takes {configuration.kernel.arg_names}"
        )
    signature, constexprs, attributes = specialized(configuration)
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(
        ASTSource(fn=configuration.kernel, signature=signature, constexprs=constexprs, attrs=attributes),
        target=GPUTarget(target.backend, target.arch, target.warp),
        options=options,
    )
    result = Result(configuration.name, target_name, triton.__version__)
    result.shared, result.warps = compiled.metadata.shared, configuration.num_warps
    text = compiled.asm.get("ttir", "")
    result.unsafe = ttir.unsafe_addresses(text)
    result.dots = [dataclasses.asdict(dot) for dot in ttir.dots(text)]
    if target.backend == "cuda":
        code = sass.disassemble(compiled.asm["cubin"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
        counted = code.main_loop() or code.instructions
        elements = constexprs.get("BLOCK_R", 1) * constexprs.get("BLOCK_F", 1) / (configuration.num_warps * target.warp)
        result.registers, result.stack, result.instructions = code.registers, code.stack, len(code.instructions)
        result.per_element, result.mufu_per_element = len(counted) / elements, sass.count(counted, "MUFU") / elements
        result.hgmma, result.hmma = code.count("HGMMA"), code.count("HMMA")
        result.tf32 = sum("TF32" in instruction.name for instruction in code.instructions)
        result.descriptors, result.tma = sum(kind.startswith("tensordesc") for kind in signature.values()), code.count("UTMALDG")
    else:
        notes = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", compiled.asm["amdgcn"]))
        result.registers, result.stack = int(notes["vgpr_count"]), int(notes["private_segment_fixed_size"])
    return result


def work(file: str | None, backend: str) -> None:
    """Answers, one line of JSON each, the requests on standard input: "table TARGET" and "compile NAME TARGET"."""
    import torch

    if backend == "hip":
        torch.version.hip = "offline"  # what kernels that differ between the two makers look at
    import triton
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    table = {configuration.name: configuration for configuration in configurations(file)}
    for line in sys.stdin:
        request, *words = json.loads(line)
        if request == "table":
            (target,) = words
            chosen = [c for c in configurations(file) if c.targets is None or target in c.targets]
            answer = {"triton": triton.__version__, "keys": [(c.name, key_of(c, target)) for c in chosen]}
            answer["unlisted"] = [] if file else unlisted(list(table.values()))
        else:
            name, target = words
            try:
                answer = dataclasses.asdict(compile_one(table[name], target))
            except (CompilationError, PTXASError, OutOfResources, RuntimeError) as error:
                answer = dataclasses.asdict(Result(name, target, triton.__version__, error=f"does not compile: {error}"))
        print("ANSWER " + json.dumps(answer), flush=True)


# ---- in the gate's process


class Worker:
    """One compiling process; started anew for the next request if the compiler took it down."""

    def __init__(self, triton_path: Path | None, kernels: Path | None, backend: str) -> None:
        self.command = [sys.executable, __file__, "--worker", backend] + (["--kernels", str(kernels)] if kernels else [])
        self.folder = tempfile.TemporaryDirectory(prefix="gate")
        paths = [str(triton_path)] if triton_path else []
        self.environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self.environment |= {"TRITON_CACHE_DIR": self.folder.name, "PYTHONPATH": os.pathsep.join([*paths, str(PACKAGE.parent)])}
        self.environment["TRITON_DEFAULT_FP_FUSION"] = "1"
        self.process: subprocess.Popen[str] | None = None

    def ask(self, *request: str) -> dict[str, Any] | str:
        """The answer, or a sentence saying how the process ended instead."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment
            )
            self.errors: list[str] = []
            threading.Thread(target=self._drain, args=(self.process,), daemon=True).start()
        process = self.process
        timer = threading.Timer(SECONDS_PER_COMPILE, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith("ANSWER "):
                    return json.loads(line.removeprefix("ANSWER "))
        except BrokenPipeError:
            pass  # it ended before it read the request; its exit status, below, tells more
        finally:
            timer.cancel()
        status, self.process = process.wait(), None
        return f"the compiling process ended with status {status}: {''.join(self.errors)[-2000:]}"

    def _drain(self, process: subprocess.Popen[str]) -> None:
        for line in process.stderr:
            self.errors.append(line)

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()
        self.folder.cleanup()


def run(
    targets: list[str], cache: Path, triton_path: Path | None = None, kernels: Path | None = None, workers: int = 2, only: str = ""
) -> list[Result]:
    """Compile the table for each target, or take it from the cache.

    targets      names from TARGETS
    cache        folder that keeps results; made if it does not exist
    triton_path  folder of another Triton, None for the installed one
    kernels      a Python file with configurations() to compile instead of psann_kernels' table
    workers      processes that compile side by side
    only         leave out configurations whose names begin otherwise

    Raises RuntimeError if the table cannot be read, ValueError if it is too long, a name comes twice or a kernel is missing.
    """
    cache.mkdir(parents=True, exist_ok=True)
    local = threading.local()
    started: list[Worker] = []

    def worker(backend: str) -> Worker:
        if not hasattr(local, "workers"):
            local.workers = {}
        if backend not in local.workers:
            local.workers[backend] = Worker(triton_path, kernels, backend)
            started.append(local.workers[backend])
        return local.workers[backend]

    def compile_or_recall(job: tuple[str, str, str, str]) -> Result:
        name, key, target, version = job
        kept = cache / f"{key}.json"
        if not kept.exists():
            answer = worker(TARGETS[target].backend).ask("compile", name, target)
            if isinstance(answer, str):
                return Result(name, target, version, error=answer)  # not kept: it may have been killed from outside
            part = kept.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
            part.write_text(json.dumps(answer))
            part.replace(kept)
        return Result(**json.loads(kept.read_text()))

    try:
        jobs = []
        for target in targets:
            table = worker(TARGETS[target].backend).ask("table", target)
            if isinstance(table, str):
                raise RuntimeError(f"the table of configurations cannot be read: {table}")
            names = [name for name, _ in table["keys"]]
            if len(names) > MOST_CONFIGURATIONS or len(set(names)) < len(names):
                twice = sorted({name for name in names if names.count(name) > 1})
                raise ValueError(f"{len(names)} configurations, at most {MOST_CONFIGURATIONS} allowed; named twice: {twice}")
            if table["unlisted"] and not only:
                raise ValueError(f"no configuration of {', '.join(table['unlisted'])}; list them in configurations()")
            jobs += [(name, key, target, table["triton"]) for name, key in table["keys"] if name.startswith(only)]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(compile_or_recall, jobs))
    finally:
        for each in started:
            each.close()


def table_of(results: list[Result]) -> str:
    """The results as a Markdown table."""
    heads = (
        "kernel", "target", "Triton", "registers", "stack", "shared", "instr / element", "MUFU / element", "HGMMA", "HMMA",
        "UTMALDG", "error",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for r in results:
        is_sine = r.per_element and r.name.startswith(tuple(SINE_BUDGETS))
        per_element = (f"{r.per_element:.1f}", f"{r.mufu_per_element:.2f}") if is_sine else ("", "")
        error = r.error.splitlines()[0] if r.error else ""
        cells = (r.name, r.target, r.triton, r.registers, r.stack, r.shared, *per_element, r.hgmma, r.hmma, r.tma, error)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "psann-fast"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="sm_90", help=f"comma-separated, of {', '.join(TARGETS)}")
    parser.add_argument("--triton-path", type=Path, help="folder of another Triton to compile with, besides the installed one")
    parser.add_argument("--kernels", type=Path, help="a Python file with configurations(), instead of psann_kernels")
    parser.add_argument("--only", default="", help="how the names of the configurations to compile begin")
    parser.add_argument("--report", type=Path, help="where to write the table")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--worker", metavar="BACKEND", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.kernels and str(options.kernels), options.worker)
        return 0
    results = []
    for path in dict.fromkeys((None, options.triton_path)):
        results += run(options.targets.split(","), default_cache() / "gate", path, options.kernels, options.workers, options.only)
    table = table_of(results)
    print(table, end="")
    if options.report:
        options.report.write_text(table)
    faults = [fault for result in results for fault in result.faults()]
    print("\n".join([f"{len(results)} compilations, {len(faults)} faults", *faults]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
