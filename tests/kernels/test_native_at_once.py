"""What serves a whole call without Python gives the bits of the long way, and leaves every other call to it."""

import psann_kernels
import pytest
import torch
from psann_kernels import OPS, BackendError, linear, native, paged_append, paged_attention, rms_norm, scaled_add
from psann_kernels.linear import quantize
from psann_kernels.registry import not_at_once
from torch.fx.experimental.proxy_tensor import make_fx

pytestmark = [
    pytest.mark.skipif(native.NATIVE is None, reason=native.WHY_NOT),
    pytest.mark.skipif(
        not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no table to read its tensors by"
    ),
]
BF16 = torch.bfloat16


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def paged(dtype=torch.float32, **changed):
    """Two sequences of 5 and 18 tokens, the second with two new ones, in blocks of 8; H 6, Hkv 2, D 16."""
    cos, sin = psann_kernels.rotary_tables(32, 16)
    call = {
        "k": random(3, 2, 16, dtype=dtype), "v": random(3, 2, 16, dtype=dtype),
        "k_cache": random(7, 8, 2, 16, dtype=dtype), "v_cache": random(7, 8, 2, 16, dtype=dtype),
        "slot_mapping": torch.tensor([12, 24, 25]), "positions": torch.tensor([4, 16, 17]), "cos": cos, "sin": sin,
        "q": random(3, 6, 16, dtype=dtype), "block_table": torch.tensor([[1, 99, 99], [5, 2, 3]], dtype=torch.int32),
        "seq_lens": torch.tensor([5, 18], dtype=torch.int32), "cu_seqlens_q": torch.tensor([0, 1, 3], dtype=torch.int32),
    }  # fmt: skip
    return call | changed


def append(**call):
    """The caches after paged_append."""
    call = paged(**call)
    caches = call["k_cache"].clone(), call["v_cache"].clone()
    options = {name: call[name] for name in ("positions", "cos", "sin", "interleaved", "backend") if name in call}
    paged_append(call["k"], call["v"], *caches, call["slot_mapping"], **options)
    return caches


def attend(**call):
    call = paged(**call)
    names = ("q", "k_cache", "v_cache", "block_table", "seq_lens", "cu_seqlens_q")
    options = {name: t for name, t in call.items() if name not in (*names, "k", "v", "slot_mapping", "positions")}
    return paged_attention(*(call[name] for name in names), **options)


def wide(*shape, dtype=torch.float32):
    """Rows that lie further apart than they are long."""
    return random(*shape[:-1], shape[-1] + 3, dtype=dtype)[..., : shape[-1]]


WHOLE = quantize(random(5, 33))
SERVED = {
    "linear": lambda: linear(random(1, 33, dtype=BF16), random(5, 33, dtype=BF16)),
    "linear, by name": lambda: linear(random(8, 33), random(5, 33, dtype=torch.float16), backend="native"),
    "linear, one dimension": lambda: linear(random(33), random(5, 33), bias=random(5)),
    "linear, three": lambda: linear(random(2, 3, 33, dtype=torch.float16), random(5, 33)),
    "linear, wide rows": lambda: linear(wide(3, 33), random(5, 33)),
    "linear, int8": lambda: linear(random(2, 33, dtype=BF16), WHOLE[0], scale=WHOLE[1], bias=random(5)),
    "linear, a parameter": lambda: linear(random(1, 33), torch.nn.Parameter(random(5, 33))),
    "rms_norm": lambda: rms_norm(random(3, 33, dtype=BF16), random(33)),
    "rms_norm, narrow weight": lambda: rms_norm(random(2, 3, 33, dtype=BF16), random(33, dtype=BF16), eps=1e-3),
    "rms_norm, narrower": lambda: rms_norm(random(3, 33), random(33), dtype=BF16),
    "rms_norm, residual": lambda: rms_norm(random(3, 33), random(33), residual=wide(3, 33, dtype=BF16), dtype=torch.float16),
    "rms_norm, wide rows": lambda: rms_norm(wide(3, 33), random(33), residual=random(3, 33), backend="native"),
    "scaled_add": lambda: scaled_add(random(3, 33), random(3, 33, dtype=BF16), random(1)),
    "scaled_add, halves": lambda: scaled_add(random(33, dtype=BF16), random(33, dtype=BF16), random(1), backend="native"),
    "append": append,
    "append, halves": lambda: append(dtype=BF16, interleaved=False),
    "append, unturned": lambda: append(cos=None, sin=None, positions=None, slot_mapping=torch.tensor([-1, 3, 55])),
    "append, of one product": lambda: append(
        k=random(3, 6, 16)[:, 2:4], v=random(3, 6, 16)[:, 4:], backend="native"
    ),
    "attention": attend,
    "attention, halves": lambda: attend(dtype=BF16, window=4, interleaved=False, alibi_slopes=random(6).abs()),
    "attention, padding": lambda: attend(seq_lens=torch.tensor([5, 0], dtype=torch.int32)),
    "attention, unturned": lambda: attend(cos=None, sin=None, softmax_scale=0.3, q=random(3, 9, 16)[:, 2:8]),
}  # fmt: skip


@pytest.fixture
def served(monkeypatch):
    """Names of the ops that were served at once."""
    names = []

    def record(op):
        at_once = op.at_once

        def recorded(*arguments):
            output = at_once(*arguments)
            if output is not NotImplemented:
                names.append(op.name)
            return output

        monkeypatch.setattr(op, "at_once", recorded)

    for op in OPS.values():
        record(op)
    return names


@pytest.fixture
def the_long_way(monkeypatch):
    def go(call):
        with monkeypatch.context() as patched:
            for op in OPS.values():
                patched.setattr(op, "at_once", not_at_once)
            return call()

    return go


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("case", SERVED)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_as_the_long_way(case, threads, served, the_long_way):
    held = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            at_once = outputs(SERVED[case]())
            assert len(served) == 1
            for a, b in zip(at_once, outputs(the_long_way(SERVED[case])), strict=True):
                assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    finally:
        torch.set_num_threads(held)


def test_with_gradients_on_what_needs_none_is_served(served):
    assert not linear(random(1, 33), random(5, 33)).requires_grad
    assert served == ["linear"]


def test_in_inference_mode_outputs_are_inference_tensors(served):
    with torch.inference_mode():
        assert linear(random(1, 33), random(5, 33)).is_inference() and served == ["linear"]


def test_outputs_can_grow_as_any_can(served):
    y = linear(random(1, 33), random(5, 33))
    assert y.resize_(7, 7).shape == (7, 7) and served == ["linear"]


class Marked(torch.Tensor):
    pass


LONG = {
    "a gradient": lambda: linear(random(1, 33), random(5, 33).requires_grad_()),
    "a subclass": lambda: linear(random(1, 33).as_subclass(Marked), random(5, 33)),
    "float64": lambda: linear(random(1, 33).double(), random(5, 33).double()),
    "many rows": lambda: linear(random(9, 33), random(5, 33)),
    "no rows": lambda: linear(random(0, 33), random(5, 33)),
    "a turned weight": lambda: linear(random(1, 33), random(33, 5).t()),
    "a negated view": lambda: linear(torch.complex(random(1, 33), random(1, 33)).conj().imag, random(5, 33)),
    "another backend": lambda: linear(random(1, 33), random(5, 33), backend="torch"),
    "a half of a bias": lambda: linear(random(1, 33, dtype=BF16), random(5, 33), bias=random(5, dtype=BF16)),
    "a sequence without new tokens": lambda: attend(
        q=random(1, 6, 16), cu_seqlens_q=torch.tensor([0, 1, 1], dtype=torch.int32)
    ),
    "positions of 32 bits": lambda: append(positions=torch.tensor([4, 16, 17], dtype=torch.int32)),
}  # fmt: skip


@pytest.mark.parametrize("case", LONG)
def test_the_rest_goes_the_long_way(case, served, the_long_way):
    a, b = outputs(LONG[case]()), outputs(the_long_way(LONG[case]))
    assert not served
    for x, y in zip(a, b, strict=True):
        assert type(x) is type(y) and torch.equal(x, y)


WRONG = {
    "inputs": (lambda: linear(random(1, 32), random(5, 33)), "weight has shape"),
    "no scale": (lambda: linear(random(1, 33), WHOLE[0]), "scale is missing"),
    "a scale": (lambda: linear(random(1, 33), random(5, 33), scale=random(5)), "scale is given"),
    "bias": (lambda: linear(random(1, 33), random(5, 33), bias=random(6)), "bias is"),
    "eps": (lambda: rms_norm(random(1, 33), random(33), eps=-1.0), "eps is -1.0"),
    "dtype": (lambda: rms_norm(random(1, 33, dtype=BF16), random(33), dtype=torch.float16), "dtype is"),
    "residual": (lambda: rms_norm(random(2, 33), random(33), residual=random(1, 33)), "residual is"),
    "weight": (lambda: rms_norm(random(1, 33), random(33, dtype=BF16)), "weight is"),
    "branch": (lambda: scaled_add(random(2, 33, dtype=BF16), random(2, 33), random(1)), "branch is"),
    "alpha": (lambda: scaled_add(random(2, 33), random(2, 33), random(2)), "alpha is"),
    "backend": (lambda: linear(random(1, 33), random(5, 33), backend="cpp"), "backend is 'cpp'"),
    "slot": (lambda: append(slot_mapping=torch.tensor([12, 24, 56])), "slot_mapping reaches from 12 to 56"),
    "position": (lambda: append(positions=torch.tensor([4, 16, 32])), "positions reach from 4 to 32"),
    "no positions": (lambda: append(positions=None), "given without positions"),
    "heads": (lambda: append(k=random(3, 1, 16), v=random(3, 1, 16)), "k has 1 heads"),
    "no sin": (lambda: attend(sin=None), "sin is None"),
    "window": (lambda: attend(window=0), "window is 0"),
    "block": (lambda: attend(block_table=torch.tensor([[1, 9, 9], [5, 2, 7]], dtype=torch.int32)), r"block_table\[1, 2\] is 7"),
    "length": (lambda: attend(seq_lens=torch.tensor([5, 25], dtype=torch.int32)), r"seq_lens\[1\] is 25"),
    "too many": (lambda: attend(seq_lens=torch.tensor([5, 1], dtype=torch.int32)), "has 2 new tokens"),
    "tables": (lambda: attend(seq_lens=torch.tensor([5, 18], dtype=torch.int32), cos=random(9, 8), sin=random(9, 8)), "9 rows"),
    "bounds": (lambda: attend(cu_seqlens_q=torch.tensor([0, 1, 2], dtype=torch.int32)), "must run from 0 to 3"),
    "falling": (lambda: attend(cu_seqlens_q=torch.tensor([0, 4, 3], dtype=torch.int32)), "must not decrease"),
    "query heads": (lambda: attend(q=random(3, 5, 16)), "no multiple"),
    "a gradient": (lambda: attend(q=random(3, 6, 16).requires_grad_()), "not differentiable"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_by_name(case):
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_whoever_watches_sees_the_op(served):
    x, weight = random(1, 33), random(5, 33)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        linear(x, weight)
    assert any("linear_native" in event.name for event in profile.events())
    with torch.device("cpu"):  # a mode that sees functions
        linear(x, weight)
    with torch.autograd.forward_ad.dual_level():
        linear(x, weight)
    assert "linear_native" in make_fx(lambda x, w: linear(x, w))(x, weight).code
    traced = torch.jit.trace(lambda x: linear(x, weight), x, check_trace=False)
    torch.func.vmap(lambda x: linear(x, weight, backend="torch"))(x.unsqueeze(1))
    assert not served
    assert torch.equal(traced(2 * x), linear(2 * x, weight)) and served == ["linear"]


def test_a_compiled_graph_holds_the_op(served):
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph.code)
        return graph.forward

    torch.compile(lambda x, w: linear(x, w), backend=keep, fullgraph=True)(random(1, 33), random(5, 33))
    assert len(graphs) == 1 and "linear_native" in graphs[0] and not served


def test_a_backend_to_blame_is_not_used():
    op, cpu = OPS["linear"], torch.device("cpu")
    op.blame("native", cpu, "it lies")
    try:
        assert op.at_once is not_at_once
        with pytest.raises(BackendError, match="it lies"):
            linear(random(1, 33), random(5, 33), backend="native")
    finally:
        op.blame("native", cpu, None)
    assert op.at_once is native.NATIVE.linear_at_once


def test_a_wrong_number_of_arguments_is_an_error():
    with pytest.raises(TypeError, match="takes 5 arguments, not 1"):
        native.NATIVE.linear_at_once("auto")
