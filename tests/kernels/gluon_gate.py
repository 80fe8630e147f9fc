"""Compiles the Gluon kernels for sm_90 without a GPU and reads what came out, as gate.py does for the Triton ones.

    PYTHONPATH=kernels/torch-ext python tests/kernels/gluon_gate.py

prints a line of JSON for each configuration of both directions, with the Triton that is found on the path.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Iterator

from gate import specialized

SHARED = 232448  # bytes that one program may have on sm_90
REGISTERS = 65536  # of a multiprocessor


def unsynchronized_arrivals(ptx: str) -> int:
    """Arrivals by one thread after products were waited for, shared memory read or written or a sum added to, without a barrier of
    the partition in between: each warp waits for its own part of a product alone, so one of them cannot say that all are done."""
    found, is_apart = 0, False
    work = r"wgmma\.wait_group|stmatrix|[sl][td]\.shared|(?:atom|red)\.global\.gpu\.relaxed"
    for word in re.findall(rf"{work}|bar\.(?:warp\.)?sync|mbarrier\.arrive\.shared", ptx):
        if word == "mbarrier.arrive.shared":
            found += is_apart
        else:
            is_apart = not word.startswith("bar.")
    return found


def fenced_stores(ptx: str) -> int:
    """Times that a tile is stored to shared memory and fenced for the tensor cores before its barrier is arrived at."""
    store, arrive = r"stmatrix(?:(?!mbarrier\.arrive|bar\.).)*", r"(?:(?!stmatrix).)*?mbarrier\.arrive\.shared"
    return len(re.findall(rf"{store}fence\.proxy\.async{arrive}", ptx, re.S))


def faults(result: dict[str, Any]) -> Iterator[str]:
    """A sentence for each rule that a compilation breaks."""
    what = f"{result['name']}, Triton {result['triton']}"
    if result["shared"] > SHARED:
        yield f"{what}: {result['shared']} bytes of shared memory; sm_90 has {SHARED}"
    if result["stack"]:
        yield f"{what}: spills {result['stack']} bytes a thread"
    if result["registers"] * 32 * result["warps"] > REGISTERS:
        yield f"{what}: {result['registers']} registers in {result['warps']} warps; a multiprocessor has {REGISTERS}"
    for instruction in ("HGMMA", "UTMALDG", "USETMAXREG"):
        if not result[instruction]:
            yield f"{what}: has no {instruction}"
    if result["asynchronous waits"] < 2 and "one query" not in result["name"]:  # which needs no loop
        yield f"{what}: no loop waits for the older of two products, so nothing runs beside the exponentials"
    if result["unsynchronized arrivals"]:
        yield f"{what}: {result['unsynchronized arrivals']} arrivals at barriers before all warps are done with what they announce"
    if "backward" in result["name"]:
        # Each consumer stores dS once, and adds dQ by instructions that do not wait for what was there.
        if result["fenced stores"] != 2:
            yield f"{what}: {result['fenced stores']} fenced stores of dS; each of two consumers has one"
        if not (result["acquires"] and result["releases"]):
            yield f"{what}: {result['acquires']} acquires and {result['releases']} releases; the order of dQ needs both"
        if not result["REDG.E.ADD.F32x2"]:
            yield f"{what}: has no REDG.E.ADD.F32x2, so dQ is not added two elements at a time"


def compile_one(configuration: Any) -> dict[str, Any]:
    import sass
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    signature, constexprs, attributes = specialized(configuration)
    compiled = triton.compile(
        GluonASTSource(configuration.kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": configuration.num_warps, "num_stages": configuration.num_stages, "enable_fp_fusion": True},
    )
    code = sass.disassemble(compiled.asm["cubin"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return {
        "name": configuration.name,
        "triton": triton.__version__,
        "registers": code.registers,
        "stack": code.stack,
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        **{instruction: code.count(instruction) for instruction in ("HGMMA", "UTMALDG", "USETMAXREG", "REDG.E.ADD.F32x2")},
        "asynchronous waits": sum(i.name == "WARPGROUP.DEPBAR.LE" and i.operands.endswith("0x1") for i in code.instructions),
        "unsynchronized arrivals": unsynchronized_arrivals(compiled.asm["ptx"]),
        "fenced stores": fenced_stores(compiled.asm["ptx"]),
        "acquires": len(re.findall(r"(?:ld|atom)\.global\.gpu\.acquire", compiled.asm["ptx"])),
        "releases": len(re.findall(r"(?:red|atom)\.global\.gpu\.release", compiled.asm["ptx"])),
    }


def main() -> None:
    from psann_kernels import rope_attention_backward_gluon, rope_attention_gluon

    for configuration in [*rope_attention_gluon.configurations(), *rope_attention_backward_gluon.configurations()]:
        print("RESULT " + json.dumps(compile_one(configuration)), flush=True)


if __name__ == "__main__":
    main()
