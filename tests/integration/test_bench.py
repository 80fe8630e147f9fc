"""The benchmark suite itself: rows and their conditions, going on where a run stopped, wrong kernels not timed, and the parts that
need a GPU on stand-ins for it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psann_kernels
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench import __main__ as command  # noqa: E402 (bench is no installed package)
from bench import (  # noqa: E402
    cases, cases_attention, check, compiling, decoding, device, gluon, lease, lm, ops, peers, plots, sections, suite, timing,
)  # fmt: skip

CONDITIONS = {"section": "ops", "commit": "abc", "date": "2026-01-01"}


def options(folder, *words):
    return command.parser().parse_args(
        ["--out", str(folder), "--device", "cpu", "--size", "tiny", "--no-compile", "--rounds", "5", *words]
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def tiny(only=""):
    return ops.Bench(torch.device("cpu"), "tiny", timing.CPUTimer(rounds=5), only, has_compile=False)


def only_case(name):
    return next(case for case in tiny(name).cases())


# -- a section, end to end ----------------------------------------------------------------------------------------------------


def test_a_section_writes_rows_and_is_not_measured_twice(tmp_path, capsys, monkeypatch):
    now = suite.conditions_of("ops")
    monkeypatch.setattr(suite, "conditions_of", lambda section, **choices: now | choices)  # whoever edits the tree meanwhile
    chosen = options(tmp_path, "--only", "rms_norm 32x48 float32")
    sections.run("ops", chosen)
    path = tmp_path / "ops.jsonl"
    first, *rest = lines(path)
    assert {"device", "versions", "commit", "date", "sources", "size"} <= set(first["conditions"])
    timed = [row for row in rest if "median_ms" in row]
    assert {(row["backend"], row["direction"]) for row in timed} >= {("torch", "forward"), ("torch", "backward")}
    for row in timed:
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["of_copy"] == pytest.approx(row["gb_per_s"] / row["copy_gb_per_s"])
        assert row["error_share"] <= 1
    assert sum(row["is_auto"] for row in timed) == 2
    assert any(row.get("refused") == "left out by --no-compile" for row in rest)
    assert "complete" in rest[-1]

    before = path.read_bytes()
    sections.run("ops", chosen)
    assert "complete in" in capsys.readouterr().out and path.read_bytes() == before
    chosen.again = True
    sections.run("ops", chosen)
    assert path.read_bytes() != before
    assert "rms_norm" in lease.summary(tmp_path)
    assert [p.name for p in plots.draw(tmp_path)] == ["roofline.png", "bars-rms_norm.png"]


def test_every_tiny_case_is_right_on_the_cpu(tmp_path):
    """Not timed: what each formula and crop of the cases claims."""
    for case in tiny().cases():
        if not isinstance(case, str):
            wrong, share = check.Judge(case).verdict(case.call("torch"))
            assert wrong is None, f"{case.name}: {wrong}"
            assert share <= 1


def test_the_gpu_cases_are_those_of_the_targets():
    """Described, not made: their tensors fill a GPU."""
    found = [case for case in cases.cases("gpu", torch.device("cpu")) if not isinstance(case, str)]
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    sine = [case for case in found if case.op == "damped_sine"]
    assert all(case.bytes["forward"] >= 64 << 20 for case in sine) and {case.dtype for case in sine} == {
        torch.float32,
        torch.bfloat16,
    }
    headline = next(case for case in found if case.name == "rope_attention B2 T8192 H64/8 D128 causal bfloat16")
    assert headline.flops["forward"] == 4 * 2 * 64 * 128 * 8192 * 8193 // 2 and headline.crop is not None
    assert headline.flops["backward"] == headline.flops["forward"] * 5 // 2
    grid = [case for case in found if case.op == "paged_attention"]
    assert len(grid) == 32 and max(case.bytes["forward"] for case in grid) < 70e9


# -- going on -----------------------------------------------------------------------------------------------------------------


def run_suite(folder, measured, *, names="abc", conditions=CONDITIONS, **more):
    def case(name):
        return name, lambda: measured.append(name) or [{"row": name}]

    return suite.run_section(folder, "ops", [case(name) for name in names], conditions, say=lambda _: None, **more)


def test_a_section_stops_between_rows_and_goes_on(tmp_path):
    ticks = iter([0.0, 1.0, 2.0, 11.0, 12.0, 13.0])
    measured = []
    report = run_suite(tmp_path, measured, limit=10.0, clock=lambda: next(ticks))
    assert measured == ["a", "b"] and not report.is_complete
    assert "stopped" in lines(tmp_path / "ops.jsonl")[-1]
    report = run_suite(tmp_path, measured, conditions=CONDITIONS | {"date": "2026-01-02"})
    assert measured == ["a", "b", "c"] and report.is_complete
    assert [row["row"] for row in report.rows] == ["a", "b", "c"]


def test_other_conditions_begin_again(tmp_path):
    measured = []
    run_suite(tmp_path, measured)
    run_suite(tmp_path, measured, conditions=CONDITIONS | {"commit": "def"})
    assert measured == list("abcabc")
    assert lines(tmp_path / "ops.jsonl")[0]["conditions"]["commit"] == "def"


def test_a_case_that_killed_the_process_is_passed_over(tmp_path):
    def dies():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suite.run_section(tmp_path, "ops", [("a", dies)], CONDITIONS, say=print)
    with (tmp_path / "ops.jsonl").open("a") as file:
        file.write('{"row": "cut of')  # and the disk had taken half a line
    measured = []
    report = run_suite(tmp_path, measured)
    assert measured == ["b", "c"]
    assert report.rows[0] == {"case": "a", "failed": "the process ended while this case ran"}
    assert all(lines(tmp_path / "ops.jsonl"))


def test_a_failing_case_is_a_row_and_a_lost_device_ends_the_run(tmp_path):
    def fails(error):
        def measure():
            raise error

        return measure

    report = suite.run_section(tmp_path, "ops", [("a", fails(RuntimeError("no kernel")))], CONDITIONS, say=lambda _: None)
    assert report.rows == [{"case": "a", "failed": "RuntimeError: no kernel"}] and report.is_complete
    with pytest.raises(SystemExit, match="device failed in 'b'"):
        suite.run_section(
            tmp_path, "peers", [("b", fails(torch.AcceleratorError("illegal access")))], CONDITIONS, say=lambda _: None
        )
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is no row
        suite.run_section(tmp_path, "lm", [("c", lambda: 1 / 0)], CONDITIONS, say=lambda _: None)


# -- correctness before time --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["output", "gradient"])
def test_a_wrong_kernel_is_not_timed(direction):
    case = only_case("damped_sine 32x48 float32")
    right = case.call("torch")

    def wrong(z, *parameters):
        y = right(z, *parameters)
        return y + 0.01 * y.detach() if direction == "output" else y + 0.001 * (z - z.detach())

    rows = ops.measure(tiny(), case, {"torch": right, "wrong": wrong, "absent": "absent: x 1.0 was sought"})
    told = {row["backend"]: row for row in rows}
    assert direction in told["wrong"]["wrong"] and "median_ms" not in told["wrong"]
    assert told["absent"]["refused"] == "absent: x 1.0 was sought"
    assert told["torch"]["median_ms"] > 0
    told = {row["backend"]: row for row in ops.measure(tiny(), case, {"native": wrong, "torch": right})}
    assert "wrong" in told["native"] and not told["torch"]["is_auto"]  # auto would run the wrong one


def test_others_are_timed_a_little_beyond_our_bound_and_ours_are_not():
    case = only_case("damped_sine 32x48 float32")
    right = case.call("torch")
    allowed = float(check.Judge(case).verdict(lambda *a: right(*a) + 0.01 * (a[0] / a[0]).detach())[1])
    off = 0.01 * 5 / allowed  # five times what is allowed
    rough = lambda *a: right(*a) + off  # noqa: E731
    told = {row["backend"]: row for row in ops.measure(tiny(), case, {"native": rough, "liger": rough})}
    assert "output 0" in told["native"]["wrong"]
    assert told["liger"]["median_ms"] > 0 and told["liger"]["error_share"] == pytest.approx(5, rel=0.2)


def test_what_raises_is_a_row_and_a_limit_is_not_checked():
    case = only_case("damped_sine 32x48 float32")

    def raises(*arguments):
        raise RuntimeError("out of shared memory\nand more")

    rows = ops.measure(
        tiny(), case, {"torch": case.call("torch"), "raises": raises, "limit": ops.Limit(lambda z, a, f, d: z * (a + f + d))}
    )
    told = {row["backend"]: row for row in rows}
    assert told["raises"]["failed"] == "RuntimeError: out of shared memory"
    assert told["limit"]["error_share"] is None and told["limit"]["median_ms"] > 0


def test_a_part_of_a_large_call_is_judged_like_the_whole():
    """crop at small sizes: the witnesses of a part meet the same part of the results."""
    whole = next(c for c in cases_attention.paged_attention_cases("parity", torch.device("cpu")) if c.shape.startswith("B3"))
    assert check.Judge(whole).verdict(whole.call("torch"))[0] is None
    shifted = lambda *a: torch.roll(whole.call("torch")(*a), 1, 0)  # noqa: E731
    assert "output 0" in check.Judge(whole).verdict(shifted)[0]
    attention = cases_attention._attention_case(torch.device("cpu"), 2, 2050, 4, 2, 4, 16, True, torch.float32)
    results = [torch.zeros(2, 2050, heads, 4) for heads in (4, 4, 2, 2)]
    assert [tuple(r.shape) for r in attention.crop_results(results)] == [(1, 2050, 2, 4)] * 2 + [(1, 2050, 1, 4)] * 2
    arguments, gradients = attention.crop(*attention.make(0))
    assert [t.shape[2] for t in (*arguments[:3], *gradients)] == [2, 1, 1, 2]


# -- time ---------------------------------------------------------------------------------------------------------------------


def test_cpu_rounds_take_turns_rotate_copies_and_stop_in_time():
    called, now = [], [0.0]

    def prepared(name, copy, seconds):
        def call():
            called.append((name, copy))
            now[0] += seconds

        return lambda: call

    timer = timing.CPUTimer(rounds=50, patience=1.0, clock=lambda: now[0])
    times = timer.race(
        {"slow": [prepared("slow", i, 0.2) for i in range(3)], "fast": [prepared("fast", i, 1.1e-4) for i in range(2)]}
    )
    assert len(times["slow"].seconds) == len(times["fast"].seconds) == timing.MIN_ROUNDS
    assert times["slow"].median() == pytest.approx(0.2) and times["fast"].median() == pytest.approx(1.1e-4)
    timed = called[4:]  # the first two of each warm up
    assert timed[0] == ("slow", 0) and timed[1:6] == [("fast", i % 2) for i in range(5)] and timed[6] == ("slow", 1)


def test_percentiles_and_copies():
    times = timing.Times([4.0, 1.0, 3.0, 2.0, 5.0], "calls")
    assert (times.median(), times.percentile(0), times.percentile(90)) == (3.0, 1.0, pytest.approx(4.6))
    assert timing.copies_beyond(100, 1) == 64 and timing.copies_beyond(100, 1000) == 2 and timing.copies_beyond(100, 20) == 10
    pairs = cases_attention.seen_pairs
    assert pairs(5, None) == 15 and pairs(5, 2) == 9 and pairs(5, 9) == 15


class FakeCUDA:
    """Enough of torch.cuda for CUDATimer: time passes as calls say, graphs replay what was captured between enter and exit."""

    def __init__(self, refuses=None):
        self.now, self.refuses, self.captured, self.replays, self.synchronized = 0.0, refuses, None, 0, 0
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                self.at = cuda.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        class CUDAGraph:
            def __init__(self):
                self.calls = []

            def replay(self):
                cuda.replays += 1
                cuda.now += sum(self.calls)

        self.Event, self.CUDAGraph = Event, CUDAGraph
        self.Stream = lambda: SimpleNamespace(wait_stream=lambda other: None)

    def current_device(self):
        return 0

    def get_device_properties(self, index):
        return SimpleNamespace(L2_cache_size=100)

    def current_stream(self):
        return None

    def stream(self, stream):
        return contextlib.nullcontext()

    def synchronize(self):
        self.synchronized += 1

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.captured = graph
        try:
            yield
            if self.refuses is not None:
                raise RuntimeError(self.refuses)
        finally:
            self.captured = None

    def work(self, seconds):
        """A kernel of so many seconds, launched or captured."""
        if self.captured is not None:
            self.captured.calls.append(seconds)
        else:
            self.now += seconds + 1e-3  # launching from Python costs a millisecond here


@pytest.mark.parametrize(
    "refuses, seconds, how", [(None, 5e-6, "graph"), ("cannot capture\nthis", 5e-6 + 1e-3, "events (cannot capture)")]
)
def test_gpu_times_come_from_graphs_or_say_why_not(refuses, seconds, how):
    cuda = FakeCUDA(refuses)
    timer = timing.CUDATimer(rounds=7, cuda=cuda)
    assert timer.cache_bytes == 100
    times = timer.race({"op": [lambda: lambda: cuda.work(5e-6)] * 3, "copy": [lambda: lambda: cuda.work(1e-3)]})
    assert times["op"].median() == pytest.approx(seconds) and times["op"].how == how
    assert len(times["op"].seconds) == 7
    assert cuda.replays == (0 if refuses else 2 + 14) and cuda.synchronized == (2 if refuses else 0)


def test_memory_beyond_what_was_there():
    held, peak = [100], [900]

    def call():
        peak[0] = held[0] + 50

    cuda = SimpleNamespace(
        synchronize=lambda: None, memory_allocated=lambda: held[0], max_memory_allocated=lambda: peak[0],
        reset_peak_memory_stats=lambda: peak.__setitem__(0, held[0]),
    )  # fmt: skip
    assert timing.extra_bytes(call, cuda) == 50
    assert timing.extra_bytes(lambda: None, cuda) == 0


def test_rows_of_a_gpu(monkeypatch):
    """The whole way from a case to its rows with a GPU's timer; the tensors are a CPU's, and every graph takes 20 ms."""
    cuda = FakeCUDA()
    replay = cuda.CUDAGraph.replay
    monkeypatch.setattr(cuda.CUDAGraph, "replay", lambda graph: (replay(graph), setattr(cuda, "now", cuda.now + 0.02)))
    bench = ops.Bench(torch.device("cpu"), "tiny", timing.CUDATimer(rounds=5, cuda=cuda), has_compile=False)
    case = only_case("rope_attention")
    rows = [row for row in ops.measure(bench, case, {"torch": case.call("torch")}) if "median_ms" in row]
    assert [(row["direction"], row["timing"], row["rounds"]) for row in rows] == [("forward", "graph", 5), ("backward", "graph", 5)]
    for row in rows:
        assert row["median_ms"] == pytest.approx(1.0, rel=0.1)  # 20 calls a graph
        assert row["tflop_per_s"] == pytest.approx(case.flops[row["direction"]] / row["median_ms"] / 1e9)
        assert row["of_roof"] == max(row["of_copy"], row["of_matmul"])


def test_a_backward_is_timed_alone():
    case = only_case("damped_sine 32x48 float32")
    calls = []

    def function(*leaves):
        calls.append("forward")
        return case.call("torch")(*leaves)

    call = ops.prepare(function, "backward", case.leaves, *case.make(0))
    assert calls == ["forward"]
    first, second = call(), call()
    assert calls == ["forward"] and all(torch.equal(a, b) for a, b in zip(first, second)) and len(first) == 4
    ops.prepare(function, "forward+backward", case.leaves, *case.make(0))()
    assert calls == ["forward"] * 2


def test_compiled_rows(monkeypatch):
    """The section's way through Dynamo, without Inductor, which compiles for seconds."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="eager", **options))
    bench = tiny("linear 2x16")
    (name, measure), *models = compiling.compile_section(bench)
    assert name == "compile linear 2x16 -> 24 weights float32 float32" and not models
    told = {row["backend"]: row for row in measure()}
    assert told["torch"]["compile_s"] > 0 and told["torch"]["times_eager"] > 0 and told["torch"]["error_share"] <= 1
    assert "refused" in told["triton"]

    def breaks(backend):
        return lambda x, weight: x @ weight.t() * (1 if x.sum().item() < 1e9 else 2)

    rows = compiling.op_rows(bench, dataclasses.replace(only_case("linear 2x16"), call=breaks, truth=None))
    assert len(rows) == 3 and all("failed" in row for row in rows)  # right, but not one graph


# -- peers, device, lease -----------------------------------------------------------------------------------------------------


def test_absent_peers_are_named_and_present_ones_run(monkeypatch):
    case = only_case("rms_norm 32x48 float32")
    monkeypatch.setattr(peers, "installed", lambda name: "0.6.0" if name == "fla-core" else None)
    found = peers.variants(tiny(), case)
    assert found["liger"] == "absent: liger-kernel 0.8.5 was sought"
    assert found["fla"].startswith("cannot be set up: ModuleNotFoundError")
    assert peers.presence("liger-kernel", "0.8.5") == {"peer": "liger-kernel", "sought": "0.8.5", "found": "absent"}
    rows = ops.measure(tiny(), case, found)
    assert any(row["backend"] == "F.rms_norm" and "median_ms" in row for row in rows)


def test_peers_of_attention_and_paging_compute_the_op():
    checked = set()
    for name in ("rope_attention", "paged_attention"):
        case = only_case(name)
        judge = check.Judge(case)
        for peer, variant in peers.variants(tiny(), case).items():
            if peer in ("sdpa flash", "sdpa, keys gathered before"):
                assert judge.verdict(variant)[0] is None, f"{name}: {peer}"
                checked.add(peer)
    assert checked == {"sdpa flash", "sdpa, keys gathered before"}


@pytest.mark.parametrize("number", [0, 2], ids=["decode", "prefill"])
def test_flashinfer_is_told_the_same_call(monkeypatch, number):
    """A stand-in with the documented arguments, which must give the op's own result."""

    class Wrapper:
        def __init__(self, workspace, layout, **options):
            assert layout == "NHD" and workspace.dtype == torch.uint8

        def run(self, q, caches):
            pages, indices, last = self.pages
            seq_lens = (pages[1:] - pages[:-1] - 1) * 16 + last
            table = indices.view(len(last), -1)
            offsets = torch.arange(len(last) + 1, dtype=torch.int32) if self.offsets is None else self.offsets
            return psann_kernels.paged_attention(q, *caches, table, seq_lens, offsets, backend="torch")

    class Decode(Wrapper):
        def plan(self, pages, indices, last, heads, kv_heads, head_dim, page, *, q_data_type, kv_data_type):
            assert page == 16 and heads % kv_heads == 0
            self.offsets, self.pages = None, (pages, indices, last)

    class Prefill(Wrapper):
        def plan(self, offsets, pages, indices, last, heads, kv_heads, head_dim, page, *, causal, q_data_type, kv_data_type):
            assert causal and page == 16
            self.offsets, self.pages = offsets, (pages, indices, last)

    fake = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Decode, BatchPrefillWithPagedKVCacheWrapper=Prefill)
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setattr(peers, "installed", lambda name: "0.6.6" if name == "flashinfer-python" else None)
    case = list(cases_attention.paged_attention_cases("parity", torch.device("cpu")))[number]
    assert case.facts["new"] == (1 if number == 0 else 8)
    assert check.Judge(case).verdict(peers.variants(tiny(), case)["flashinfer"])[0] is None


def test_a_plan_is_not_timed():
    planned = []

    def plan(x):
        planned.append(x)
        return lambda: x + len(planned)

    call = ops.prepare(ops.Planned(plan), "forward", 0, [torch.zeros(1)], [])
    assert call() == 1 and call() == 1 and len(planned) == 1
    assert ops.Planned(plan)(torch.zeros(1)) == 2


@pytest.mark.parametrize("status, key", [(0, "right"), (86, "wrong"), (3, "failed")])
def test_sanitizers_verdict(tmp_path, monkeypatch, status, key):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "========= ERROR SUMMARY: 0 errors $1 $2 $6 $7 $8"\nexit {status}\n')
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (row,) = device.sanitizer_rows("memcheck", "")
    assert row["sanitizer"] == "memcheck" and set(row) == {"sanitizer", key}
    if status == 0:
        assert "--tool memcheck -m bench.parity --smallest" in row["right"]
    monkeypatch.setenv("PATH", "")
    assert "not on PATH" in device.sanitizer_rows("racecheck", "")[0]["refused"]


def test_a_lease_runs_every_section_and_restarts_one_that_got_further(tmp_path, capsys):
    started, now = [], [0.0]

    def start(command, cwd, timeout, check):
        section = command[command.index("--sections") + 1]
        started.append((section, "--again" in command))
        now[0] += 10
        if section == "peers":
            raise subprocess.TimeoutExpired(command, timeout)
        dies = section == "ops" and started.count(("ops", True)) + started.count(("ops", False)) < 3
        with (tmp_path / f"{section}.jsonl").open("a") as file:
            if section == "device":
                file.write(
                    json.dumps({"conditions": {"section": "device"}})
                    + "\n"
                    + json.dumps({"sanitizer": "memcheck", "wrong": "bad read"})
                    + "\n"
                )
            if section != "lm":
                file.write("{}\n")
        return SimpleNamespace(returncode=1 if dies or section == "lm" else 0)

    lease.run(options(tmp_path, "--again"), start=start, clock=lambda: now[0])
    assert started == [
        ("device", True),
        ("ops", True),
        ("ops", False),
        ("ops", False),
        ("peers", True),
        ("lm", True),
        ("decoding", True),
        ("compile", True),
        ("gluon", True),
    ]
    told = capsys.readouterr().out
    assert "peers: ended 60 s after its limit" in told and "lm: ended with status 1 and nothing new" in told
    assert "wrong (1 rows)\n  device: memcheck: bad read" in told


def test_a_rehearsal_is_tiny_and_never_a_result(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # put back after the test
    chosen = command.parser().parse_args(["--out", str(tmp_path), "--rehearse"])
    command.rehearse(chosen)
    assert (chosen.device, chosen.size, chosen.rounds) == ("cpu", "tiny", 2)
    assert "--rehearse" in lease.arguments("ops", chosen, 10, True) and "--part" in lease.arguments("ops", chosen, 10, True)
    with pytest.raises(SystemExit, match="a rehearsal's figures mean nothing; take a folder outside"):
        command.rehearse(command.parser().parse_args(["--out", "bench/results/tiny", "--rehearse"]))
    chosen.only = "damped_sine 32x48 float32"
    sections.run("peers", chosen)
    assert lines(tmp_path / "peers.jsonl")[0]["conditions"]["rehearsal"] is True
    assert "A REHEARSAL" in lease.summary(tmp_path)


def test_a_graphed_training_step_moves_the_weights_that_a_plain_one_moves(monkeypatch):
    monkeypatch.setattr(lm, "CUDACapture", lambda device: lambda function: (function(), function)[1])
    size, cpu = lm.SIZES["tiny"]["tiny"], torch.device("cpu")
    batch, weights = lm.drawn(size, cpu, size.rows, size.tokens), []
    for make in (lm.step_of, lm.graphed_step_of):
        model = lm.made("respsann", size, "torch", cpu).train()
        step = make(model, batch, cpu)
        for _ in range(3):
            step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_gluon_stands_beside_triton_or_says_why_not():
    (name, measure), *cases = gluon.gluon_section(tiny("rope_attention"))
    assert name == "self-test" and len(measure()) == 1
    (row,) = [row for row in cases[0][1]() if row["backend"] == "gluon"]
    assert "capability 9.0 (Hopper)" in row["refused"]


def test_decoding_tells_steps_and_their_share_of_the_bound(tmp_path):
    ((_, measure),) = decoding.decoding_section(tiny("decoding respsann tiny 3 texts temperature 0.8"))
    refused, row = measure()
    assert "the model is on cpu" in refused["refused"] and refused["how"] == "cuda graphs"
    assert row["how"] == "eager" and row["texts"] == 3 and row["step_ms"] > 0 and 0 < row["of_bound"] < 1
    assert row["tokens_per_s"] == pytest.approx(3 / row["step_ms"] * 1e3)


def test_the_command_lists_the_other_programs_and_refuses_a_missing_gpu(tmp_path):
    assert "python -m bench.native" in command.others()
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="torch sees no GPU"):
            sections.bench_of(argparse.Namespace(**vars(options(tmp_path)) | {"device": "cuda"}))
