"""One section, from options to its file."""

from __future__ import annotations

import argparse

import torch

from . import compiling, decoding, device, gluon, lm, ops, peers, suite
from .timing import CPUTimer, CUDATimer

SECTIONS = {
    "ops": ops.ops_section,
    "peers": peers.peers_section,
    "lm": lm.lm_section,
    "decoding": decoding.decoding_section,
    "compile": compiling.compile_section,
    "device": device.device_section,
    "gluon": gluon.gluon_section,
}


def run(section: str, options: argparse.Namespace) -> suite.Report:
    bench = bench_of(options)
    choices = {"rehearsal": True} if options.rehearse else {}
    choices |= {"size": bench.size, "rounds": bench.timer.rounds, "only": options.only, "has_compile": bench.has_compile}
    versions = {name: peers.installed(name) or "absent" for name in peers.SOUGHT} if section == "peers" else {}
    current = suite.conditions_of(section, **choices, peers=versions)
    return suite.run_section(options.out, section, SECTIONS[section](bench), current, again=options.again, limit=options.limit)


def bench_of(options: argparse.Namespace) -> ops.Bench:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "bench: --device cuda, and torch sees no GPU here (torch.cuda.is_available() is False); leave --device out"
        )
    has_gpu = options.device != "cpu" and torch.cuda.is_available()
    timer = CUDATimer() if has_gpu else CPUTimer()
    if options.rounds is not None:
        timer.rounds = options.rounds
    size = options.size if options.size != "auto" else "gpu" if has_gpu else "cpu"
    return ops.Bench(torch.device("cuda" if has_gpu else "cpu"), size, timer, options.only, not options.no_compile)
