"""linear_cross_entropy: every backend against float64, the loss and every gradient,
for each option and for chunks of every size."""

import importlib
import random

import pytest
import torch
from psann_kernels import BackendError, LinearCrossEntropy, explain, linear_cross_entropy
from psann_kernels import linear_cross_entropy_chunks as chunks
from psann_kernels.linear_cross_entropy import OP, definition
from torch.nn import functional as F
from witness import FORWARD, GRADIENT, Budget, judge, poisoned_allocations, strided_copies

# (tokens, features, classes): less than a block of the kernel and more than one, none of them a multiple; no, one, and several
# chunks. The interpreter takes 25 ms a token, so the kernel sees few of them except where each token's own loss is judged.
SHAPES = [(0, 5, 7), (1, 3, 1), (18, 24, 33), (9, 16, 2051)]
ONE_BY_ONE = [(1, 3, 1), (120, 6, 33), (9, 4, 2051)]
BACKENDS = ("torch", "triton")  # nothing native yet
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "soft-cap": {"soft_cap": 3.0},
    "all": {"bias": True, "label_smoothing": 0.2, "z_loss": 1e-3, "soft_cap": 5.0},
}


def inputs(shape, dtype, seed=0, ignored=slice(None, None, 5)):
    tokens, features, classes = shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=g).to(dtype)
    weight = (torch.randn(classes, features, generator=g) * 2 / features**0.5).to(dtype)
    bias = torch.randn(classes, generator=g).to(dtype)
    targets = torch.randint(classes, (tokens,), generator=g)
    targets[ignored] = -100
    return x, weight, bias, targets


def plain(x, weight, bias, targets, *, label_smoothing=0.0, z_loss=0.0, soft_cap=None, reduction="mean"):
    """The formula with every intermediate in x's dtype, sums over tokens and features apart: what that dtype can do."""
    logits = F.linear(x, weight, bias)
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    lse = logits.logsumexp(1)
    loss = lse - (1 - label_smoothing) * logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    loss = loss - label_smoothing * logits.mean(1) + z_loss * lse * lse
    loss = loss * (targets != -100)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / (targets != -100).sum()}[reduction]


def run(function, x, weight, bias, targets, dy=None, **options):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves, targets, **options)
    gradients = torch.autograd.grad(y, leaves, torch.ones_like(y) if dy is None else dy.to(y.dtype), allow_unused=True)
    return y.detach(), *(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients))


def ours(backend, has_bias=True):
    return lambda x, w, b, t, **o: linear_cross_entropy(x, w, t, bias=b if has_bias else None, backend=backend, **o)


def defined(has_bias=True):
    return lambda x, w, b, t, **o: definition(x, w, t, bias=b if has_bias else None, **o)


def serving(backend, dtype=torch.float32):
    x, weight, _, targets = inputs((2, 3, 4), dtype)
    if (reason := OP.refusal(backend, x, weight, targets)) is not None:
        pytest.skip(f"{backend}: {reason}")


WITNESSED = [(name, "sum") for name in OPTIONS] + [("plain", "none"), ("all", "none")]
BRIEF = {torch.float16: [("plain", "sum"), ("all", "sum")], torch.bfloat16: [("plain", "sum"), ("all", "none")]}


@pytest.mark.parametrize(
    "backend, dtype, case, reduction",
    [
        pytest.param(backend, dtype, *case, id=f"{backend}-{dtype}-{'-'.join(case)}")
        for backend in BACKENDS
        for dtype in DTYPES
        for case in (WITNESSED if backend == "torch" or dtype == torch.float32 else BRIEF[dtype])
    ],
)
def test_three_witnesses(backend, dtype, case, reduction):
    serving(backend, dtype)
    options = {**OPTIONS[case], "reduction": reduction}
    has_bias = options.pop("bias", False)
    kinds = dict.fromkeys(("loss", "dx", "dweight", "dbias"), GRADIENT) | {"loss": FORWARD}

    def pool(budgets, draw):
        for shape in SHAPES if reduction == "sum" else ONE_BY_ONE:
            *tensors, targets = inputs(shape, dtype, seed=draw)
            dy = torch.randn(shape[0], generator=torch.Generator().manual_seed(1 + draw)) if reduction == "none" else None
            with poisoned_allocations():
                fast = run(ours(backend, has_bias), *tensors, targets, dy, **options, chunk=8 if reduction == "sum" else 32)
            working = run(lambda x, w, b, t, **o: plain(x, w, b if has_bias else None, t, **o), *tensors, targets, dy, **options)
            truth = run(defined(has_bias), *(t.double() for t in tensors), targets, dy, **options)
            for (name, factor), f, w, t in zip(kinds.items(), fast, working, truth):
                budget = budgets.setdefault(name, Budget(f"{backend} {name}", factor))
                # A loss is float32 whatever x is, and judged by what its dtype would have shown.
                budget.add(f.to(w.dtype), w, t)

    judge(pool)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_torchs_cross_entropy(backend):
    serving(backend)
    x, weight, bias, targets = inputs((37, 24, 33), torch.float32)
    for reduction in ("sum", "mean", "none"):
        for smoothing in (0.0, 0.1):
            expected = F.cross_entropy(F.linear(x, weight, bias), targets, reduction=reduction, label_smoothing=smoothing)
            got = linear_cross_entropy(
                x, weight, targets, bias=bias, reduction=reduction, label_smoothing=smoothing, backend=backend
            )
            torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ignored(backend):
    serving(backend)
    x, weight, bias, _ = inputs((6, 5, 7), torch.float32)
    nothing = torch.full((6,), -100)
    for reduction in ("sum", "none"):
        loss, *gradients = run(ours(backend), x, weight, bias, nothing, reduction=reduction, label_smoothing=0.1, z_loss=0.1)
        assert loss.eq(0).all() and all(g.eq(0).all() for g in gradients)
    assert linear_cross_entropy(x, weight, nothing, backend=backend).isnan()  # as torch's: a mean of nothing


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_an_ignored_token_holds_does_not_matter(backend):
    serving(backend)
    x, weight, bias, targets = inputs((10, 5, 7), torch.float32)
    clean = run(ours(backend), x, weight, bias, targets, reduction="mean")
    huge = x.clone()
    huge[::5] = 1e30
    assert all(torch.equal(a, b) for a, b in zip(run(ours(backend), huge, weight, bias, targets), clean))
    # Another index, in range, is a class like the rest until it is the one to ignore.
    renamed = torch.where(targets == -100, 3, torch.where(targets == 3, 2, targets))
    kept = torch.where(targets == 3, 2, targets)
    for a, b in zip(run(ours(backend), x, weight, bias, renamed, ignore_index=3), run(ours(backend), x, weight, bias, kept)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_neither_memory_layout_nor_chunks_matter(backend):
    serving(backend)
    x, weight, bias, targets = inputs((9, 10, 65), torch.float32)
    expected = run(ours(backend), x, weight, bias, targets)
    cases = [(a, b, targets, None) for a, b in zip(strided_copies(x).values(), reversed(strided_copies(weight).values()))]
    cases += [(x, weight, torch.stack((targets, targets), 1)[:, 0], chunk) for chunk in (1, 4, 9, 10)]
    for x_copy, weight_copy, targets_copy, chunk in cases:
        for got, e in zip(run(ours(backend), x_copy, weight_copy, bias, targets_copy, chunk=chunk), expected):
            torch.testing.assert_close(got, e, rtol=3e-6, atol=3e-6)
    again = run(ours(backend), x, weight, bias, targets)
    assert all(torch.equal(a, b) for a, b in zip(again, expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions(backend):
    serving(backend)
    x, weight, _, targets = inputs((12, 5, 7), torch.float32)
    one_by_one = linear_cross_entropy(x.view(3, 4, 5), weight, targets.view(3, 4), reduction="none", backend=backend)
    assert torch.equal(one_by_one, linear_cross_entropy(x, weight, targets, reduction="none", backend=backend).view(3, 4))
    assert linear_cross_entropy(x[0], weight, targets[1], reduction="none", backend=backend).shape == ()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float32_weight_beside_a_narrow_x(backend):
    serving(backend)
    x, weight, bias, targets = inputs((20, 8, 9), torch.bfloat16)
    narrow = run(ours(backend), x, weight, bias, targets, reduction="sum")
    wide = run(ours(backend), x, weight.float(), bias.float(), targets, reduction="sum")
    assert wide[2].dtype == wide[3].dtype == torch.float32
    assert torch.equal(wide[0], narrow[0]) and torch.equal(wide[2].bfloat16(), narrow[2])
    # As an autocast region would have it; the weight's gradient is summed in float32 there too.
    with torch.autocast("cpu", torch.bfloat16):
        loss, dx, dweight, _ = run(ours(backend), x.float(), weight.float(), bias.float(), targets, reduction="sum")
    assert torch.equal(loss, wide[0]) and torch.equal(dweight, wide[2]) and dx.dtype == torch.float32


def test_gradients_of_the_definition_and_of_the_chunks():
    *tensors, targets = inputs((5, 2, 4), torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    for name, options in OPTIONS.items():
        options = {key: value for key, value in options.items() if key != "bias"}
        for reduction in ("sum", "mean", "none"):
            for function, chunk in ((defined(), {}), (ours("torch"), {"chunk": 2})):
                assert torch.autograd.gradcheck(
                    lambda *a: function(*a, targets, **options, **chunk, reduction=reduction), leaves
                ), name


def test_a_second_derivative_is_refused():
    x, weight, _, targets = inputs((4, 3, 5), torch.float32)
    x.requires_grad_()
    for reduction in ("sum", "none"):
        loss = linear_cross_entropy(x, weight, targets, reduction=reduction, backend="torch").sum()
        with pytest.raises(RuntimeError, match="its gradient has no derivative"):
            torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_library_ops(backend):
    serving(backend)
    module = __import__(f"psann_kernels.linear_cross_entropy_{'chunks' if backend == 'torch' else 'triton'}", fromlist=["OPS"])
    losses_op, sum_op = module.OPS
    for shape in ((5, 4, 6), (0, 1, 1)):
        x, weight, bias, targets = inputs(shape, torch.float32)
        leaves = [t.detach().requires_grad_() for t in (x.t().contiguous().t(), weight, bias)]
        arguments = leaves[0], leaves[1], targets, leaves[2], -100, 0.1, 1e-3, 5.0, 3
        torch.library.opcheck(losses_op, arguments)
        torch.library.opcheck(sum_op, (*arguments, True, True, True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_break(backend):
    serving(backend)
    *tensors, targets = inputs((6, 8, 9), torch.float32)
    for reduction in ("sum", "mean", "none"):
        function = torch.compile(ours(backend), fullgraph=True, backend="aot_eager")
        for c, e in zip(
            run(function, *tensors, targets, reduction=reduction), run(ours(backend), *tensors, targets, reduction=reduction)
        ):
            assert torch.equal(c, e)


def test_the_logits_of_all_tokens_never_exist():
    x, weight, _, targets = inputs((256, 4, 512), torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(result):
                largest = max(largest, t.numel() if isinstance(t, torch.Tensor) else 0)
            return result

    with Watch():
        chunks.run(chunks.turn, x, weight, targets, None, None, -100, 0.1, 0.1, 5.0, 32, True, True, True)
    assert largest == 32 * 512


def test_a_target_out_of_range():
    x, weight, _, targets = inputs((4, 3, 5), torch.float32)
    targets[1] = 5
    with pytest.raises(ValueError, match="linear_cross_entropy: targets holds 5; classes go from 0 to 4, and ignore_index is -100"):
        linear_cross_entropy(x, weight, targets)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_out_of_range_where_nobody_waits_for_the_check(backend):
    serving(backend)
    turn = (chunks if backend == "torch" else importlib.import_module("psann_kernels.linear_cross_entropy_triton")).turn
    x, weight, _, targets = inputs((5, 3, 5), torch.float32)
    targets[1], targets[3] = 5, -1  # the logit after the row's last, and the one before its first
    losses = torch.empty(5)
    turn(x @ weight.t(), targets, losses, None, -100, 0.0, 0.0, None, False)
    assert losses.isnan().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_logits(backend):
    """-inf closes a class; a NaN is never lost."""
    serving(backend)
    x, weight = torch.ones(3, 1), torch.tensor([[1.0], [0.0], [2.0]])
    bias = torch.tensor([0.0, -float("inf"), 0.0])
    loss, dx, dweight, dbias = run(ours(backend), x, weight, bias, torch.tensor([0, 2, 0]), reduction="none")
    expected = F.cross_entropy(x @ weight.t() + bias, torch.tensor([0, 2, 0]), reduction="none")
    torch.testing.assert_close(loss, expected)
    assert dbias[1] == 0 and dx.isfinite().all()
    x[1] = float("nan")
    losses = linear_cross_entropy(x, weight, torch.tensor([0, 2, 0]), reduction="none", backend=backend)
    assert losses.isnan().tolist() == [False, True, False]


def test_module():
    torch.manual_seed(0)
    module = LinearCrossEntropy(6, 11, bias=True, label_smoothing=0.1, z_loss=1e-3, backend="torch")
    x, targets = torch.randn(4, 5, 6), torch.randint(11, (4, 5))
    module(x, targets).backward()
    assert module.weight.grad.abs().sum() > 0 and module.bias.grad.abs().sum() > 0
    torch.testing.assert_close(
        module.eval()(x, targets), F.cross_entropy((F.linear(x, module.weight, module.bias)).flatten(0, 1), targets.flatten())
    )
    (row,) = explain(module)
    assert (row["op"], row["backend"], row["serves"]) == ("linear_cross_entropy", "torch", "yes")


def test_a_named_backend_serves_or_raises():
    x, weight, _, targets = inputs((4, 3, 5), torch.float64)
    with pytest.raises(BackendError, match="linear_cross_entropy.*backend='triton'.*float64"):
        linear_cross_entropy(x, weight, targets, backend="triton")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(4, 3).int()}, "x has shape .4, 3. and dtype torch.int32; it must be floating point"),
        ({"weight": torch.ones(5, 4)}, r"weight has shape \(5, 4\), but x has 3 features .*pass one row per class, \(V, 3\)"),
        (
            {"targets": torch.ones(3).long()},
            r"targets is torch.int64 \(3,\) and x is \(4, 3\); pass one class per token, torch.int64 \(4,\)",
        ),
        ({"targets": torch.ones(4)}, "targets is torch.float32"),
        ({"weight": torch.ones(5, 3).half()}, "weight is torch.float16 beside a torch.float32 x; pass it as torch.float32"),
        ({"bias": torch.ones(4)}, r"bias has shape \(4,\); pass one per class, \(5,\)"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; it must be at least 0 and below 1"),
        ({"z_loss": -1.0}, "z_loss is -1.0; it must be at least 0"),
        ({"soft_cap": 0.0}, "soft_cap is 0.0; it must be above 0, or None"),
        ({"reduction": "max"}, "reduction is 'max'; choose one of 'sum', 'mean', 'none'"),
        ({"chunk": 0}, "chunk is 0; it must be at least 1 token"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(x=torch.ones(4, 3), weight=torch.ones(5, 3), targets=torch.zeros(4, dtype=torch.int64)) | change
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(**arguments)


@pytest.mark.campaign(weight=1)
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_calls(backend, campaign):
    serving(backend)
    for seed in campaign(weight=1):
        judge(lambda budgets, values: fill(budgets, seed, values, backend))


def fill(budgets, seed, values, backend):
    """One random call, in shape and options by `seed`, with the `values`-th draw of its numbers."""
    r = random.Random(seed)
    dtype = r.choice(DTYPES)
    shape = r.choice([1, 2, 5, 9]), r.choice([1, 2, 7, 16, 31]), r.choice([1, 2, 3, 31, 64, 65, 300, 2047, 2048, 2049])
    options = {
        "label_smoothing": r.choice([0.0, 0.1, 0.7]),
        "z_loss": r.choice([0.0, 1e-4, 0.1]),
        "soft_cap": r.choice([None, 2.0, 30.0]),
    }
    options["reduction"] = r.choice(["sum", "none"])
    has_bias, layout = r.random() < 0.5, r.choice(["contiguous", "transposed", "step 2", "misaligned"])
    chunk = r.choice([None, 1, 2, 4])
    *tensors, targets = inputs(shape, dtype, values * 1000003 + seed, slice(r.choice([0, 1, 9]), None, r.choice([1, 2, 3])))
    dy = torch.randn(shape[0], generator=torch.Generator().manual_seed(values)) if options["reduction"] == "none" else None
    laid = [strided_copies(t)[layout] if t.dim() == 2 else t for t in tensors]
    with poisoned_allocations():
        fast = run(ours(backend, has_bias), *laid, targets, dy, **options, chunk=chunk)
    working = run(lambda x, w, b, t, **o: plain(x, w, b if has_bias else None, t, **o), *tensors, targets, dy, **options)
    truth = run(defined(has_bias), *(t.double() for t in tensors), targets, dy, **options)
    for name, f, w, t in zip(("loss", "dx", "dweight", "dbias"), fast, working, truth):
        budget = budgets.setdefault(
            name, Budget(f"{backend} {dtype} {shape} {options} {name}", FORWARD if name == "loss" else GRADIENT)
        )
        budget.add(f.to(w.dtype), w, t)


def test_the_native_loss_keeps_its_digits_beside_a_large_logit_common_to_all():
    serving("native")
    # 8192 and multiples of 2 ** -10 add up to float32 exactly, so the whole of the error is the loss's own.
    small = torch.randint(-2048, 2048, (4099,), generator=torch.Generator().manual_seed(0)) / 1024
    weight, x, target = torch.stack((torch.full((4099,), 8192.0), small), 1), torch.ones(1, 2), torch.tensor([7])
    loss = linear_cross_entropy(x, weight, target, label_smoothing=0.9, backend="native")
    expected = F.cross_entropy(small.double()[None], target, label_smoothing=0.9)
    assert abs(loss.item() - expected.item()) <= 4e-6 * expected.item()
