"""rope_attention: every backend against the formula in float64, forward and every gradient; what no query may see."""

import contextlib
import importlib
import math

import pytest
import torch
from psann_kernels import BackendError, explain, rope_attention, rotary_tables, rotate
from psann_kernels.documents import check_cu_seqlens, document_bounds
from psann_kernels.rope_attention import OP, reference
from torch._subclasses import FakeTensorMode
from torch.overrides import BaseTorchFunctionMode
from witness import BACKENDS, FORWARD, GRADIENT, Budget, assert_within_budget, poisoned_allocations

NAMES = ("o", "dq", "dk", "dv")


class Case:
    """One call and its arguments, drawn with a seed.

    documents  lengths; (B, T, ...) rows are cut from the tokens that they fill end to end
    rotary     None, "pairs" or "halves"
    """

    def __init__(
        self, tokens, head_dim, *, batch=1, keys=None, heads=(1, 1), rotary="pairs", documents=None, window=None, alibi=False,
        scale=None, dtype=torch.float32, seed=0,
    ):  # fmt: skip
        self.label = f"T={tokens} D={head_dim} B={batch} Tk={keys} heads={heads} {rotary} {documents} window={window} alibi={alibi}"
        g = torch.Generator().manual_seed(seed)
        keys = tokens if keys is None else keys
        self.q = torch.randn(batch, tokens, heads[0], head_dim, generator=g).to(dtype)
        self.k, self.v = (torch.randn(batch, keys, heads[1], head_dim, generator=g).to(dtype) for _ in range(2))
        self.do = torch.randn(self.q.shape, generator=g).to(dtype)
        self.tables = rotary_tables(max(keys, 1), head_dim) if rotary else (None, None)
        self.slopes = torch.rand(heads[0], generator=g) if alibi else None
        self.cu_seqlens = None if documents is None else torch.tensor([0, *torch.tensor(documents).cumsum(0)], dtype=torch.int32)
        self.interleaved, self.window = rotary != "halves", window
        self.scale = head_dim**-0.5 if scale is None else scale

    def options(self):
        return dict(
            cu_seqlens=self.cu_seqlens, interleaved=self.interleaved, softmax_scale=self.scale, window=self.window,
            alibi_slopes=self.slopes,
        )  # fmt: skip

    def call(self, backend):
        return lambda q, k, v: rope_attention(q, k, v, *self.tables, backend=backend, **self.options())

    def seen(self):
        """(B, Tq, Tk) whether a query sees a key, and (B, Tq), (B, Tk) positions in the document, token by token."""
        batch, queries, keys = self.q.shape[0], self.q.shape[1], self.k.shape[1]
        offsets = [0, batch * keys] if self.cu_seqlens is None else self.cu_seqlens.tolist()
        seen = torch.zeros(batch, queries, keys, dtype=torch.bool)
        query_position = torch.zeros(batch, queries, dtype=torch.long)
        key_position = torch.zeros(batch, keys, dtype=torch.long)
        for b in range(batch):
            document = [sum(offset <= b * keys + j for offset in offsets) for j in range(keys)]
            for j in range(keys):
                key_position[b, j] = j - document.index(document[j])
            for i in range(max(0, queries - keys), queries):
                at = keys - queries + i
                query_position[b, i] = key_position[b, at]
                for j in range(at + 1):
                    is_near = self.window is None or at - j < self.window
                    seen[b, i, j] = is_near and document[j] == document[at]
        return seen, query_position, key_position

    def formula(self, dtype, in_order=False):
        """The definition, written out, with every intermediate in `dtype`. in_order: scores are summed feature after feature."""
        seen, query_position, key_position = self.seen()
        distance = torch.arange(self.k.shape[1]) - (torch.arange(self.q.shape[1]).unsqueeze(1) + self.k.shape[1] - self.q.shape[1])

        def turned(x, position):
            if self.tables[0] is None:
                return x
            cos, sin = (t.to(dtype)[position].unsqueeze(2) for t in self.tables)
            half = x.shape[-1] // 2
            y = torch.empty_like(x)
            a, b = (slice(0, None, 2), slice(1, None, 2)) if self.interleaved else (slice(0, half), slice(half, None))
            y[..., a] = x[..., a] * cos - x[..., b] * sin
            y[..., b] = x[..., b] * cos + x[..., a] * sin
            return y

        def attention(q, k, v):
            group = q.shape[2] // k.shape[2]
            q, k = turned(q, query_position), turned(k, key_position)
            k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
            if in_order:
                scores = sum(a.mT.unsqueeze(-1) * b.mT.unsqueeze(-2) for a, b in zip(q.unbind(-1), k.unbind(-1))) * self.scale
            else:
                scores = torch.einsum("bihd,bjhd->bhij", q, k) * self.scale
            if self.slopes is not None:
                scores = scores + self.slopes.to(dtype).view(-1, 1, 1) * distance.to(dtype)
            is_seen = seen.unsqueeze(1)
            scores = torch.where(is_seen, scores, -math.inf)
            scores = torch.where(is_seen.any(-1, keepdim=True), scores, 0)
            weights = torch.where(is_seen, scores.softmax(-1), 0)
            return torch.einsum("bhij,bjhd->bihd", weights, v)

        return attention

    def floor(self, other):
        """What RELIABILITY grants dq (other: k) and dk (other: q) where the true gradient is 0, as at T = 1."""
        largest = [t.abs().max().item() if t.numel() else 0.0 for t in (self.do, self.v, other)]
        return 2.0**-22 * self.q.shape[-1] * self.scale * math.prod(largest)


def run(function, q, k, v, do):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    o = function(*leaves)
    return o.detach(), *torch.autograd.grad(o, leaves, do)


def witnesses(case, backend):
    """(fast, working dtype, float64), each (o, dq, dk, dv)."""
    tensors = (case.q, case.k, case.v, case.do)
    with poisoned_allocations():
        fast = run(case.call(backend), *tensors)
    return fast, run(case.formula(case.q.dtype), *tensors), run(case.formula(torch.float64), *(t.double() for t in tensors))


def serving(backend, dtype=torch.float32):
    x = torch.zeros(1, 1, 1, 2, dtype=dtype)
    reason = OP.refusal(backend, x, x, x)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


CASES = [
    Case(0, 16),
    Case(17, 16, batch=0),
    Case(2, 16, batch=3, heads=(4, 2)),
    Case(17, 24, heads=(3, 1), rotary="halves", alibi=True),
    Case(33, 40, batch=2, window=5),
    Case(33, 15, heads=(2, 1), rotary=None),
    Case(65, 64, heads=(2, 2), rotary="halves"),
    Case(65, 96, window=32, alibi=True),
    Case(130, 16, documents=[0, 1, 50, 0, 0, 63, 16, 0]),
    Case(130, 32, documents=[97, 33], window=40, rotary="halves"),
    Case(33, 16, batch=3, heads=(2, 1), documents=[20, 30, 0, 16, 33], alibi=True),
    Case(33, 128, heads=(2, 1), scale=0.05),
    Case(17, 256, rotary="halves"),
    Case(1, 16, keys=65, heads=(4, 1)),
    Case(17, 16, keys=50, window=20, alibi=True),
    Case(50, 16, keys=17, heads=(2, 2)),
    Case(9, 16, keys=0),
]
HALF_CASES = [
    dict(tokens=65, head_dim=64, heads=(2, 1)),
    dict(tokens=33, head_dim=40, documents=[0, 20, 13], window=9, rotary="halves", alibi=True),
    dict(tokens=150, head_dim=16, batch=2, heads=(4, 2)),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_witnesses(backend):
    serving(backend)
    judge(backend, CASES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_three_witnesses_in_half_precision(backend, dtype):
    serving(backend, dtype)
    judge(backend, [Case(**arguments, dtype=dtype) for arguments in HALF_CASES])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_three_witnesses_of_short_windows_in_pieces(backend, dtype, monkeypatch):
    serving(backend, dtype)
    # Blocks of few queries, and few rows of the batch at a time, with every kind of bias.
    dense = importlib.import_module("psann_kernels.rope_attention_dense")
    monkeypatch.setattr(dense, "QUERIES", 16)
    monkeypatch.setattr(dense, "SCORES_AT_ONCE", 6000)
    cases = [
        Case(37, 16, batch=5, heads=(4, 2), dtype=dtype),
        Case(37, 16, batch=5, heads=(4, 2), documents=[30, 0, 100, 55], alibi=True, dtype=dtype),
        Case(37, 16, batch=3, heads=(3, 1), window=5, rotary=None, dtype=dtype),
        Case(18, 16, batch=3, keys=50, heads=(2, 2), rotary="halves", dtype=dtype),
    ]
    assert all(dense.serves(case.q, case.k) for case in cases)
    queries, keys = dense.by_key_head(cases[0].q, 2), cases[0].k.transpose(1, 2)
    assert len(list(dense.pieces(queries.shape, keys.shape))) == 9
    judge(backend, cases)


def test_short_windows_are_theirs_whatever_the_default_dtype_and_device():
    case = Case(9, 16, heads=(2, 1))
    expected = run(case.call("torch"), case.q, case.k, case.v, case.do)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        got = run(case.call("torch"), case.q, case.k, case.v, case.do)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(torch.equal(g, e) and g.dtype == e.dtype for g, e in zip(got, expected))


def test_short_windows_have_no_second_derivative():
    case = Case(9, 16)
    leaves = [t.requires_grad_() for t in (case.q, case.k, case.v)]
    with pytest.raises(RuntimeError, match="its gradient has no derivative on a CPU"):
        torch.autograd.grad(case.call("torch")(*leaves), leaves, case.do, create_graph=True)


def judge(backend, cases):
    budgets = [Budget(f"{backend} {name}", FORWARD if name == "o" else GRADIENT) for name in NAMES]
    for case in cases:
        for budget, *values in zip(budgets, *witnesses(case, backend)):
            budget.add(*values)
    for budget in budgets:
        assert budget.elements >= 128
        budget.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token(backend):
    # The weight is 1 whatever the scores are, so dq and dk are 0, and what is left of them is rounding.
    serving(backend)
    case = Case(1, 16, batch=4, heads=(2, 1))
    fast, working, truth = witnesses(case, backend)
    assert torch.equal(fast[0], case.v.repeat_interleave(2, 2))
    for name, other, *values in zip(NAMES[1:], (case.k, case.q, None), fast[1:], working[1:], truth[1:]):
        assert_within_budget(f"{backend} {name}", *values, GRADIENT, 0.0 if other is None else case.floor(other))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, at 0 * inf of pairs that a mask then drops
@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_without_keys_give_zero(backend):
    serving(backend)
    for case in (Case(7, 16, keys=3, heads=(2, 1), window=2), Case(5, 16, keys=0)):
        o, dq, dk, dv = run(case.call(backend), case.q, case.k, case.v, case.do)
        without = case.q.shape[1] - case.k.shape[1]
        assert torch.equal(o[:, :without], torch.zeros_like(o[:, :without])) and o.isfinite().all()
        assert torch.equal(dq[:, :without], torch.zeros_like(dq[:, :without]))
        assert all(t.isfinite().all() for t in (dq, dk, dv))
        # Their output's gradient must not reach a key either.
        do = case.do.clone()
        do[:, :without] = float("inf")
        for g, e in zip(run(case.call(backend), case.q, case.k, case.v, do)[1:], (dq, dk, dv)):
            assert torch.equal(g, e)


@pytest.mark.parametrize("case", [c for c in CASES if c.q.numel()], ids=lambda c: c.label)
def test_reference_is_the_formula(case):
    tensors = [t.double() for t in (case.q, case.k, case.v, case.do)]
    tables = [None if t is None else t.double() for t in case.tables]
    options = case.options() | dict(alibi_slopes=None if case.slopes is None else case.slopes.double())
    got = run(lambda q, k, v: reference(q, k, v, *tables, **options), *tensors)
    for name, g, e in zip(NAMES, got, run(case.formula(torch.float64), *tensors)):
        assert (g - e).abs().max() <= 1e-13 if g.numel() else g.shape == e.shape, name


def test_gradients_of_the_specification():
    q, k, v = (torch.randn(1, 5, h, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    tables = [t.double() for t in rotary_tables(5, 4)]
    for options in (
        {},
        dict(cu_seqlens=torch.tensor([0, 2, 2, 5], dtype=torch.int32), interleaved=False),
        dict(window=2, alibi_slopes=torch.tensor([0.5, 0.1], dtype=torch.float64)),
    ):
        assert torch.autograd.gradcheck(lambda *a: rope_attention(*a, *tables, backend="torch", **options), (q, k, v))
    fewer = k[:, :3].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: rope_attention(q, k, k, *tables, backend="torch"), (q, fewer))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_documents_alone(backend):
    serving(backend)
    lengths = [0, 5, 0, 33, 1, 0]
    packed = Case(sum(lengths), 16, heads=(4, 2), documents=lengths, rotary="halves", alibi=True)
    fast = run(lambda *a: packed.call(backend)(*(t[0] for t in a)).unsqueeze(0), packed.q, packed.k, packed.v, packed.do)
    budgets = [Budget(f"{backend} {name}", FORWARD if name == "o" else GRADIENT) for name in NAMES]
    start = 0
    for length in lengths:
        here = slice(start, start + length)
        alone = Case(length, 16, heads=(4, 2), rotary="halves", alibi=True)
        alone.slopes = packed.slopes
        tensors = [t[:, here] for t in (packed.q, packed.k, packed.v, packed.do)]
        plain = run(alone.formula(torch.float32), *tensors)
        truth = run(alone.formula(torch.float64), *(t.double() for t in tensors))
        for budget, f, p, t in zip(budgets, fast, plain, truth):
            budget.add(f[:, here], p, t)
        start += length
    for budget in budgets:
        budget.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_later_token_changes_nothing_earlier(backend):
    serving(backend)
    case = Case(37, 16, batch=2, heads=(2, 1), window=30)
    before = run(case.call(backend), case.q, case.k, case.v, case.do)
    q, k, v = (torch.cat((t[:, :21], t[:, 21:] * -3 + 1), 1) for t in (case.q, case.k, case.v))
    after = run(case.call(backend), q, k, v, case.do)
    assert torch.equal(before[0][:, :21], after[0][:, :21]) and torch.equal(before[1][:, :21], after[1][:, :21])
    do = case.do.clone()
    do[:, 21:] = 0
    _, dq, dk, dv = run(case.call(backend), case.q, case.k, case.v, do)
    assert all(torch.equal(t[:, 21:], torch.zeros_like(t[:, 21:])) for t in (dq, dk, dv))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_document_sees_no_other(backend):
    serving(backend)
    case = Case(37, 16, heads=(2, 1), documents=[11, 0, 10, 16])
    before = run(case.call(backend), case.q, case.k, case.v, case.do)
    q, k, v, do = (torch.cat((t[:, :11] + 2, t[:, 11:21], t[:, 21:] * -3), 1) for t in (case.q, case.k, case.v, case.do))
    for b, a in zip(before, run(case.call(backend), q, k, v, do)):
        assert torch.equal(b[:, 11:21], a[:, 11:21])


def layouts(t):
    """The same values (B, T, H, D) in awkward memory, NaN wherever a stray read would land."""
    batch, tokens, heads, head_dim = t.shape
    holder = torch.full((batch, tokens + 2, heads + 1, head_dim + 3), float("nan"))
    holder[:, 1 : tokens + 1, :heads, 3:] = t
    head_first = torch.full((batch, heads, tokens + 1, head_dim), float("nan"))
    head_first[:, :, :tokens] = t.transpose(1, 2)
    return {
        "inside a larger tensor": holder[:, 1 : tokens + 1, :heads, 3:],
        "heads before tokens": head_first[:, :, :tokens].transpose(1, 2),
        "features not adjacent": torch.stack((t, torch.full_like(t, float("nan"))), -1).flatten(-2)[..., ::2],
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_and_slopes_may_have_gaps(backend):
    """cos and sin as halves of one table, as other libraries keep them, were read as if they had none."""
    serving(backend)
    for case in (Case(9, 16, heads=(2, 1)), Case(9, 16, heads=(2, 1), rotary=None, alibi=True)):
        expected = run(case.call(backend), case.q, case.k, case.v, case.do)
        if case.slopes is None:
            case.tables = torch.cat(case.tables, -1).chunk(2, -1)
        else:
            case.slopes = torch.stack((case.slopes, case.slopes + 1), -1)[:, 0]
        got = run(case.call(backend), case.q, case.k, case.v, case.do)
        assert all(torch.equal(g, e) for g, e in zip(got, expected))


@pytest.mark.parametrize("arguments", [{}, dict(alibi=True), dict(window=100)], ids=str)
# torch's attention of a CPU computes few keys wide, and the native kernels serve few keys only.
@pytest.mark.parametrize(
    "backend, tokens", [(backend, tokens) for backend in BACKENDS for tokens in (40, 300) if (backend, tokens) != ("native", 300)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(backend, dtype, tokens, arguments):
    case = Case(tokens, 16, heads=(2, 1), dtype=dtype, **arguments)
    serving(backend, dtype)
    o = case.call(backend)(case.q, case.k, case.v)
    with torch.autocast("cpu", torch.bfloat16):
        under = case.call(backend)(case.q, case.k, case.v)
    assert o.dtype == under.dtype == dtype and torch.equal(o, under)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_layout_does_not_matter(backend):
    serving(backend)
    # Judged like any call and not bit by bit: torch multiplies matrices in an order that follows the strides.
    case = Case(17, 16, batch=2, heads=(2, 1))
    _, working, truth = witnesses(case, "torch")
    copies = [layouts(t) for t in (case.q, case.k, case.v, case.do)]
    for layout in copies[0]:
        fast = run(case.call(backend), *(c[layout] for c in copies))
        for name, *values in zip(NAMES, fast, working, truth):
            assert_within_budget(f"{backend} {name} {layout}", *values, FORWARD if name == "o" else GRADIENT)
    shared, apart = ([t.expand(-1, -1, 2, -1) for t in (case.k, case.v)], [t.repeat(1, 1, 2, 1) for t in (case.k, case.v)])
    assert torch.equal(case.call(backend)(case.q, *shared), case.call(backend)(case.q, *apart))


@pytest.mark.parametrize(
    "arguments", [dict(window=23), dict(documents=[30, 0, 60, 10]), dict(documents=[70, 30], window=40), dict(keys=131)], ids=str
)
def test_triton_walks_many_small_tiles(arguments, monkeypatch):
    # Few tokens fit the real tiles whole: here ranges before, inside and after the unmasked tiles all occur.
    serving("triton")
    from psann_kernels import rope_attention_backward_triton, rope_attention_triton
    from psann_kernels.rope_attention_tiles_triton import Tile

    for module, table in (
        (rope_attention_triton, "TILES"),
        (rope_attention_backward_triton, "KEY_TILES"),
        (rope_attention_backward_triton, "QUERY_TILES"),
    ):
        monkeypatch.setitem(getattr(module, table), (16, True), Tile(16, 8, 4, 1) if table == "KEY_TILES" else Tile(8, 16, 4, 1))
    judge("triton", [Case(100, 16, **arguments)])


@pytest.fixture
def described_calls(monkeypatch):
    """Every head_dim and dtype reads by descriptors where tensors can have them; tensors of which one was made are listed."""
    pytest.importorskip("triton")
    from psann_kernels import rope_attention_backward_triton, rope_attention_tiles_triton, rope_attention_triton

    for module, table in (
        (rope_attention_triton, "TILES"),
        (rope_attention_backward_triton, "KEY_TILES"),
        (rope_attention_backward_triton, "QUERY_TILES"),
    ):
        # The same tiles as through pointers, so that bits are equal; few features in small ones, for ranges of every kind.
        small = rope_attention_tiles_triton.Tile(*((16, 32) if table == "KEY_TILES" else (32, 16)), 4, 1)
        tiles = getattr(module, table) | {(16, True): small}
        monkeypatch.setattr(module, table, tiles)
        monkeypatch.setattr(module, f"DESCRIBED_{table}", tiles)
    made, describe = [], rope_attention_tiles_triton.described
    monkeypatch.setattr(rope_attention_tiles_triton, "described", lambda t, block: made.append(t) or describe(t, block))
    return made


def test_three_witnesses_by_descriptors_triton(described_calls):
    serving("triton")
    cases = [*CASES, Case(100, 16, window=23), Case(100, 16, documents=[70, 30], window=40), Case(33, 64, keys=90, heads=(4, 2))]
    judge("triton", cases)
    # Three kernels, two tensors each; not where there is no query or key, a row of no whole 16 bytes, or halves padded apart.
    excepted = [case for case in cases if not case.q.numel() or not case.k.numel() or case.q.shape[-1] == 15]
    excepted += [case for case in cases if case.q.shape[-1] == 24 and not case.interleaved]
    assert len(described_calls) == 6 * (len(cases) - len(excepted)) and len(excepted) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_three_witnesses_by_descriptors_triton_in_half_precision(dtype):
    # The tiles that sm_90 takes.
    serving("triton", dtype)
    packed = Case(150, 64, documents=[20, 130], window=90, alibi=True, dtype=dtype)
    judge("triton", [Case(150, 128, heads=(2, 1), dtype=dtype), packed])


def test_triton_reads_by_pointers_what_no_descriptor_holds(described_calls):
    serving("triton")
    case = Case(17, 16, batch=2, heads=(2, 1), rotary=None)
    tensors = [case.q, case.k, case.v, case.do]
    expected = run(case.call("triton"), *tensors)
    assert len(described_calls) == 6
    wide = [torch.nn.functional.pad(t, (0, 2)) for t in tensors]
    ways = {
        "rows of no whole 16 bytes": [t[..., :16] for t in wide],
        "a start off by one element": [torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape) for t in tensors],
        "rows that repeat": [t[:, :1].expand(-1, 17, -1, -1) for t in tensors],
    }
    for way, awkward in ways.items():
        described_calls.clear()
        got = run(case.call("triton"), *awkward)
        assert not described_calls, way
        if way != "rows that repeat":
            assert all(torch.equal(g, e) for g, e in zip(got, expected)), way
    # A tensor apart is enough for a kernel to change its way: dk and dv read q and do, o and dq read k and v.
    for place, count in ((0, 4), (1, 2), (2, 2), (3, 4)):
        described_calls.clear()
        got = run(case.call("triton"), *(ways["a start off by one element"][i] if i == place else t for i, t in enumerate(tensors)))
        assert len(described_calls) == count and all(torch.equal(g, e) for g, e in zip(got, expected))


@pytest.mark.parametrize(
    "shape, strides, start, is_describable",
    [
        ((2, 3, 1, 8), (24, 8, 8, 1), 0, True),
        ((1, 3, 1, 8), (3, 8, 5, 1), 0, True),  # the strides of single entries are never used
        ((2, 3, 1, 8), (24, 8, 8, 1), 4, True),
        ((2, 3, 1, 8), (24, 8, 8, 1), 2, False),
        ((2, 3, 1, 8), (26, 8, 8, 1), 0, False),
        ((2, 3, 1, 8), (24, 0, 8, 1), 0, False),
        ((2, 3, 1, 8), (48, 16, 16, 2), 0, False),
        ((2, 0, 1, 8), (8, 8, 8, 1), 0, False),
        ((2, 3, 1, 8), (2**38, 8, 8, 1), 0, False),
        ((2, 3, 1, 8), (2**38 - 4, 8, 8, 1), 0, True),
    ],
)
def test_what_a_descriptor_holds(shape, strides, start, is_describable):
    pytest.importorskip("triton")
    from psann_kernels import descriptor_triton

    class Described:  # a tensor of a terabyte, of which no element is read
        dtype = torch.float32

        def __init__(self):
            self.shape = shape

        def stride(self, place=None):
            return strides if place is None else strides[place]

        def element_size(self):
            return 4

        def data_ptr(self):
            return 2**40 + start * 4

    assert descriptor_triton.is_describable(Described()) is is_describable
    if is_describable:
        descriptor = descriptor_triton.described(Described(), [1, 16, 1, 8])
        assert [s for n, s in zip(shape, descriptor.strides) if n != 1] == [s for n, s in zip(shape, strides) if n != 1]
        assert all(stride % 4 == 0 for stride in descriptor.strides[:-1])


@pytest.mark.parametrize(
    "capability, hip, expected",
    [((8, 0), None, False), ((9, 0), None, True), ((10, 3), None, True), ((12, 0), None, False), ((9, 4), "6.4", False)],
)
def test_which_gpus_read_by_descriptors(capability, hip, expected, monkeypatch):
    pytest.importorskip("triton")
    from psann_kernels import descriptor_triton

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert descriptor_triton.has_tma(torch.device("cuda", 0)) is expected


def test_sm_100_has_tiles_of_its_own_that_do_not_spill(monkeypatch):
    pytest.importorskip("triton")
    from psann_kernels.rope_attention_triton import DESCRIBED_TILES, SM_100_TILES, described_tiles

    for capability, expected in (((9, 0), DESCRIBED_TILES), ((10, 0), SM_100_TILES), ((10, 3), SM_100_TILES)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert described_tiles(torch.device("cuda", 0)) is expected
    assert described_tiles(torch.device("cpu")) is DESCRIBED_TILES and SM_100_TILES.keys() == DESCRIBED_TILES.keys()


def test_triton_library_op():
    serving("triton")
    from psann_kernels.rope_attention_backward_triton import rope_attention_triton_backward
    from psann_kernels.rope_attention_triton import rope_attention_triton

    for case in (Case(5, 16, heads=(2, 1), documents=[2, 3], alibi=True, window=3), Case(1, 16, keys=2, rotary=None), Case(0, 16)):
        start, end = (None, None) if case.cu_seqlens is None else document_bounds(case.cu_seqlens, case.q.shape[:2].numel())
        leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
        constants = (*case.tables, start, end, case.slopes)
        options = (True, case.scale, case.window)
        torch.library.opcheck(rope_attention_triton, (*leaves, *constants, *options))
        o, lse, turned_k = rope_attention_triton(case.q, case.k, case.v, *constants, *options)
        do = case.do.transpose(1, 2).contiguous().transpose(1, 2)
        k = case.k if case.tables[0] is None else turned_k
        torch.library.opcheck(rope_attention_triton_backward, (do, case.q, k, case.v, o, lse, *constants, *options))


def test_triton_never_reads_past_the_tables():
    # What rope_attention checks on a CPU it cannot check on a GPU without waiting: then positions without an angle give NaN.
    serving("triton")
    from psann_kernels.rope_attention_triton import rope_attention_triton

    case = Case(9, 16)
    cos, sin = (torch.full((7, 8), float("inf")).index_copy(0, torch.arange(5), t[:5])[:5] for t in case.tables)
    o, _, _ = rope_attention_triton(case.q, case.k, case.v, cos, sin, None, None, None, True, 0.25, None)
    assert o[:, :5].isfinite().all() and o[:, 5:].isnan().all()


# What the native kernels leave to torch where something looks at the call, "auto" takes there.
@pytest.mark.parametrize("backend", ["torch", "triton", "auto"])
def test_compiles_without_graph_break(backend):
    if backend != "auto":
        serving(backend)
    cases = [Case(9, 16, heads=(2, 1)), Case(9, 16, heads=(2, 1), documents=[4, 0, 5], window=3, alibi=True)]
    if backend == "torch":
        cases.append(Case(9, 16, heads=(2, 1), dtype=torch.bfloat16))
    for case in cases:
        tensors = (case.q, case.k, case.v, case.do)
        compiled = torch.compile(case.call(backend), fullgraph=True, backend="aot_eager")
        for c, e in zip(run(compiled, *tensors), run(case.call("torch" if backend == "auto" else backend), *tensors)):
            assert torch.equal(c, e)


def test_native_serves_short_windows_that_nothing_looks_at():
    serving("native")
    native = importlib.import_module("psann_kernels.rope_attention_native")
    q, k = torch.zeros(1, 300, 2, 16), torch.zeros(1, 300, 1, 16)
    with pytest.raises(BackendError, match="there are 300 keys; of torch.float32 the native kernels serve at most 256"):
        rope_attention(q, k, k, backend="native")
    rope_attention(q, k, k)
    case = Case(9, 16, heads=(2, 1))
    tensors = case.q, case.k, case.v
    for refusal, looks in (
        (None, contextlib.nullcontext),
        ("a trace, a mode", lambda: FakeTensorMode(allow_non_fake_inputs=True)),
        ("a trace, a mode", BaseTorchFunctionMode),
    ):  # fmt: skip
        with looks():
            reason = native.refuses(*tensors)
        assert reason is refusal or refusal in reason
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert native.refuses(*tensors) is None
    assert torch.func.vmap(lambda q: rope_attention(q, case.k, case.v))(case.q.unsqueeze(0)).shape == (1, *case.q.shape)
    assert "torch.float64" in native.refuses(*(t.double() for t in tensors))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_native_softmax_keeps_what_is_no_number(value):
    """A score that is no number, or of infinite size, makes of its row what torch's softmax makes, and touches no other."""
    serving("native")
    case = Case(20, 16)
    case.k[0, 7] = 0
    case.k[0, 7, 0, 0] = value
    o = rope_attention(case.q, case.k, case.v, backend="native")
    scores = torch.einsum("bihd,bjhd->bhij", case.q, case.k) / 4
    weights = scores.masked_fill(~torch.ones(20, 20, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", weights, case.v)
    assert expected[:, :7].isfinite().all() and not (value != -math.inf and expected.isfinite().all())
    torch.testing.assert_close(o, expected, equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_tables_and_slopes_may_come_from_inference_mode(backend):
    serving(backend)
    case = Case(9, 16, heads=(2, 1), alibi=True)
    expected = run(case.call(backend), case.q, case.k, case.v, case.do)
    with torch.inference_mode():
        case.tables, case.slopes = tuple(t.clone() for t in case.tables), case.slopes.clone()
    for g, e in zip(run(case.call(backend), case.q, case.k, case.v, case.do), expected):
        assert torch.equal(g, e)


def test_native_gives_the_same_bits_for_any_number_of_threads():
    serving("native")
    case = Case(90, 32, batch=6, heads=(4, 2), documents=[200, 300, 40], dtype=torch.bfloat16)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(case.call("native"), case.q, case.k, case.v, case.do))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for first, again in zip(found[0], other, strict=True):
            assert torch.equal(first, again)


def test_rotation_depends_on_the_distance_alone():
    cos, sin = (t.double() for t in rotary_tables(200, 8))
    x, y = torch.randn(2, 1, 1, 8, dtype=torch.float64)
    for interleaved in (True, False):

        def score(i, j):
            turned = (rotate(t, cos, sin, positions=torch.tensor([p]), interleaved=interleaved) for t, p in ((x, i), (y, j)))
            return torch.mul(*turned).sum()

        # Tables are rounded to float32, so equal to that.
        torch.testing.assert_close(score(7, 3), score(187, 183), rtol=0, atol=1e-6)
        assert (score(7, 3) - score(7, 4)).abs() > 1e-3
    halves = rotate(torch.cat((x[..., 0::2], x[..., 1::2]), -1), cos[1:], sin[1:], interleaved=False)
    pairs = rotate(x, cos[1:], sin[1:])
    assert torch.equal(halves, torch.cat((pairs[..., 0::2], pairs[..., 1::2]), -1))
    assert rotate(x.bfloat16(), cos.float(), sin.float()).dtype == torch.bfloat16


def test_pairs_turn_alike_as_complex_numbers_and_one_by_one(monkeypatch):
    """On a CPU pairs are multiplied as complex numbers, under a compiler feature by feature; memory may lie anyhow."""
    module = importlib.import_module("psann_kernels.rope_attention")  # the package's own name of it is the function
    cases = [("bfloat16", torch.randn(2, 7, 3, 32).bfloat16())] + [
        (f"{name} {head_dim}", copy) for head_dim in (2, 6, 40) for name, copy in layouts(torch.randn(2, 7, 3, head_dim)).items()
    ]
    holder = torch.randn(2 * 7 * 3 * 6 + 1)
    for name, x in [*cases, ("contiguous, odd start", holder[1:].view(2, 7, 3, 6))]:
        tables, found = rotary_tables(9, x.shape[-1]), []
        positions = torch.tensor([[0, 1, 2, 0, 1, 0, 8]])
        for is_complex in (True, False):
            monkeypatch.setattr(module, "_is_complex_cheaper", lambda wide: is_complex)
            leaf = x.detach().requires_grad_()
            y = rotate(leaf, *tables, positions=positions)
            found.append((y.detach(), *torch.autograd.grad(y, leaf, torch.ones_like(y))))
        for one, other in zip(*found):
            assert one.dtype == x.dtype and one.shape == x.shape
            # Where a vector is not filled, torch's complex product is fused.
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=lambda m: f"{name}: {m}")


def test_rotary_tables():
    cos, sin = rotary_tables(100_000, 6, theta=500.0)
    assert cos.shape == sin.shape == (100_000, 3) and cos.dtype == torch.float32
    for position, m in ((0, 0), (1, 2), (99_999, 1)):
        angle = position * 500.0 ** (-2 * m / 6)
        assert abs(cos[position, m].item() - math.cos(angle)) <= 2**-24 and abs(sin[position, m].item() - math.sin(angle)) <= 2**-24
    with pytest.raises(ValueError, match="rotary_tables: head_dim is 5; rotary positions turn pairs of features"):
        rotary_tables(4, 5)


@pytest.mark.parametrize("lengths", [[], [3], [0, 2, 0, 0, 4, 1, 0, 0], [0, 0], [7, 9]])
def test_document_bounds(lengths):
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0)], dtype=torch.int32)
    total = sum(lengths)
    check_cu_seqlens("test", cu_seqlens, total, torch.device("cpu"))
    bounds = [(sum(lengths[:d]), sum(lengths[: d + 1])) for d, length in enumerate(lengths) for _ in range(length)]
    start, end = document_bounds(cu_seqlens, total)
    assert start.dtype == end.dtype == torch.int32 and list(zip(start.tolist(), end.tolist())) == bounds
    for row in (1, 4):
        cut = [(max(s, t - t % row), min(e, t - t % row + row)) for t, (s, e) in enumerate(bounds)]
        start, end = document_bounds(cu_seqlens, total, row_length=row)
        assert list(zip(start.tolist(), end.tolist())) == cut


def test_a_named_backend_serves_or_raises():
    x = torch.zeros(1, 2, 1, 288)
    with pytest.raises(BackendError, match="rope_attention.*backend='triton'.*head_dim is 288; the kernel serves at most 256"):
        rope_attention(x, x, x, backend="triton")
    rows = {row["backend"]: row for row in explain("rope_attention", x, x, x)}
    assert rows["torch"]["serves"] == "yes" and rows["triton"]["serves"] == "no" and "288" in rows["triton"]["reason"]
    x = x[..., :16].double()
    with pytest.raises(BackendError, match="float64"):
        rope_attention(x, x, x, backend="triton")


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


X, KV = torch.zeros(2, 5, 4, 8), torch.zeros(2, 5, 2, 8)
COS, SIN = rotary_tables(5, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=X.int()), r"q has shape \(2, 5, 4, 8\) and dtype torch.int32; it must be floating point"),
        (dict(q=X[0], k=KV[0], v=KV[0]), "q is packed, .* but cu_seqlens is None"),
        (dict(k=KV[:1]), r"k has shape \(1, 5, 2, 8\) beside q"),
        (dict(v=KV[:, :4]), r"v has shape \(2, 4, 2, 8\) beside q .* k and v must have one shape"),
        (dict(v=KV.half()), "v is torch.float16 on cpu and q torch.float32"),
        (dict(k=X[:, :, :3], v=X[:, :, :3]), "q has 4 heads of 8 features and k 3 heads"),
        (dict(window=0), "window is 0; it counts the query's own token"),
        (dict(window=True), "window is True"),
        (dict(softmax_scale=-1.0), "softmax_scale is -1.0; it must be positive"),
        (dict(sin=None), "sin is None but the other table is given"),
        (dict(cos=COS[:4], sin=SIN[:4]), "cos and sin have 4 positions, but 5 tokens follow one another"),
        (dict(cos=COS[:2], sin=SIN[:2], cu_seqlens=int32(0, 2, 5, 7, 10)), "cos and sin have 2 positions, but 3 tokens"),
        (dict(cos=COS.half()), "cos has shape .* torch.float16"),
        (dict(sin=SIN[:, :3]), r"sin has shape \(5, 3\)"),
        (dict(cos=COS.clone().requires_grad_()), "cos requires a gradient, but it is a constant here"),
        (dict(q=X[..., :7], k=KV[..., :7], v=KV[..., :7]), "head_dim is 7; rotary positions turn pairs"),
        (dict(alibi_slopes=torch.zeros(2)), r"alibi_slopes has shape \(2,\)"),
        (dict(k=KV[:, :4], v=KV[:, :4], cu_seqlens=int32(0, 10)), "q has 5 tokens and k 4; with cu_seqlens both must hold"),
        (dict(cu_seqlens=int32(0, 10).long()), "cu_seqlens has shape .* and dtype torch.int64"),
        (dict(cu_seqlens=int32(0, 9)), r"cu_seqlens is \[0, 9\]; it must start at 0, never decrease and end at 10"),
        (dict(cu_seqlens=int32(0, 7, 6, 10)), r"cu_seqlens is \[0, 7, 6, 10\]"),
        (dict(cu_seqlens=int32(*range(0, 15))), r"cu_seqlens is \[0, 1, 2, 3, 4, 5, ..., 9, .*14\] \(15 values\)"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(q=X, k=KV, v=KV, cos=COS, sin=SIN) | change
    with pytest.raises(ValueError, match=f"rope_attention: {message}"):
        rope_attention(**arguments)
