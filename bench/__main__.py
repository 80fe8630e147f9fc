"""The benchmark suite: `python -m bench --out FOLDER [--sections ops lm peers compile] [--again] [--limit SECONDS]`.

Sections:
  ops      each op's backends beside torch eager and torch.compile
  lm       training and decoding of both bases, tokens a second, per backend
  peers    the same cases beside other libraries' kernels; those that are missing are named
  compile  torch.compile(fullgraph=True) beside eager, and what compiling costs
  device   is everything right on this device: doctor, self-test, parity of every op, compute-sanitizer; times nothing
  lease    all that a short GPU lease is for, in order: device, ops, peers, lm, compile, table and plots

A section stopped by its limit, or by anything else, goes on where it was with the same command. bench/README.md says how to read
a row.
"""

from __future__ import annotations

import argparse
import ast
import os
from pathlib import Path

SECTIONS = ("ops", "lm", "peers", "compile", "device", "lease")


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Imported after the device is chosen: Triton asks for it when the kernels are imported.
    from . import lease, plots, sections

    if "lease" in options.sections:
        lease.run(options)
        return
    for name in options.sections:
        sections.run(name, options)
    plots.draw(options.out)
    print(lease.summary(options.out))


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
