"""The benchmark suite: `python -m bench --out FOLDER [--sections ops lm peers compile] [--again] [--limit SECONDS]`.

Sections:
  ops      each op's backends beside torch eager and torch.compile
  lm       training and decoding of both bases, tokens a second, per backend
  decoding steps of decoding with and without CUDA graphs, and the share of the bandwidth bound, beside transformers
  peers    the same cases beside other libraries' kernels; those that are missing are named
  compile  torch.compile(fullgraph=True) beside eager, and what compiling costs
  device   is everything right on this device: doctor, self-test, parity of every op, compute-sanitizer; times nothing
  gluon    rope_attention's Gluon kernels beside the Triton ones, once their self-test has passed (Hopper)
  lease    all that a short GPU lease is for, in order: device, ops, peers, lm, decoding, compile, gluon, table and plots

--rehearse runs the same code at tiny sizes on the CPU, Triton's kernels in its interpreter: its figures mean nothing, its errors
do.

A section stopped by its limit, or by anything else, goes on where it was with the same command. bench/README.md says how to read
a row.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from pathlib import Path

SECTIONS = ("ops", "lm", "decoding", "peers", "compile", "device", "gluon", "lease")


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.rehearse:
        rehearse(options)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Imported after the device is chosen: Triton asks for it when the kernels are imported.
    from . import lease, plots, sections

    if "lease" in options.sections:
        lease.run(options)
        return
    for name in options.sections:
        sections.run(name, options)
    if not options.part:
        plots.draw(options.out)
        print(lease.summary(options.out))


def rehearse(options: argparse.Namespace) -> None:
    """Tiny sizes, the CPU, two rounds, and a folder whose rows nobody takes for results."""
    results = Path(__file__).parent / "results"
    if results in (options.out.resolve(), *options.out.resolve().parents):
        raise SystemExit(f"bench: --out is {options.out}, and a rehearsal's figures mean nothing; take a folder outside {results}")
    options.device, options.size = "cpu", "tiny"
    options.rounds = 2 if options.rounds is None else options.rounds
    # Triton asks when the kernels are imported; the sections' processes inherit it.
    if "psann_kernels" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    if not options.part:
        print("bench: a rehearsal; the figures mean nothing", flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, epilog=others(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for results (default runs/bench)")
    made.add_argument("--sections", nargs="+", choices=SECTIONS, default=["ops", "lm", "peers", "compile"])
    made.add_argument("--again", action="store_true", help="measure anew what the folder has already")
    made.add_argument("--limit", type=float, default=600.0, help="seconds a section may take (default 600)")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--size", choices=("auto", "gpu", "cpu", "tiny"), default="auto", help="of the cases (auto: as the device)")
    made.add_argument("--rounds", type=int, help="rounds of each row (default 15 on a CPU, 25 on a GPU)")
    made.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds TEXT, such as 'rope_attention'")
    made.add_argument("--rehearse", action="store_true", help="run the code at tiny sizes on the CPU; the figures mean nothing")
    made.add_argument("--part", action="store_true", help=argparse.SUPPRESS)  # of a lease, which tells it all at its end
    made.add_argument("--no-compile", action="store_true", help="leave torch.compile out of ops and peers")
    return made


def others() -> str:
    """The programs of this folder that stand alone."""
    lines = ["Programs of their own (--help tells more):"]
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        is_program = path.stem != "__main__" and any(
            isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body
        )
        if is_program:
            lines.append(f"  python -m bench.{path.stem:<11} {(ast.get_docstring(tree) or '').splitlines()[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
