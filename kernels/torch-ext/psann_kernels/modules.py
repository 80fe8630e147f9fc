"""The ops as ordinary nn.Modules, with parameters, for any model."""

from __future__ import annotations

from typing import Any, Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .damped_sine import MODES, damped_sine
from .damped_sine_mlp import damped_sine_mlp
from .linear_cross_entropy import REDUCTIONS, linear_cross_entropy
from .paged_attention import paged_append, paged_attention
from .paged_cache import PagedStep
from .registry import OPS, Op, check_backend, for_model
from .rms_norm import rms_norm
from .rope_attention import rope_attention, rotary_tables
from .wave_conv import wave_conv, wave_state

ExampleCalls = Iterator[tuple[Op, str, tuple[Any, ...], dict[str, Any]]]

# Keeps the frequency positive where softplus underflows, as psann does, so that its weights give the same numbers here.
FREQUENCY_FLOOR = 1e-6


def is_plain_linear(part: nn.Module) -> bool:
    """Whether `part` is an nn.Linear with nothing of anybody else's around it (hooks, an adapter):
    its weight says all that it does."""
    return _is_plain(part, nn.Linear)


def _is_plain(part: nn.Module, kind: type[nn.Module]) -> bool:
    has_hooks = part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
    return type(part) is kind and not has_hooks and "forward" not in part.__dict__


class DampedSine(nn.Module):
    """y = amplitude * exp(-damping * g(z)) * sin(frequency * z) with learnable positive parameters, one triple per feature.

    features        F; the input is (..., F)
    amplitude, frequency, damping   initial values; amplitude and damping as in the op, frequency in radians per unit of z
    amplitude_std, frequency_std, damping_std   spread of the initial values over the features (normal, kept positive)
    learnable       which of "amplitude", "frequency", "damping" are trained
    bounds          name -> (least, largest), either None: the positive value is clamped, and learns only inside
    mode            "abs", "relu" or "none": what the damping multiplies
    backend         "auto", "triton", "native" or "torch"

    The parameters `_A`, `_f`, `_d` (F,) hold inverse softplus values in float32: amplitude = softplus(_A),
    frequency = softplus(_f) + 1e-6, damping = softplus(_d). Raises ValueError for values that no softplus gives.
    Source: the names and the transform are those of psann's SineParam, so its state dicts load.
    """

    def __init__(
        self,
        features: int,
        *,
        amplitude: float = 1.0,
        frequency: float = 1.0,
        damping: float = 0.01,
        amplitude_std: float = 0.0,
        frequency_std: float = 0.0,
        damping_std: float = 0.0,
        learnable: Collection[str] = ("amplitude", "frequency", "damping"),
        bounds: Mapping[str, tuple[float | None, float | None]] | None = None,
        mode: str = "abs",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("amplitude", amplitude), ("frequency", frequency), ("damping", damping)):
            if not value > 0:
                raise ValueError(f"DampedSine: {name} is {value!r}; it must be above 0, since it is kept positive by softplus")
        for option, names in (("learnable", learnable), ("bounds", bounds or ())):
            unknown = set(names) - {"amplitude", "frequency", "damping"}
            if unknown:
                raise ValueError(f"DampedSine: {option} names {sorted(unknown)}; choose among 'amplitude', 'frequency', 'damping'")
        if mode not in MODES:
            raise ValueError(f"DampedSine: mode is {mode!r}; choose one of {', '.join(map(repr, MODES))}")
        check_backend(backend, "DampedSine")
        self.features, self.mode, self.backend = features, mode, backend
        self.bounds = dict(bounds or {})
        self._A = nn.Parameter(_raw(amplitude, amplitude_std, features), requires_grad="amplitude" in learnable)
        self._f = nn.Parameter(_raw(frequency, frequency_std, features, FREQUENCY_FLOOR), requires_grad="frequency" in learnable)
        self._d = nn.Parameter(_raw(damping, damping_std, features), requires_grad="damping" in learnable)

    def parameters_of_sine(self) -> tuple[Tensor, Tensor, Tensor]:
        """(amplitude, frequency, damping), each (F,), float32 (float64 in a float64 module)."""
        wide = torch.promote_types(self._A.dtype, torch.float32)
        amplitude, frequency, damping = (F.softplus(t.to(wide)) for t in (self._A, self._f, self._d))
        values = {"amplitude": amplitude, "frequency": frequency + FREQUENCY_FLOOR, "damping": damping}
        for name, (least, largest) in self.bounds.items():
            values[name] = values[name].clamp(least, largest)
        return values["amplitude"], values["frequency"], values["damping"]

    def forward(self, z: Tensor) -> Tensor:
        """z (..., F) -> (..., F) in z's dtype."""
        return damped_sine(z, *self.parameters_of_sine(), mode=self.mode, backend=self.backend)

    def example_calls(self) -> ExampleCalls:
        """The op call that `explain(model)` asks about."""
        z = self._A.new_empty((1, self.features))
        yield OPS["damped_sine"], self.backend, (z, *self.parameters_of_sine()), {"mode": self.mode}

    def extra_repr(self) -> str:
        return f"{self.features}, mode={self.mode!r}, backend={self.backend!r}"


class DampedSineMLP(nn.Module):
    """fc2(damped_sine(fc1(x))): an MLP of one hidden layer.

    in_features, hidden_features, out_features   widths; out_features defaults to in_features
    bias      whether both linear layers have one
    fused     as in damped_sine_mlp: True asks for the kernels that compute the sine in a matrix product's epilogue
    backend   "auto", "triton", "native" or "torch"
    sine      further options of DampedSine

    State: `fc1.weight`, `fc1.bias`, `act._A`, `act._f`, `act._d`, `fc2.weight`, `fc2.bias`, the names of psannlm's MLP. The linear
    layers start as nn.Linear does. One call of damped_sine_mlp, unless a part has hooks or another stands in its place (an
    adapter): then the parts are called one by one, so that these take part.
    Raises ValueError as DampedSine, and for fused with such parts.
    """

    speaks_for = ("act",)

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        bias: bool = True,
        fused: bool = False,
        backend: str = "auto",
        **sine: Any,
    ) -> None:
        super().__init__()
        self.fused = fused
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.act = DampedSine(hidden_features, backend=backend, **sine)
        self.fc2 = nn.Linear(hidden_features, in_features if out_features is None else out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        if self._has_own_parts():
            return damped_sine_mlp(x, *self._tensors(), **self._options(), backend=self.act.backend)
        if self.fused:
            raise ValueError(
                "DampedSineMLP: fused=True, but fc1, act or fc2 has hooks or was replaced, and the fused kernel would pass over "
                "that; take it away or set fused=False"
            )
        return self.fc2(self.act(self.fc1(x)))

    def _has_own_parts(self) -> bool:
        """Whether the three parts are what __init__ made, with nothing of anybody else's around them."""
        return is_plain_linear(self.fc1) and _is_plain(self.act, DampedSine) and is_plain_linear(self.fc2)

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.fc1.weight, self.fc1.bias, *self.act.parameters_of_sine(), self.fc2.weight, self.fc2.bias

    def _options(self) -> dict[str, Any]:
        return {"mode": self.act.mode, "fused": self.fused}

    def example_calls(self) -> ExampleCalls:
        """The op call that `explain(model)` asks about; the sine's own where the parts are called one by one."""
        if self._has_own_parts():
            x = self.fc1.weight.new_empty((1, self.fc1.in_features))
            yield OPS["damped_sine_mlp"], self.act.backend, (x, *self._tensors()), self._options()
        elif hasattr(self.act, "example_calls"):
            yield from self.act.example_calls()


class LinearCrossEntropy(nn.Module):
    """The last linear layer of a classifier and its cross-entropy, without the (tokens, classes) matrix of logits.

    features    K, the input's width
    classes     V
    bias        whether the layer has one
    ignore_index, label_smoothing, z_loss, soft_cap, reduction, chunk   as in linear_cross_entropy; label_smoothing and z_loss act
                only while the module trains
    backend     "auto", "triton", "native" or "torch"

    State: `weight` (V, K) and `bias` (V,), initialized as nn.Linear's; `loss.weight = embedding.weight` ties it.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        bias: bool = False,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        soft_cap: float | None = None,
        reduction: str = "mean",
        chunk: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_backend(backend, "LinearCrossEntropy")
        if reduction not in REDUCTIONS:
            raise ValueError(f"LinearCrossEntropy: reduction is {reduction!r}; choose one of {', '.join(map(repr, REDUCTIONS))}")
        bound = features**-0.5
        self.weight = nn.Parameter(torch.empty(classes, features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(classes).uniform_(-bound, bound)) if bias else None
        self.ignore_index, self.label_smoothing, self.z_loss, self.soft_cap = ignore_index, label_smoothing, z_loss, soft_cap
        self.reduction, self.chunk, self.backend = reduction, chunk, backend

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """x (..., K), targets (...) int64 -> the loss, () or targets' shape for reduction "none"."""
        return linear_cross_entropy(x, self.weight, targets, **self._options(), backend=self.backend)

    def _options(self) -> dict[str, Any]:
        return dict(
            bias=self.bias, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing if self.training else 0.0,
            z_loss=self.z_loss if self.training else 0.0, soft_cap=self.soft_cap, reduction=self.reduction, chunk=self.chunk,
        )  # fmt: skip

    def example_calls(self) -> ExampleCalls:
        """The op call that `explain(model)` asks about."""
        targets = torch.zeros(1, dtype=torch.int64, device=self.weight.device)
        yield (
            OPS["linear_cross_entropy"],
            self.backend,
            (self.weight.new_empty((1, self.weight.shape[1])), self.weight, targets),
            self._options(),
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {len(self.weight)}, reduction={self.reduction!r}, backend={self.backend!r}"


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, with an optional residual addition in front.

    features   F
    eps        added to the mean square, in x's unit squared
    backend    "auto", "triton", "native" or "torch"

    State: `weight` (F,), ones at first. Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(self, features: int, eps: float = 1e-6, *, backend: str = "auto") -> None:
        super().__init__()
        check_backend(backend, "RMSNorm")
        self.weight = nn.Parameter(torch.ones(features))
        self.eps, self.backend = eps, backend

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x (..., F) -> (..., F); with a residual of x's shape the pair (norm of x + residual, x + residual)."""
        return rms_norm(x, self.weight, residual=residual, eps=self.eps, backend=self.backend)

    def example_calls(self) -> ExampleCalls:
        """The op call that `explain(model)` asks about."""
        yield OPS["rms_norm"], self.backend, (self.weight.new_empty((1, len(self.weight))), self.weight), {"eps": self.eps}

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}, backend={self.backend!r}"


class RotaryAttention(nn.Module):
    """Causal self-attention with rotary positions and grouped heads, over whole windows or through a paged cache.

    features       F, a multiple of num_heads; head_dim D = F / num_heads must be even
    num_heads      H
    num_kv_heads   Hkv, divides H; default H
    theta          base of the rotary wavelengths
    max_position   positions that the rotary tables hold; longer sequences are an error
    interleaved    True turns adjacent pairs of features, False turns halves (Llama)
    window         tokens that a query sees, its own included; None: all
    bias           whether the four projections have one
    backend        "auto", "triton", "native", "torch" or "gluon" (see rope_attention); an op that the backend does not implement at
                   all runs as under "auto"

    State: `q_proj`, `k_proj`, `v_proj`, `o_proj`. The tables are float32 whatever the module's dtype (float64 in a float64
    module): bfloat16 ones would turn distant positions to the same angle. Source: as rope_attention and paged_attention.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        theta: float = 10000.0,
        max_position: int = 4096,
        interleaved: bool = True,
        window: int | None = None,
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_backend(backend, "RotaryAttention")
        self.num_heads, self.num_kv_heads = num_heads, num_heads if num_kv_heads is None else num_kv_heads
        if features % num_heads or num_heads % self.num_kv_heads:
            raise ValueError(
                f"RotaryAttention: features, num_heads and num_kv_heads are {features}, {num_heads} and {self.num_kv_heads}; "
                "each must be a multiple of the next"
            )
        self.head_dim = features // num_heads
        self.theta, self.max_position, self.interleaved, self.window = theta, max_position, interleaved, window
        self.backend = backend
        self.q_proj = nn.Linear(features, features, bias=bias)
        self.k_proj = nn.Linear(features, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(features, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(features, features, bias=bias)
        for name, table in zip(("cos", "sin"), self._tables()):
            self.register_buffer(name, table, persistent=False)

    def _tables(self) -> tuple[Tensor, Tensor]:
        like = self.q_proj.weight
        wide = torch.promote_types(like.dtype, torch.float32)
        return rotary_tables(self.max_position, self.head_dim, theta=self.theta, device=like.device, dtype=wide)

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryAttention:
        super()._apply(fn, recurse)
        self.cos, self.sin = self._tables()  # `fn` may have narrowed them
        return self

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, step: PagedStep | None = None, layer: int = 0) -> Tensor:
        """Whole windows: x (B, T, F), or packed documents (total, F) with cu_seqlens (documents + 1,) int32, as in rope_attention.
        Through a cache: x (T, F), the new tokens that `step` describes end to end; `layer` is this module's layer in the cache,
        which receives their keys and values (no gradient). Returns x's shape.
        """
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        options: dict[str, Any] = dict(cos=self.cos, sin=self.sin, interleaved=self.interleaved)
        if step is None:
            o = rope_attention(
                q, k, v, **options, cu_seqlens=cu_seqlens, window=self.window, backend=self._backend("rope_attention")
            )
            return self.o_proj(o.flatten(-2))
        if cu_seqlens is not None:
            raise ValueError("RotaryAttention: cu_seqlens came with a step, which says itself where sequences begin; leave it out")
        k_cache, v_cache = step.k_cache[layer], step.v_cache[layer]
        options |= step.scales(layer)
        paged_append(
            k, v, k_cache, v_cache, step.slot_mapping, positions=step.positions, **options, backend=self._backend("paged_append")
        )
        o = paged_attention(
            q, k_cache, v_cache, step.block_table, step.seq_lens, step.cu_seqlens, **options, window=self.window,
            backend=self._backend("paged_attention"),
        )  # fmt: skip
        return self.o_proj(o.flatten(-2))

    def _backend(self, op: str) -> str:
        return for_model(self.backend, OPS[op])

    def example_calls(self) -> ExampleCalls:
        """The op calls that `explain(model)` asks about."""
        q, k = (self.q_proj.weight.new_empty((1, 1, heads, self.head_dim)) for heads in (self.num_heads, self.num_kv_heads))
        options = {"interleaved": self.interleaved, "window": self.window}
        yield OPS["rope_attention"], self.backend, (q, k, k, self.cos, self.sin), options
        cache, slots = k.new_empty((1, 16, *k.shape[2:])), torch.zeros(1, dtype=torch.int64, device=k.device)
        tables = {"cos": self.cos, "sin": self.sin}
        yield (
            OPS["paged_append"],
            self.backend,
            (k[0], k[0], cache, cache, slots),
            {"positions": slots, **tables, "interleaved": self.interleaved},
        )
        table, lengths, offsets = (torch.tensor(v, dtype=torch.int32, device=k.device) for v in ([[0]], [1], [0, 1]))
        yield OPS["paged_attention"], self.backend, (q[0], cache, cache, table, lengths, offsets), {**tables, **options}

    def extra_repr(self) -> str:
        window = "" if self.window is None else f", window={self.window}"
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        return f"{heads}, interleaved={self.interleaved}{window}, backend={self.backend!r}"


class WaveConv(nn.Module):
    """Causal depthwise convolution over time, then the damped sine: each feature mixes with its own near past.

    features      F
    kernel_size   taps K
    dilation      tokens between taps; the newest is the token itself, the oldest (K - 1) * dilation before it
    bias          whether the convolution has one
    backend       "auto", "triton", "native" or "torch"
    sine          further options of DampedSine

    State: `weight` (F, K), uniform within 1 / sqrt(K) at first, `bias` (F,) and `act._A`, `act._f`, `act._d`. Source: as wave_conv.
    """

    speaks_for = ("act",)

    def __init__(
        self, features: int, kernel_size: int = 4, *, dilation: int = 1, bias: bool = True, backend: str = "auto", **sine: Any
    ) -> None:
        super().__init__()
        if kernel_size < 1 or dilation < 1:
            raise ValueError(f"WaveConv: kernel_size is {kernel_size} and dilation {dilation}; both must be at least 1")
        self.kernel_size, self.dilation, self.backend = kernel_size, dilation, backend
        self.weight = nn.Parameter(torch.empty(features, kernel_size).uniform_(-(kernel_size**-0.5), kernel_size**-0.5))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None
        self.act = DampedSine(features, backend=backend, **sine)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """x (B, T, F), or documents end to end (total, F) with cu_seqlens (documents + 1,) int32 -> x's shape.

        state   (B or documents, (K - 1) * dilation, F): what next_state gave for the tokens before; None: x begins its documents
        """
        return wave_conv(x, self.weight, *self.act.parameters_of_sine(), **self._options(cu_seqlens, state), backend=self.backend)

    def next_state(self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """The state after x, for the tokens that follow; arguments as forward's."""
        return wave_state(x, state, kernel_size=self.kernel_size, dilation=self.dilation, cu_seqlens=cu_seqlens)

    def _options(self, cu_seqlens: Tensor | None, state: Tensor | None) -> dict[str, Any]:
        return dict(bias=self.bias, dilation=self.dilation, cu_seqlens=cu_seqlens, state=state, mode=self.act.mode)

    def example_calls(self) -> ExampleCalls:
        """The op call that `explain(model)` asks about."""
        x = self.weight.new_empty((1, 1, len(self.weight)))
        yield OPS["wave_conv"], self.backend, (x, self.weight, *self.act.parameters_of_sine()), self._options(None, None)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, kernel_size={self.kernel_size}, dilation={self.dilation}, backend={self.backend!r}"


def _raw(mean: float, std: float, features: int, floor: float = 0.0) -> Tensor:
    """What softplus takes to `mean` (spread by `std`) less `floor`."""
    if torch.get_default_device().type == "meta":
        return torch.empty(features)  # a shape is asked for; to compute it, torch would import its compiler (2 s)
    value = torch.full((features,), float(mean), dtype=torch.float64)
    if std:
        # A draw near or below zero would make a dead feature; a hundredth of the mean is as small as one may start.
        value = (value + std * torch.randn(features, dtype=torch.float64)).clamp_min(0.01 * mean)
    return _inverse_softplus(value - floor).float()


def _inverse_softplus(y: Tensor) -> Tensor:
    # log(e^y - 1) written so that it neither overflows for large y nor cancels for small ones.
    return y + torch.log(-torch.expm1(-y))
