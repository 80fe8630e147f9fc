"""The benchmark suite: `python -m bench --out FOLDER [--sections ops lm peers compile] [--again] [--limit SECONDS]`.

Sections:
  ops      each op's backends beside torch eager and torch.compile
  lm       training and decoding of both bases, tokens a second, per backend
  peers    the same cases beside other libraries' kernels; those that are missing are named
  compile  torch.compile(fullgraph=True) beside eager, and what compiling costs
  lease    all that a short GPU lease is for, in order

A section stopped by its limit, or by anything else, goes on where it was with the same command. bench/README.md says how to read
a row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

SECTIONS = ("ops", "lm", "peers", "compile", "lease")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for results (default runs/bench)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=["ops", "lm", "peers", "compile"])
    parser.add_argument("--again", action="store_true", help="measure anew what the folder has already")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a section may take (default 600)")
    options = parser.parse_args()
    raise SystemExit(f"bench: the sections {', '.join(options.sections)} are being written")


if __name__ == "__main__":
    main()
