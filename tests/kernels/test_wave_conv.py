"""wave_conv: every backend against float64, forward and every gradient; documents, states and causality."""

import random

import pytest
import torch
from psann_kernels import BackendError, explain, wave_conv, wave_state
from psann_kernels.damped_sine import MODES
from psann_kernels.wave_conv import OP, reference
from witness import BACKENDS, FORWARD, GRADIENT, Budget, judge, poisoned_allocations, strided_copies

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("y", "dx", "dweight", "dbias", "damplitude", "dfrequency", "ddamping")
# (x's shape, lengths of the documents or None, kernel_size, dilation, is stated, has bias, mode). Documents: empty ones first, last
# and in between, one token, across the end of a row; dilations beyond the row.
CALLS = [
    ((2, 16, 33), None, 4, 1, False, True, "abs"),
    ((2, 7, 3), None, 3, 2, True, True, "relu"),
    ((13, 17), (0, 5, 1, 0, 7, 0), 3, 2, True, True, "abs"),
    ((11, 3), (4, 7), 4, 3, False, False, "abs"),
    ((2, 6, 5), (3, 0, 6, 3), 2, 1, False, True, "none"),
    ((1, 2, 130), None, 2, 1, False, True, "abs"),
    ((2, 5, 1), None, 3, 9, True, True, "abs"),
    ((3, 2, 9), None, 1, 1, False, True, "relu"),
]
# Calls without a token or a row.
EMPTY = [
    ((2, 0, 3), None, 3, 2, True, True, "abs"),
    ((0, 4, 3), None, 3, 2, True, True, "abs"),
    ((0, 3), (0, 0), 3, 2, True, True, "abs"),
    ((0, 3), (), 2, 1, False, True, "abs"),
]


def inputs(call, dtype, weight_dtype=torch.float32, seed=0):
    """(x, weight, bias, amplitude, frequency, damping), options, dy. |frequency * c| stays below 30 rad."""
    shape, lengths, kernel_size, dilation, is_stated, has_bias, mode = call
    g = torch.Generator().manual_seed(seed)
    features, length = shape[-1], (kernel_size - 1) * dilation
    x, dy = (torch.randn(shape, generator=g).clamp(-3, 3).to(dtype) for _ in range(2))
    weight, bias = (torch.rand(*size, generator=g) * 2 - 1 for size in ((features, kernel_size), (features,)))
    amplitude = torch.randn(features, generator=g) + 1
    frequency, damping = torch.rand(features, generator=g) * 2, torch.rand(features, generator=g) * 0.5
    options = dict(dilation=dilation, mode=mode)
    documents = shape[0]
    if lengths is not None:
        options["cu_seqlens"] = torch.tensor((0, *lengths)).cumsum(0).int()
        documents = len(lengths)
    if is_stated:
        options["state"] = torch.randn(documents, length, features, generator=g).clamp(-3, 3).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    bias = bias.to(weight_dtype) if has_bias else None
    return (x, weight.to(weight_dtype), bias, *(p.to(wide) for p in (amplitude, frequency, damping))), options, dy


def spans(x, cu_seqlens=None):
    """(first, past the last) of each document among the tokens of all rows; empty ones too."""
    total = x.shape[:-1].numel()
    starts = {0, total} if x.dim() == 2 else set(range(0, total + 1, max(x.shape[1], 1)))
    if cu_seqlens is None:
        return [(row * x.shape[1], (row + 1) * x.shape[1]) for row in range(x.shape[0])]
    if x.dim() == 2:
        return list(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]))
    starts = sorted(starts | set(cu_seqlens.tolist()))
    return list(zip(starts, starts[1:]))


def plain(x, weight, bias, amplitude, frequency, damping, *, dilation, mode, cu_seqlens=None, state=None):
    """The formula, document by document, with every intermediate in x's dtype: what that dtype can do, and in float64 the truth."""
    weight, amplitude, frequency, damping = (t.to(x.dtype) for t in (weight, amplitude, frequency, damping))
    kernel_size = weight.shape[1]
    flat = x.reshape(-1, x.shape[-1])
    outputs = [flat[:0]]
    for document, (first, last) in enumerate(spans(x, cu_seqlens)):
        before = flat.new_zeros((kernel_size - 1) * dilation, flat.shape[1]) if state is None else state[document].to(x.dtype)
        sequence = torch.cat((before, flat[first:last]))
        c = torch.zeros_like(flat[first:last])
        for j in range(kernel_size):
            c = c + weight[:, j] * sequence[j * dilation : j * dilation + last - first]
        outputs.append(c if bias is None else c + bias.to(x.dtype))
    c = torch.cat(outputs)
    g = {"abs": c.abs(), "relu": c.relu(), "none": torch.zeros_like(c)}[mode]
    return (amplitude * torch.exp(-damping * g) * torch.sin(frequency * c)).reshape(x.shape)


def run(function, tensors, options, dy):
    """y, then the gradient of every tensor; None for a bias that is None."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves, **options)
    wanted = [t for t in leaves if t is not None]
    gradients = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True))
    found = [None if leaf is None else next(gradients) for leaf in leaves]
    return y.detach(), *(torch.zeros_like(leaf) if g is None and leaf is not None else g for leaf, g in zip(leaves, found))


def op(backend):
    def function(x, weight, bias, *parameters, **options):
        return wave_conv(x, weight, *parameters, bias=bias, backend=backend, **options)

    return function


@pytest.fixture
def small_programs(monkeypatch):
    """The constants of wave_conv_triton, made small so that small shapes take every path: several walks along a row, several
    groups of walks and several tiles a program."""
    shrink(monkeypatch)


def shrink(monkeypatch, steps=3):
    if OP.has("triton"):
        from psann_kernels import wave_conv_triton

        for name, value in {"STEPS": steps, "MAX_TOKEN_PROGRAMS": 2, "FORWARD_PROGRAMS": 1}.items():
            monkeypatch.setattr(wave_conv_triton, name, value)


def serving(backend):
    (x, weight, _, *parameters), options, _ = inputs(CALLS[0], torch.float32)
    reason = OP.refusal(backend, x, weight, *parameters, **options)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def pool(budgets, backend, tensors, options, dy):
    """Add one call to the budgets, which are made on first use."""
    with poisoned_allocations():
        fast = run(op(backend), tensors, options, dy)
    working = run(plain, tensors, options, dy)
    wide = [None if t is None else t.double() for t in tensors]
    truth = run(plain, wide, options | ({"state": options["state"].double()} if "state" in options else {}), dy.double())
    for name, f, w, t in zip(NAMES, fast, working, truth, strict=True):
        if f is not None:
            factor = FORWARD if name == "y" else GRADIENT
            budgets.setdefault((name, f.dtype), Budget(f"{backend} {name} {f.dtype}", factor)).add(f, w, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_three_witnesses(backend, dtype, small_programs):
    serving(backend)
    budgets = {}
    for seed, call in enumerate(CALLS + EMPTY):
        pool(budgets, backend, *inputs(call, dtype, seed=seed))
    for budget in budgets.values():
        assert budget.elements >= 128
        budget.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_in_half_precision(backend, small_programs):
    serving(backend)
    budgets = {}
    for seed in range(2):
        pool(budgets, backend, *inputs(((2, 3, 66), None, 2, 1, False, True, "abs"), torch.bfloat16, torch.bfloat16, seed))
    assert {name for name, dtype in budgets if dtype == torch.bfloat16} == {"y", "dx", "dweight", "dbias"}
    for budget in budgets.values():
        budget.check()


@pytest.mark.parametrize("call", CALLS[:5] + EMPTY, ids=str)
def test_gradients_of_the_specification(call):
    (*lead, _), *rest = call
    tensors, options, _ = inputs(((*lead, 2), *rest), torch.float64, torch.float64)
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def function(x, weight, *others):
        bias, *parameters = others if tensors[2] is not None else (None, *others)
        return reference(x, weight, *parameters, bias=bias, **options)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_equal_documents_alone(backend, small_programs):
    serving(backend)
    tensors, options, dy = inputs(CALLS[2], torch.float32)
    cu_seqlens, state = options.pop("cu_seqlens"), options.pop("state")
    y, dx, *_ = run(op(backend), tensors, options | dict(cu_seqlens=cu_seqlens, state=state), dy)
    for document, (first, last) in enumerate(spans(tensors[0], cu_seqlens)):
        x, *others = tensors
        alone = run(op(backend), (x[None, first:last], *others), options | dict(state=state[document, None]), dy[None, first:last])
        torch.testing.assert_close(y[first:last], alone[0][0], rtol=0, atol=1e-6)
        torch.testing.assert_close(dx[first:last], alone[1][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_begin_documents(backend, small_programs):
    """Offsets that say nothing about the rows change nothing."""
    serving(backend)
    tensors, options, dy = inputs(CALLS[0], torch.float32)
    expected = run(op(backend), tensors, options, dy)
    got = run(op(backend), tensors, options | dict(cu_seqlens=torch.tensor([0, 32], dtype=torch.int32)), dy)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel_size, dilation", [(4, 1), (3, 3), (2, 30), (1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_streaming_equals_the_whole(backend, kernel_size, dilation):
    """Sequences of 9, 5 and 12 tokens arrive in pieces, some empty, packed and with their states."""
    serving(backend)
    lengths, taken = (9, 5, 12), [0, 0, 0]
    tensors, options, _ = inputs(((26, 5), lengths, kernel_size, dilation, False, True, "abs"), torch.float32)
    (x, weight, bias, *parameters), documents = tensors, tensors[0].split(lengths)
    whole = op(backend)(*tensors, **options)
    state, pieces = None, [[], [], []]
    for counts in ((1, 0, 3), (1, 1, 0), (0, 0, 0), (6, 1, 1), (1, 3, 8)):
        new = torch.cat([d[t : t + n] for d, t, n in zip(documents, taken, counts)])
        cu_seqlens = torch.tensor((0, *counts)).cumsum(0).int()
        y = op(backend)(new, weight, bias, *parameters, dilation=dilation, cu_seqlens=cu_seqlens, state=state)
        state = wave_state(new, state, kernel_size=kernel_size, dilation=dilation, cu_seqlens=cu_seqlens)
        for i, part in enumerate(y.split(counts)):
            pieces[i].append(part)
            taken[i] += counts[i]
    assert taken == list(lengths)
    torch.testing.assert_close(torch.cat([part for piece in pieces for part in piece]), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_equals_the_whole(backend):
    """One token a step for every row of a batch."""
    serving(backend)
    tensors, options, _ = inputs(((3, 9, 5), None, 3, 2, False, True, "abs"), torch.float32)
    x, weight, bias, *parameters = tensors
    state, steps = None, []
    for t in range(9):
        steps.append(op(backend)(x[:, t : t + 1], weight, bias, *parameters, state=state, **options))
        state = wave_state(x[:, t : t + 1], state, kernel_size=3, dilation=2)
    torch.testing.assert_close(torch.cat(steps, 1), op(backend)(*tensors, **options), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 3, 3, 4, 11]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_is_the_newest_inputs(dtype, cu_seqlens):
    for kernel_size, dilation in ((3, 2), (4, 1), (2, 13), (1, 5)):
        length = (kernel_size - 1) * dilation
        x = torch.randn(11, 6, dtype=dtype)[:, ::2] if cu_seqlens else torch.randn(4, 6, 3, dtype=dtype).transpose(0, 1)[:, :4]
        offsets = torch.tensor(cu_seqlens, dtype=torch.int32) if cu_seqlens else None
        documents = [x[a:b] for a, b in zip(cu_seqlens, cu_seqlens[1:])] if cu_seqlens else list(x)
        old = torch.randn(len(documents), length, 3, dtype=dtype, requires_grad=True)
        for state, begun in ((None, torch.zeros_like(old)), (old, old)):
            new = wave_state(x, state, kernel_size=kernel_size, dilation=dilation, cu_seqlens=offsets)
            expected = [torch.cat((b, d))[len(d) :] for b, d in zip(begun, documents)]
            assert torch.equal(new, torch.stack(expected)) and not new.requires_grad
            assert new.numel() == 0 or new.data_ptr() not in (x.data_ptr(), old.data_ptr())


def test_state_of_no_tokens():
    old = torch.randn(2, 4, 3)
    for x, cu_seqlens in ((torch.zeros(2, 0, 3), None), (torch.zeros(0, 3), torch.zeros(3, dtype=torch.int32))):
        new = wave_state(x, old, kernel_size=3, dilation=2, cu_seqlens=cu_seqlens)
        assert torch.equal(new, old) and new.data_ptr() != old.data_ptr()
        assert torch.equal(wave_state(x, None, kernel_size=3, dilation=2, cu_seqlens=cu_seqlens), torch.zeros(2, 4, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_flows_into_the_state(backend):
    serving(backend)
    tensors, options, dy = inputs(CALLS[1], torch.float32)
    options["state"].requires_grad_()
    x = tensors[0].requires_grad_()
    op(backend)(x, *tensors[1:], **options).backward(dy)
    assert x.grad is not None and options["state"].grad is None


@pytest.mark.parametrize(
    "call", [((2, 5, 3), None, 3, 2, True, True, "abs"), CALLS[3], CALLS[4]], ids=["rows", "packed", "rows and offsets"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_sees_the_future_or_another_document(backend, call, small_programs):
    """From some token on a document becomes NaN: no bit before it changes, nor in other documents; of gradients, not in others."""
    serving(backend)
    tensors, options, dy = inputs(call, torch.float32)
    features = tensors[0].shape[-1]
    y, dx, *_ = run(op(backend), tensors, options, dy)
    for first, last in spans(tensors[0], options.get("cu_seqlens")):
        changed = slice((first + last) // 2, last)
        for place in (0, 1):
            x, gradient = tensors[0].clone(), dy.clone()
            (x, gradient)[place].view(-1, features)[changed] = float("nan")
            seen = run(op(backend), (x, *tensors[1:]), options, gradient)[place].reshape(-1, features)
            expected = (y, dx)[place].reshape(-1, features)
            is_kept = torch.ones(len(expected), dtype=torch.bool)
            # An input reaches forward to the end of its document; a gradient may reach back to the beginning.
            is_kept[changed if place == 0 else slice(first, last)] = False
            assert torch.equal(seen[is_kept], expected[is_kept])
            assert torch.isnan(seen[changed]).all()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_after_the_end_do_not_exist(backend):
    """The next token's exponential would overflow, and 0 times infinity is NaN."""
    serving(backend)
    x = torch.tensor([50.0, 100.0, 150.0, 200.0]).view(1, 4, 1).requires_grad_()
    one = torch.ones(1)
    wave_conv(x, torch.tensor([[1.0, -1.0]]), one, one, -one, backend=backend).backward(torch.ones(1, 4, 1))
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    serving(backend)
    tensors, options, _ = inputs(CALLS[1], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = op(backend)(*tensors, **options)
    assert torch.equal(y, op(backend)(*tensors, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_layout_does_not_matter(backend, small_programs):
    serving(backend)
    tensors, options, dy = inputs(((2, 6, 5), None, 3, 2, True, True, "abs"), torch.float32)
    expected = run(op(backend), tensors, options, dy)
    copies = [strided_copies(t) for t in (tensors[0], dy, options["state"], tensors[1])]
    layouts = list(copies[0])
    parameters = [strided_copies(t)["step 2"] for t in tensors[2:]]
    for turn in range(len(layouts)):
        chosen = [layouts[(turn + i) % len(layouts)] for i in range(4)]
        x, dy_copy, state, weight = (c[layout] for c, layout in zip(copies, chosen))
        got = run(op(backend), (x, weight, *parameters), options | dict(state=state), dy_copy)
        # Not bit-equal: torch sums the parameter gradients in an order that follows the strides.
        for g, e in zip(got, expected):
            torch.testing.assert_close(g, e, rtol=2e-6, atol=2e-6, msg=lambda m: f"x, dy, state, weight {chosen}: {m}")
    repeated = tensors[0][:1].expand(2, 6, 5)
    y = op(backend)(repeated, *tensors[1:], dilation=2)
    assert torch.equal(y[0], y[1]) and torch.equal(y[0], op(backend)(repeated.contiguous(), *tensors[1:], dilation=2)[1])


def test_triton_walks_of_any_length_agree(monkeypatch):
    serving("triton")
    tensors, options, dy = inputs(CALLS[2], torch.float32)
    expected = run(op("triton"), tensors, options, dy)
    for steps in (1, 2, 4):
        with monkeypatch.context() as patch:
            shrink(patch, steps)
            got = run(op("triton"), tensors, options, dy)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        for g, e in zip(got[2:], expected[2:]):
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)


def test_triton_library_ops():
    serving("triton")
    from psann_kernels.wave_conv_triton import wave_conv_triton, wave_conv_triton_backward

    for call in (EMPTY[0], ((4, 3), (1, 3), 2, 2, True, True, "relu"), ((2, 2, 4), None, 2, 1, False, False, "abs")):
        (x, weight, bias, *parameters), options, dy = inputs(call, torch.float32)
        leaves = [None if t is None else t.requires_grad_() for t in (x, weight, bias, *parameters)]
        rest = options.get("cu_seqlens"), options.get("state"), options["dilation"], options["mode"]
        torch.library.opcheck(wave_conv_triton, (*leaves, *rest))
    tensors = [None if t is None else t.detach() for t in leaves]
    torch.library.opcheck(wave_conv_triton_backward, (dy, *tensors, *rest), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("call", [CALLS[0], CALLS[2]], ids=["rows", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_break(backend, call):
    serving(backend)
    tensors, options, dy = inputs(call, torch.float32)
    eager = run(op(backend), tensors, options, dy)
    compiled = torch.compile(op(backend), fullgraph=True, backend="aot_eager")
    for c, e in zip(run(compiled, tensors, options, dy), eager):
        assert torch.equal(c, e)


def test_the_state_compiles_without_graph_break():
    compiled = torch.compile(wave_state, fullgraph=True, backend="aot_eager")
    x, state = torch.randn(5, 3), torch.randn(2, 4, 3)
    for given, offsets in ((x, torch.tensor([0, 1, 5], dtype=torch.int32)), (x.view(1, 5, 3).expand(2, 5, 3), None)):
        arguments = dict(kernel_size=3, dilation=2, cu_seqlens=offsets)
        assert torch.equal(compiled(given, state, **arguments), wave_state(given, state, **arguments))


def test_a_named_backend_serves_or_raises():
    (x, weight, _, *parameters), options, _ = inputs(CALLS[0], torch.float64, torch.float64)
    with pytest.raises(BackendError, match="wave_conv.*backend='triton'.*float64"):
        wave_conv(x, weight, *parameters, backend="triton", **options)
    with pytest.raises(ValueError, match="backend is 'cuda'; choose one of 'auto'"):
        wave_conv(x, weight, *parameters, backend="cuda", **options)
    many = weight.float().repeat(1, 3)
    with pytest.raises(BackendError, match="kernel_size is 12; the kernel serves at most 8"):
        wave_conv(x.float(), many, *(p.float() for p in parameters), backend="triton")
    with pytest.raises(BackendError, match="the taps reach 8000000000 tokens back"):
        wave_conv(x.float(), weight.float(), *(p.float() for p in parameters), dilation=2 * 10**9, backend="triton")
    rows = {row["backend"]: row for row in explain("wave_conv", x, weight, *parameters)}
    assert rows["torch"]["serves"] == "yes" and rows["triton"]["serves"] == "no" and "float64" in rows["triton"]["reason"]


PACKED = dict(x=torch.ones(6, 5), cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(5)}, r"x has shape \(5,\) .* must be a floating-point tensor \(rows, tokens, features\)"),
        ({"x": torch.ones(2, 3, 5).int()}, "x has shape .* and dtype torch.int32; it must be a floating-point tensor"),
        ({"x": torch.ones(2, 3, 0)}, r"x has shape \(2, 3, 0\) .* of at least one feature"),
        ({"x": torch.ones(6, 5)}, r"x has shape \(6, 5\) and no cu_seqlens; pass the documents' offsets"),
        ({"weight": torch.ones(5)}, r"weight has shape \(5,\); it must be \(features, taps\)"),
        ({"weight": torch.ones(5, 0)}, "kernel_size is 0; a convolution has at least one tap"),
        ({"weight": torch.ones(4, 3)}, r"weight has shape \(4, 3\), but x has 5 features .* pass shape \(5, 3\)"),
        ({"weight": torch.ones(5, 3).half()}, "weight is torch.float16 beside a torch.float32 x; pass it as torch.float32"),
        ({"weight": torch.ones(5, 3, device="meta")}, "weight is on meta and x on cpu; put them on one device"),
        ({"bias": torch.ones(4)}, r"bias has shape \(4,\), but x has 5 features .* pass shape \(5,\)"),
        ({"bias": torch.ones(5).double()}, "bias is torch.float64 beside a torch.float32 x"),
        ({"damping": torch.ones(4)}, r"damping has shape \(4,\), but z has 5 features"),
        ({"mode": "square"}, "mode is 'square'; choose one of 'abs', 'relu', 'none'"),
        ({"dilation": 0}, "dilation is 0; it must be at least 1"),
        ({"state": torch.zeros(2, 3, 5)}, r"state is \(2, 3, 5\) torch.float32 on cpu; pass .* \(2, 4, 5\) torch.float32"),
        ({"state": torch.zeros(2, 4, 5).half()}, r"state is \(2, 4, 5\) torch.float16 on cpu; pass .* torch.float32"),
        (PACKED | {"state": torch.zeros(3, 4, 5)}, r"state is \(3, 4, 5\) .* pass .* \(2, 4, 5\)"),
        ({"cu_seqlens": PACKED["cu_seqlens"], "state": torch.zeros(2, 4, 5)}, "state came with cu_seqlens and x of 3 dimensions"),
        (PACKED | {"cu_seqlens": torch.tensor([0, 6])}, r"cu_seqlens has shape \(2,\) and dtype torch.int64"),
        (PACKED | {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, r"cu_seqlens is \[0, 5\]; .* end at 6"),
    ],
)
def test_bad_input(change, message):
    one = torch.ones(5)
    arguments = dict(x=torch.ones(2, 3, 5), weight=torch.ones(5, 3), amplitude=one, frequency=one, damping=one, dilation=2) | change
    with pytest.raises(ValueError, match=f"wave_conv: {message}"):
        wave_conv(**arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kernel_size": 0}, "kernel_size is 0; a convolution has at least one tap"),
        ({"dilation": -1}, "dilation is -1; it must be at least 1"),
        ({"state": torch.zeros(2, 3, 5)}, r"state is \(2, 3, 5\) .* pass .* \(2, 4, 5\)"),
        ({"x": torch.ones(6, 5)}, "x has shape .* and no cu_seqlens"),
        ({"cu_seqlens": PACKED["cu_seqlens"], "state": None}, r"cu_seqlens came with x of 3 dimensions; pass x as \(total, f"),
    ],
)
def test_bad_state_input(change, message):
    arguments = dict(x=torch.ones(2, 3, 5), state=torch.zeros(2, 4, 5), kernel_size=3, dilation=2) | change
    with pytest.raises(ValueError, match=f"wave_state: {message}"):
        wave_state(**arguments)


# Elements that a random case pools: of 128, maxima differ by more than the factor in one case of 300.
ENOUGH = 512


def fill(budgets, seed, values, backend, monkeypatch):
    """Pool one random kind of call, in as many random shapes as it takes to judge it; `values` numbers the draw of their values."""
    draw = random.Random(seed)
    dtype = draw.choice(DTYPES)
    weight_dtype = draw.choice([torch.float32, dtype])
    form, mode = draw.choice(["rows", "packed", "rows and offsets"]), draw.choice(MODES)
    has_bias, is_stated = draw.random() < 0.7, draw.random() < 0.5 and form != "rows and offsets"
    with monkeypatch.context() as patch:
        if draw.random() < 0.8:
            shrink(patch, draw.randint(1, 9))
        elements = 0
        while elements < ENOUGH:
            features = draw.choice([1, 3, 17, 64, 65, 129])
            rows, tokens = draw.randint(1, 4), draw.choice([0, 1, 2, 3, 7, 15, 16, 17, 33])
            shape = (rows * tokens, features) if form == "packed" else (rows, tokens, features)
            lengths = None
            if form != "rows":
                cuts = sorted(draw.randint(0, rows * tokens) for _ in range(draw.randint(0, 6)))
                lengths = [b - a for a, b in zip([0, *cuts], [*cuts, rows * tokens])]
            call = (shape, lengths, draw.choice([1, 2, 3, 3, 4, 4, 8]), draw.choice([1, 1, 2, 3, 7, 40]), is_stated, has_bias, mode)
            tensors, options, dy = inputs(call, dtype, weight_dtype, draw.randrange(2**32) + values)
            x, dy = (draw.choice(list(strided_copies(t).values())) for t in (tensors[0], dy))
            pool(budgets, backend, (x, *tensors[1:]), options, dy)
            elements += min(features, rows * tokens * features)  # of a parameter's gradient, or of y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.campaign(weight=2)
def test_random_calls(backend, campaign, monkeypatch):
    serving(backend)
    for seed in campaign(weight=2):
        judge(lambda budgets, values: fill(budgets, seed, values, backend, monkeypatch))
