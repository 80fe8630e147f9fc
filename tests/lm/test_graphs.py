"""Decode steps as graphs: the same texts, whatever the padding, the sizes met before and what moved meanwhile.

A recording of operations (tape.py) takes the place of a CUDA graph; the step itself also runs on tensors without numbers, where it
takes the kernels of a GPU, and whatever would make the host wait is refused.
"""

from __future__ import annotations

import random

import pytest
import torch
from engine_traffic import TOKENIZER, Traffic, engine_for, finish, module_of, outcome, random_params, request_of
from psann_fast import cuda_graphs
from psann_fast.cuda_graphs import CaptureError
from psann_fast.generate import engine as engine_module
from psann_fast.generate import cache, graphs, step_buffers
from psann_fast.generate.cache import PagedCache
from psann_fast.generate.decoder import decoder_for
from psann_fast.generate.graphs import DecodeGraphs, decode_step, padded_rows, padded_width
from psann_fast.generate.options import EngineOptions
from psann_fast.generate.sampling import SamplingParams
from psann_fast.generate.seen import SeenTokens
from psann_fast.generate.step_buffers import StepBuffers
from tape import Tape, serve_meta, waits
from tiny import VOCABULARY, tiny
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

REFUSES = graphs.refuses


@pytest.fixture
def taped(monkeypatch):
    """Engines record their decode steps."""
    monkeypatch.setattr(graphs, "refuses", lambda module, block_size: None)
    monkeypatch.setattr(engine_module, "CUDACapture", lambda device: Tape.record)
    # Small tables, so that texts outgrow them.
    monkeypatch.setattr(graphs, "LEAST_WIDTH", 1)
    return monkeypatch


def requests_of(count: int, seed: int = 0, **options):
    choose = random.Random(seed)
    prompts = [[choose.randrange(12) for _ in range(choose.randint(1, 30))] for _ in range(count)]
    return [request_of(prompt, random_params(choose), **options) for prompt in prompts]


def written(module, requests, options=EngineOptions(), **more):
    engine = engine_for(module, options=options, **more)
    for request in requests:
        engine.add(request)
    finish(engine)
    return engine


# -- texts ---------------------------------------------------------------------------------------------------------------------


def texts(traffic: Traffic) -> list:
    return [outcome(request) for _, request in traffic.done]


@pytest.mark.parametrize("eager_steps", [0, 2])
def test_random_traffic_gets_the_same_texts(taped, eager_steps):
    taped.setattr(graphs, "EAGER_STEPS", eager_steps)
    plain, replays, captures = [], 0, 0
    with pytest.MonkeyPatch.context() as without:
        without.setattr(graphs, "refuses", REFUSES)
        plain = [texts(Traffic(seed, 14)) for seed in range(4)]
    for seed, expected in enumerate(plain):
        traffic = Traffic(seed, 14)
        assert texts(traffic) == expected
        made = traffic.engine._graphs
        assert made.reason is None
        replays, captures = replays + made.replays, captures + made.captures
    assert captures > 10 and replays > captures, (captures, replays)


@pytest.mark.campaign(weight=1)
def test_traffic_over_graphs(campaign, taped):
    for seed in campaign:
        taped.setattr(graphs, "EAGER_STEPS", seed % 3)
        traffic = Traffic(seed, 20)
        assert not traffic.surprises() and traffic.engine._graphs.reason is None


def test_log_probabilities_come_from_the_graph(taped):
    module, options = module_of("waveresnet", "rope"), dict(logprobs=3)
    graphed, plain = requests_of(5, **options), requests_of(5, **options)
    engine = written(module, graphed)
    written(module, plain, EngineOptions(cuda_graphs=False))
    assert engine._graphs.replays > 10
    for ours, theirs in zip(graphed, plain):
        assert outcome(ours) == outcome(theirs)
        assert [r.logprob for r in ours.drawn_logprobs] == pytest.approx([r.logprob for r in theirs.drawn_logprobs], abs=1e-9)


@pytest.mark.parametrize("rows, padded", [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 20), (20, 20)])
def test_padded_rows(rows, padded):
    assert padded_rows(rows, 20) == padded


def test_padded_width():
    assert [padded_width(n) for n in (1, 32, 33, 64, 65)] == [32, 32, 64, 64, 128]


# -- what a graph reads and writes ---------------------------------------------------------------------------------------------


def strays(taped) -> int:
    """Values that steps of ever fewer texts wrote into blocks of nobody, or into the slot that reads as zeros."""
    taped.setattr(graphs, "LEAST_WIDTH", 32)
    taped.setattr(graphs, "EAGER_STEPS", 0)
    engine = engine_for(module_of("waveresnet", "rope"), 256, max_rows=8, block_size=4)
    for i in range(7):
        engine.add(request_of([i, 3, 1], SamplingParams(max_new_tokens=18 - 2 * i, temperature=0, seed=0)))
    engine.step()
    cache, found = engine.cache, 0
    while engine.has_work:
        held = {b for s in engine.scheduler.running for b in s.blocks}
        free = [b for b in range(1, cache.num_blocks + 1) if b not in held]
        for tensor in (*cache._k, *cache._v, *cache._wave):
            tensor[free] = 7.0
        engine.step()
        left = [b for b in free if not any(b in s.blocks for s in engine.scheduler.running)]
        found += sum(int((tensor[left] != 7.0).sum()) for tensor in (*cache._k, *cache._v, *cache._wave))
        found += sum(int(tensor[0, 0].count_nonzero()) for tensor in cache._wave)
    assert engine._graphs.replays > 5
    return found


def stale_rows(self, count, pad=StepBuffers._pad):
    pad(self, 0) if count == 0 else setattr(self, "_used", count)


def test_padding_writes_where_nobody_reads(taped):
    assert strays(taped) == 0


@pytest.mark.parametrize("what, value", [
    ((step_buffers, "SCRATCH_SLOT"), 0),
    ((step_buffers, "SCRATCH_SLOT"), 37),
    ((StepBuffers, "_pad"), stale_rows),
], ids=["in the zeros", "in a block", "rows of texts that ended"])  # fmt: skip
def test_padding_that_writes_elsewhere_is_found(taped, what, value):
    taped.setattr(*what, value)
    assert strays(taped) > 0


def test_outputs_stay_where_they_are(taped):
    engine = engine_for(module_of("respsann", "rope"))
    engine.add(request_of([1, 2, 3], SamplingParams(max_new_tokens=12, temperature=0.7, seed=1)))
    places = set()
    while engine.has_work:
        engine.step()
        for size in engine._graphs._sizes.values():
            b = size.buffers
            places.add((b.rows, b.width, *(t.data_ptr() for t in (b.ids, b.table, b.drawn, b.logits, *b.past.values()))))
    assert len(places) == len(engine._graphs._sizes) > 0


def own_module(seed: int):
    """One that a test may change."""
    return tiny(seed, base="waveresnet", n_kv_heads=1, vocab_size=TOKENIZER.vocab_size, backend="torch").double()


def test_a_cache_that_moves_is_captured_again(taped):
    taped.setattr(cache, "UNTOUCHED_BYTES", 0)
    taped.setattr(PagedCache, "hold_all", lambda self: None)
    taped.setattr(graphs, "LEAST_WIDTH", 64)
    module = module_of("waveresnet", "rope")
    params = [SamplingParams(max_new_tokens=100, temperature=0.7, top_p=None, seed=seed) for seed in range(3)]
    graphed, plain = ([request_of([1, 2, 3], each) for each in params] for _ in range(2))
    engine = written(module, graphed, block_size=4)
    written(module, plain, EngineOptions(cuda_graphs=False), block_size=4)
    assert list(map(outcome, graphed)) == list(map(outcome, plain))
    assert engine.cache.moves > 2 and engine._graphs.captures > len(engine._graphs._sizes)


def test_weights_that_were_replaced_are_read(taped):
    taped.setattr(graphs, "LEAST_WIDTH", 32)
    module, other = own_module(3), own_module(7)
    engine = engine_for(module)
    for weights in (None, other):
        if weights is not None:
            for parameter, new in zip(module.parameters(), weights.parameters()):
                parameter.data = new.data.clone()
        ours, theirs = (request_of([5, 6, 7], SamplingParams(max_new_tokens=20, temperature=0.9, seed=2)) for _ in range(2))
        engine.add(ours)
        finish(engine)
        written(module, [theirs], EngineOptions(cuda_graphs=False))
        assert outcome(ours) == outcome(theirs)
        captured = engine._graphs.captures
    assert captured == 2


def test_weights_that_changed_in_place_are_read(taped):
    taped.setattr(graphs, "LEAST_WIDTH", 32)
    module = own_module(3)
    engine = engine_for(module)
    for _ in range(2):
        ours, theirs = (request_of([5, 6, 7], SamplingParams(max_new_tokens=20, temperature=0.9, seed=2)) for _ in range(2))
        engine.add(ours)
        finish(engine)
        written(module, [theirs], EngineOptions(cuda_graphs=False))
        assert outcome(ours) == outcome(theirs)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(-1.5)
    assert engine._graphs.captures == 1


# -- mistakes that these tests would find --------------------------------------------------------------------------------------


def a_number_of_the_capture(decoder, view, buffers, seen, *kind):
    longest = int(buffers._values["positions"].max())  # a number of Python, which a graph keeps as it was
    decode_step(decoder, type(view)(**{**vars(view), "positions": buffers.positions.clamp_min(longest)}), buffers, seen, *kind)


def weights_of_the_first_request(self):
    self._is_new = False


def test_a_number_that_the_graph_keeps_is_found(taped):
    taped.setattr(graphs, "decode_step", a_number_of_the_capture)
    engine = written(module_of("respsann", "rope"), requests_of(2))
    assert "gave other results than the step that it is of: logits differ by" in engine._graphs.reason


def test_weights_that_nobody_looks_at_are_found(taped):
    taped.setattr(DecodeGraphs, "_look_at_weights", weights_of_the_first_request)
    with pytest.raises(AssertionError):
        test_weights_that_were_replaced_are_read(taped)


def test_a_step_that_reads_on_the_host_is_not_captured(taped, caplog):
    module = own_module(3)
    decode = module.decode
    module.decode = lambda ids, view: decode(ids, view) * (1 if view.seq_lens.max().item() >= 0 else 2)
    ours, theirs = (request_of([5, 6, 7], SamplingParams(max_new_tokens=20, temperature=0.9, seed=2)) for _ in range(2))
    engine = written(module, [ours])
    assert "_local_scalar_dense" in engine._graphs.reason and "without CUDA graphs" in caplog.text
    row = engine.explain()[-1]
    assert row["op"] == "decode_step" and row["backend"] == "eager" and "_local_scalar_dense" in row["reason"]
    written(module, [theirs], EngineOptions(cuda_graphs=False))
    assert outcome(ours) == outcome(theirs)
    with pytest.raises(CaptureError, match="cuda_graphs is True, and .*_local_scalar_dense.*; leave cuda_graphs out"):
        written(module, [request_of([5, 6, 7], ours.params)], EngineOptions(cuda_graphs=True))


@pytest.mark.parametrize("harm", ["logits", "drawn"])
def test_a_graph_with_other_results_is_not_used(taped, caplog, harm):
    def wrong(function):
        replay = Tape.record(function)

        def harmed():
            replay()
            buffers = next(cell.cell_contents for cell in function.__closure__ if isinstance(cell.cell_contents, StepBuffers))
            getattr(buffers, harm).add_(1)

        return harmed

    taped.setattr(engine_module, "CUDACapture", lambda device: wrong)
    module = module_of("respsann", "rope")
    ours, theirs = (request_of([5, 6, 7], SamplingParams(max_new_tokens=20, temperature=0.9, seed=2), logprobs=0) for _ in range(2))
    engine = written(module, [ours])
    written(module, [theirs], EngineOptions(cuda_graphs=False))
    assert "gave other results than the step" in engine._graphs.reason and "without CUDA graphs" in caplog.text
    assert outcome(ours) == outcome(theirs) and ours.drawn_logprobs == theirs.drawn_logprobs


# -- options -------------------------------------------------------------------------------------------------------------------


def test_on_a_cpu_graphs_are_refused_by_name_and_passed_over_otherwise():
    module = tiny()
    with pytest.raises(ValueError, match="cuda_graphs is True, and the model is on cpu, .*; leave cuda_graphs out"):
        engine_for(module, options=EngineOptions(cuda_graphs=True))
    for option, reason in (("auto", "the model is on cpu"), (False, "cuda_graphs is False")):
        row = engine_for(module, options=EngineOptions(cuda_graphs=option)).explain()[-1]
        assert row["op"] == "decode_step" and row["backend"] == "eager" and reason in row["reason"]
    with pytest.raises(ValueError, match="cuda_graphs is 'on'; it must be 'auto', True or False"):
        EngineOptions(cuda_graphs="on")


def test_explain_says_what_was_captured(taped):
    engine = written(module_of("respsann", "rope"), requests_of(2))
    row = engine.explain()[-1]
    assert row["backend"] == "cuda_graphs" and row["reason"].startswith(f"{engine._graphs.captures} captured")


# -- the step on a GPU, without one --------------------------------------------------------------------------------------------


class OnDevice(TorchDispatchMode):
    """Refuses what meets the host: a value that is read, a number that is copied over. Keeps the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        found = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        assert all(t.is_meta for t in found), f"{func} takes a tensor of the host"
        assert not waits(func, args), f"{func} makes the host wait"
        self.names.append(func.name())
        return func(*args, **kwargs)


@pytest.fixture
def meta(monkeypatch):
    """The device "meta", which has shapes and no numbers, takes the place of a GPU: the Triton kernels serve it."""
    serve_meta(monkeypatch)
    return monkeypatch


def step_on_meta(module, is_greedy: bool, has_penalty: bool, step=decode_step) -> list[str]:
    module = module.to("meta")
    with torch.inference_mode():
        cache = PagedCache(module, 40, 16, 8)
        buffers = StepBuffers(cache, 4, 32, VOCABULARY, 8, module.embed.weight.dtype)
        seen = SeenTokens(8, VOCABULARY, module.embed.weight.device)
        view = cache.view_over(
            block_table=buffers.table, seq_lens=buffers.seq_lens, cu_seqlens=buffers.cu_seqlens, positions=buffers.positions,
            slot_mapping=buffers.slots, past=buffers.past, tokens=512,
        )  # fmt: skip
        run = lambda: step(decoder_for(module, "model"), view, buffers, seen, is_greedy, has_penalty)  # noqa: E731 (two uses)
        run()  # what is made once for a device may come from the host
        with OnDevice() as seen_there:
            run()
    return seen_there.names


@pytest.mark.parametrize("base, positions", [("respsann", "rope"), ("waveresnet", "alibi"), ("waveresnet", "sinusoidal")])
@pytest.mark.parametrize("kind", [(True, False), (False, True)], ids=["greedy", "everything"])
def test_nothing_of_the_step_meets_the_host(meta, base, positions, kind):
    names = step_on_meta(tiny(base=base, positional_encoding=positions, n_kv_heads=1).bfloat16(), *kind)
    assert sum("paged_attention_triton" in name for name in names) == 2 and names[-1] == "aten::copy_"


@pytest.mark.parametrize("slip", [
    lambda buffers: buffers.ids.max().item(),
    lambda buffers: buffers.ids.nonzero(),
    lambda buffers: buffers.ids + torch.tensor([1]),
    lambda buffers: buffers.ids[buffers.ids > 0],
], ids=["item", "nonzero", "from the host", "mask"])  # fmt: skip
def test_a_step_that_meets_the_host_is_found(meta, slip):
    steps = []

    def step(decoder, view, buffers, seen, *kind):
        decode_step(decoder, view, buffers, seen, *kind)
        steps.append(kind)
        if len(steps) > 1:  # the first is not watched, and torch itself would stop it
            slip(buffers)

    with pytest.raises(AssertionError, match="makes the host wait|takes a tensor of the host"):
        step_on_meta(tiny(), True, False, step)


# -- the capture, on a stand-in for torch.cuda ---------------------------------------------------------------------------------


def test_a_lost_capture_is_told_from_a_lost_device(monkeypatch):
    events = []

    class Context:
        def __init__(self, *args, **kwargs):
            events.append((args, kwargs))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

    class Stream(Context):
        def wait_stream(self, other):
            events.append("wait")

    class Graph:
        def replay(self):
            events.append("replay")

    for name, value in dict(
        Stream=Stream, stream=Context, device=Context, graph=Context, CUDAGraph=Graph, current_stream=lambda: Stream(),
        graph_pool_handle=lambda: "pool", synchronize=lambda device: events.append("synchronize"),
    ).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    capture = cuda_graphs.CUDACapture(torch.device("cuda"))
    calls = []
    replay = capture(lambda: calls.append(1))
    assert len(calls) == 2, "once to warm up, once captured"
    (graph,) = [kwargs for event in events if isinstance(event, tuple) for _, kwargs in [event] if kwargs]
    assert graph["pool"] == "pool" and graph["capture_error_mode"] == "thread_local"
    replay()
    assert events[-1] == "replay"

    def failing():
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(CaptureError, match="ended with RuntimeError: operation not permitted when stream is capturing$"):
        capture(failing)
    assert events[-1] == "synchronize"
