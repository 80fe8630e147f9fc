"""The modules for other people's models: right on every backend, compilable, ordinary in their state."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from psann.activations import SineParam
from psann_kernels import OPS, BackendError, DampedSine, DampedSineMLP, PagedKVCache, RMSNorm, RotaryAttention, WaveConv, explain
from torch import nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[1] / "kernels"))

from witness import BACKENDS, FORWARD, GRADIENT, Budget  # noqa: E402 (its folder is on the path from here on)

FEATURES = 16
MODULES = {
    "DampedSine": lambda **o: DampedSine(FEATURES, frequency=3.0, frequency_std=0.5, **o),
    "DampedSineMLP": lambda **o: DampedSineMLP(FEATURES, 24, frequency=3.0, **o),
    "RMSNorm": lambda **o: RMSNorm(FEATURES, **o),
    "RotaryAttention": lambda **o: RotaryAttention(FEATURES, 4, 2, max_position=64, window=5, **o),
    "WaveConv": lambda **o: WaveConv(FEATURES, 3, dilation=2, **o),
}
EVERY_MODULE = pytest.mark.parametrize("name", MODULES)
# The op that a module is there for.
MAIN_OP = {
    "DampedSine": "damped_sine", "DampedSineMLP": "damped_sine_mlp", "RMSNorm": "rms_norm", "RotaryAttention": "rope_attention",
    "WaveConv": "wave_conv",
}  # fmt: skip


def made(name: str, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return MODULES[name](**options)


def input_of(seed: int = 1, dtype: torch.dtype = torch.float32, tokens: int = 9) -> torch.Tensor:
    return torch.randn(2, tokens, FEATURES, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and every gradient, for a fixed gradient of the output."""
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in module.named_parameters()}


@EVERY_MODULE
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients_on_every_backend(name, backend):
    op = OPS[MAIN_OP[name]]
    if backend not in op.implementations:
        pytest.skip(f"{backend}: {op.refusal(backend)}")
    budgets: dict[str, Budget] = {}
    for seed in range(2):
        module = made(name, seed, backend="torch")
        plain, truth = results(module, input_of(seed)), results(copy.deepcopy(module).double(), input_of(seed).double())
        fast = made(name, seed, backend=backend)
        fast.load_state_dict(module.state_dict())
        for key, value in results(fast, input_of(seed)).items():
            budget = budgets.setdefault(key, Budget(f"{name} {backend} {key}", FORWARD if key == "y" else GRADIENT, floor=1e-6))
            budget.add(value, plain[key], truth[key])
    for budget in budgets.values():
        budget.check()


@EVERY_MODULE
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_without_a_graph_break(name, backend):
    module = made(name, backend=backend)
    expected, found = results(module, input_of()), None
    module.zero_grad(set_to_none=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = results(compiled, input_of())
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key.removeprefix("_orig_mod.")], rtol=1e-5, atol=1e-5)


@EVERY_MODULE
def test_state_is_ordinary(name):
    module, other = made(name, 0), made(name, 1)
    other.load_state_dict(module.state_dict())
    x = input_of()
    assert torch.equal(other(x), module(x)) and torch.equal(copy.deepcopy(module)(x), module(x))
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()}
    half = copy.deepcopy(module).bfloat16()
    torch.testing.assert_close(half(x.bfloat16()).float(), module(x), rtol=0.1, atol=0.1)
    assert copy.deepcopy(module).double()(x.double()).dtype == torch.float64
    assert "backend='auto'" in repr(module)


@EVERY_MODULE
def test_a_backend_that_cannot_serve_says_so(name):
    with pytest.raises(BackendError, match="triton.*float64"):
        made(name, backend="triton").double()(input_of(dtype=torch.float64))
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        made(name, backend="cuda")


@EVERY_MODULE
def test_explain_names_the_op_and_its_backend(name):
    rows = {row["op"]: row for row in explain(made(name, backend="triton"))}
    assert rows[MAIN_OP[name]]["backend"] == "triton" and rows[MAIN_OP[name]]["serves"] == "yes"
    assert {row["op"]: row["backend"] for row in explain(made(name, backend="torch"))}.keys() == rows.keys()
    # A sine that only lends its parameters to another op is no call.
    assert ("damped_sine" in rows) == (name == "DampedSine")


# -- what each computes ---------------------------------------------------------------------------------------------------------


def test_damped_sine_mlp_takes_the_weights_of_psanns():
    theirs = nn.ModuleDict({"fc1": nn.Linear(FEATURES, 24), "act": SineParam(24, decay_init=0.3), "fc2": nn.Linear(24, 8)})
    ours = DampedSineMLP(FEATURES, 24, 8)
    ours.load_state_dict(theirs.state_dict())
    x = input_of()
    torch.testing.assert_close(ours(x), theirs["fc2"](theirs["act"](theirs["fc1"](x))))
    assert DampedSineMLP(4, 8, bias=False, mode="relu").fc1.bias is None


def test_damped_sine_mlp_is_its_parts_under_autocast():
    module = made("DampedSineMLP")
    with torch.autocast("cpu", torch.bfloat16):
        one = results(module, input_of())
        module.zero_grad(set_to_none=True)
        handle = module.act.register_forward_hook(lambda *_: None)
        parts = results(module, input_of())
        handle.remove()
    assert one["y"].dtype == torch.bfloat16 and all(torch.equal(one[key], parts[key]) for key in parts)
    with torch.device("meta"):
        assert DampedSineMLP(4, 8)(torch.empty(3, 4)).shape == (3, 4)


class Doubled(nn.Linear):
    """Stands in a layer's place, as an adapter does."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("part", ["fc1", "act", "fc2"])
def test_damped_sine_mlp_calls_its_parts_where_somebody_listens(part):
    module, seen = made("DampedSineMLP"), []
    expected = results(module, input_of())
    for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        module.zero_grad(set_to_none=True)
        handle = getattr(getattr(module, part), f"register_{kind}")(lambda *_: seen.append(1))
        assert {row["op"] for row in explain(module)} == {"damped_sine"}
        found = results(module, input_of())
        handle.remove()
        assert seen.pop() and not seen
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)
    assert {row["op"] for row in explain(module)} == {"damped_sine_mlp"}


def test_damped_sine_mlp_calls_what_stands_in_its_parts_place():
    module = made("DampedSineMLP")
    adapter = Doubled(FEATURES, 24)
    adapter.load_state_dict(module.fc1.state_dict())
    expected = F.linear(module.act(2 * F.linear(input_of(), adapter.weight, adapter.bias)), module.fc2.weight, module.fc2.bias)
    module.fc1 = adapter
    torch.testing.assert_close(module(input_of()), expected)
    module.fc1, module.act = nn.Linear(FEATURES, 24), nn.GELU()
    torch.testing.assert_close(module(input_of()), module.fc2(F.gelu(module.fc1(input_of()))))
    assert not explain(module)
    module.fused = True
    with pytest.raises(ValueError, match="fused=True, but fc1, act or fc2 has hooks or was replaced"):
        module(input_of())


def test_rms_norm_is_torchs():
    module, x, residual = RMSNorm(FEATURES, 1e-5), input_of(), input_of(2)
    nn.init.normal_(module.weight)
    torch.testing.assert_close(module(x), F.rms_norm(x, (FEATURES,), module.weight, 1e-5))
    y, h = module(x, residual)
    assert torch.equal(h, x + residual)
    torch.testing.assert_close(y, module(h))


def test_wave_conv_is_a_causal_convolution_and_its_state_goes_on():
    module, x = made("WaveConv"), input_of()
    nn.init.normal_(module.bias)
    padded = F.pad(x.transpose(1, 2), (4, 0))
    convolved = F.conv1d(padded, module.weight.unsqueeze(1), module.bias, dilation=2, groups=FEATURES).transpose(1, 2)
    torch.testing.assert_close(module(x), module.act(convolved), rtol=1e-5, atol=1e-5)
    state, pieces = None, []
    for piece in x.split([1, 5, 3], dim=1):
        pieces.append(module(piece, state=state))
        state = module.next_state(piece, state=state)
    torch.testing.assert_close(torch.cat(pieces, 1), module(x), rtol=1e-6, atol=1e-6)
    packed = module(x.flatten(0, 1), cu_seqlens=torch.tensor([0, 9, 18], dtype=torch.int32))
    torch.testing.assert_close(packed.view_as(x), module(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_attention_is_the_formula(interleaved):
    torch.manual_seed(0)
    module = RotaryAttention(FEATURES, 4, 2, interleaved=interleaved, theta=100.0, bias=True).double()
    x = input_of(dtype=torch.float64)
    angle = torch.arange(9.0, dtype=torch.float64)[:, None] * 100.0 ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4)

    def turned(t):  # as complex numbers
        pairs = (t[..., 0::2], t[..., 1::2]) if interleaved else t.chunk(2, -1)
        z = torch.complex(*pairs) * torch.polar(torch.ones_like(angle), angle)
        return torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)

    q, k, v = (projection(x).unflatten(-1, (-1, 4)).transpose(1, 2) for projection in (module.q_proj, module.k_proj, module.v_proj))
    scores = turned(q) @ turned(k).repeat_interleave(2, 1).mT / 2 + torch.full((9, 9), -torch.inf).triu(1)
    expected = module.o_proj((scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(module(x), expected)


def test_rotary_tables_stay_wide():
    module = RotaryAttention(FEATURES, 4, max_position=64)
    cos = module.cos.clone()
    assert module.bfloat16().cos.dtype == torch.float32 and torch.equal(module.cos, cos)
    assert module.double().cos.dtype == torch.float64
    assert module.to("meta").cos.device.type == "meta"


# -- the paged cache ------------------------------------------------------------------------------------------------------------


def poisoned_cache(**options) -> PagedKVCache:
    cache = PagedKVCache(**dict(num_blocks=9, block_size=4, num_kv_heads=2, head_dim=4) | options)
    cache.k_cache.fill_(float("nan"))
    cache.v_cache.fill_(float("nan"))
    return cache


@pytest.mark.parametrize("backend", ["auto", "triton"])
@torch.no_grad()
def test_a_float8_cache_is_a_coarser_one(backend):
    torch.manual_seed(0)
    attention = RotaryAttention(FEATURES, 4, 2, max_position=64, backend=backend)
    x = torch.randn(13, FEATURES)
    expected = attention(x[None])[0]
    errors = []
    for scales in ({}, dict(k_scale=0.01, v_scale=torch.tensor([[0.01, 0.02]])), dict(k_scale=1e-4)):
        cache = PagedKVCache(9, 4, 2, 4, dtype=torch.float8_e4m3fn, **scales)
        rows = [attention(x[start:stop], step=cache.extend(["a"], [stop - start])) for start, stop in ((0, 9), (9, 12), (12, 13))]
        errors.append(((torch.cat(rows) - expected).norm() / expected.norm()).item())
    # Four binary digits, whatever the scale, until keys beyond 448 * 1e-4 are cut off.
    assert 1e-3 < errors[0] < 0.05 and 1e-3 < errors[1] < 0.05 and errors[2] > 0.1
    step = cache.extend(["a"], [1])
    assert (
        step.k_scale.shape == (1, 2)
        and step.v_scale.tolist() == [[1.0, 1.0]]
        and poisoned_cache().extend(["a"], [1]).k_scale is None
    )


@pytest.mark.parametrize(
    "scale, dtype, message",
    [
        (1.0, torch.float32, "k_scale is given and dtype is torch.float32; only a cache of torch.float8_e4m3fn has scales"),
        (torch.ones(3), torch.float8_e4m3fn, r"k_scale has shape \(3,\); it must broadcast to \(num_layers, Hkv\), \(1, 2\)"),
        (torch.ones(1, 1, 2), torch.float8_e4m3fn, "k_scale has shape .1, 1, 2."),
        (0.0, torch.float8_e4m3fn, "k_scale is 0.0; a scale is finite and above 0"),
    ],
)
def test_scales_of_a_cache_are_checked(scale, dtype, message):
    with pytest.raises(ValueError, match=f"PagedKVCache: {message}"):
        PagedKVCache(9, 4, 2, 4, dtype=dtype, k_scale=scale)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_attention_through_the_cache_is_attention_over_the_window(backend):
    layers = [RotaryAttention(FEATURES, 4, 2, max_position=64, window=7, backend=backend) for _ in range(2)]
    x = {name: torch.randn(tokens, FEATURES) for name, tokens in (("a", 13), ("b", 6), ("c", 17))}
    expected = {name: layers[1](layers[0](rows.unsqueeze(0))).squeeze(0) for name, rows in x.items()}
    cache = poisoned_cache(num_layers=2)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in x}

    def advance(names, counts):
        step = cache.extend(names, counts)
        rows = torch.cat([x[name][cache.length(name) - count : cache.length(name)] for name, count in zip(names, counts)])
        for layer, attention in enumerate(layers):
            rows = attention(rows, step=step, layer=layer)
        for name, part in zip(names, rows.split(counts)):
            found[name].append(part)

    advance(["a", "b"], [5, 1])
    advance(["b", "a"], [3, 1])
    advance(["a", "b"], [7, 2])
    cache.free("a")  # its blocks, full of old keys, serve the next sequence
    advance(["c"], [16])
    advance(["c"], [1])
    for name, parts in found.items():
        torch.testing.assert_close(torch.cat(parts), expected[name], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_attention_through_the_cache_compiles():
    module = RotaryAttention(FEATURES, 4, 2, max_position=64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, caches = torch.randn(6, FEATURES), (poisoned_cache(), poisoned_cache())
    for rows, count in ((x[:5], 5), (x[5:], 1)):
        eager, fast = (m(rows, step=cache.extend([0], [count])) for m, cache in zip((module, compiled), caches))
        torch.testing.assert_close(fast, eager)


def test_the_cache_gives_blocks_back_and_refuses_what_does_not_fit():
    cache = poisoned_cache()
    cache.extend(["a", "b"], [4, 5])
    assert (cache.free_tokens, cache.length("a"), cache.length("b"), cache.length("c")) == (24, 4, 5, 0)
    with pytest.raises(ValueError, match="25 new tokens need 7 more blocks, and 6 of 4 tokens are free"):
        cache.extend(["a", "c"], [1, 24])
    assert (cache.free_tokens, cache.length("a"), cache.length("c")) == (24, 4, 0)
    step = cache.extend(["b", "a"], [3, 1])
    assert step.seq_lens.tolist() == [8, 5] and step.cu_seqlens.tolist() == [0, 3, 4] and step.positions.tolist() == [5, 6, 7, 4]
    cache.free("a")
    assert cache.free_tokens == 28
    for sequences, counts, message in [
        (["x"], [0], "at least 1 new"),
        (["x", "x"], [1, 1], "distinct"),
        (["x"], [1, 2], "one count for each"),
    ]:
        with pytest.raises(ValueError, match=message):
            cache.extend(sequences, counts)
    with pytest.raises(ValueError, match="there is no sequence 'a'"):
        cache.free("a")
    with pytest.raises(ValueError, match="num_blocks is 0"):
        PagedKVCache(0, 4, 1, 2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RotaryAttention(10, 4), "features, num_heads and num_kv_heads are 10, 4 and 4"),
        (lambda: RotaryAttention(16, 4, 3), "are 16, 4 and 3"),
        (lambda: RotaryAttention(12, 4), "head_dim is 3"),
        (lambda: WaveConv(4, 0), "kernel_size is 0"),
        (lambda: DampedSineMLP(4, 4, frequency=-1.0), "frequency is -1.0"),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
