"""The parts of a block: norm, attention, sine MLP, wave branch. Each runs over whole windows or through the paged cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Iterator

import torch
from psann_kernels import (
    OPS, DampedSine, DampedSineMLP, paged_append, paged_attention, rms_norm, rope_attention, rotary_tables, wave_conv,
)  # fmt: skip
from psann_kernels.library import cast_dtype
from psann_kernels.modules import is_plain_linear
from psann_kernels.registry import Op, for_model
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModelConfig

# Tokens from which on three matrices are laid side by side for one product: a pass over them against a pass for each token.
ENOUGH_TOKENS = 128

ExampleCalls = Iterator[tuple[Op, str, tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Window:
    """Whole sequences, nothing cached: activations are (B, T, d_model).

    cos, sin    rotary tables (at least T, head_dim / 2), or None
    cu_seqlens  (documents + 1,) int32 offsets of the documents in the B * T tokens, or None: one document a row
    """

    cos: Tensor | None
    sin: Tensor | None
    cu_seqlens: Tensor | None


@dataclass(frozen=True)
class CacheView:
    """The new tokens of several sequences end to end: activations are (tokens, d_model). Lengths are in tokens.

    k_cache, v_cache  per layer, (num_blocks, block_size, Hkv, D); keys are stored rotated
    wave_cache        per layer, (num_blocks, block_size, d_model): what the wave branch took in; width 0 without a memory
    block_table       (B, max_blocks) int32
    seq_lens          (B,) int32, the new tokens included
    cu_seqlens        (B + 1,) int32, sequence b owns new tokens cu_seqlens[b] to cu_seqlens[b + 1]
    positions         (tokens,) int64, position of each new token in its sequence
    slot_mapping      (tokens,) int64, block * block_size + offset of each new token
    wave_slots        per layer, (B, state length) int64: slots of the inputs before each sequence's first new token, oldest
                      first; slot 0, which holds zeros, for those before its begin
    cos, sin          rotary tables, or None
    """

    k_cache: tuple[Tensor, ...]
    v_cache: tuple[Tensor, ...]
    wave_cache: tuple[Tensor, ...]
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    slot_mapping: Tensor
    wave_slots: tuple[Tensor, ...]
    cos: Tensor | None
    sin: Tensor | None


class RotaryTables:
    """cos and sin of every position seen so far, float32 whatever the model's dtype (float64 for a float64 model).

    Not a buffer: `module.bfloat16()` would narrow it, and bf16 tables turn distant positions to the same angle.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        self.head_dim, self.theta = head_dim, theta
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def get(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (at least `length`, head_dim / 2)."""
        wide = torch.promote_types(dtype, torch.float32)
        held = self._tables.get((device, wide))
        if held is None or held[0].shape[0] < length:
            size = 1 << max(length - 1, 255).bit_length()
            with torch.inference_mode(False):  # what generation builds, training uses too
                cos, sin = rotary_tables(size, self.head_dim, theta=self.theta, device=device, dtype=wide)
            held = self._tables[device, wide] = (cos, sin)
        return held


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last dimension (d_model,)."""

    def __init__(self, features: int, backend: str, eps: float = 1e-6) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))
        self.eps = eps
        self.backend = for_model(backend, OPS["rms_norm"])

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """y, what the layers after it read, in the dtype of their products; with a residual (y, x + residual)."""
        dtype = cast_dtype(x) if x.dtype == torch.float32 else x.dtype
        residual = None if residual is None else as_branch(residual, x)
        return rms_norm(x, self.scale, residual=residual, eps=self.eps, dtype=dtype, backend=self.backend)

    def example_calls(self) -> ExampleCalls:
        yield OPS["rms_norm"], self.backend, (self.scale.new_empty(1, len(self.scale)), self.scale), {"eps": self.eps}


def as_branch(branch: Tensor, x: Tensor) -> Tensor:
    """A branch as what adds it to x takes it: beside a float32 x it may be a half, as autocast's products are."""
    return branch if x.dtype == torch.float32 else branch.to(x.dtype)


def alibi_slopes(num_heads: int) -> Tensor:
    """(num_heads,) float32, geometric; for a head count that is no power of two, every second slope of the next one fills up.

    Source: Press et al. 2021, arXiv:2108.12409, as BLOOM uses it.
    """
    power = 1 << int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


class Slopes:
    """ALiBi slopes in float32 (float64 beside float64 activations), built once for each device and dtype.

    Not a buffer, as RotaryTables is not.
    """

    def __init__(self, num_heads: int) -> None:
        self.num_heads = num_heads
        self._built: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def beside(self, x: Tensor) -> Tensor:
        """(num_heads,) on x's device."""
        key = x.device, torch.promote_types(x.dtype, torch.float32)
        if key not in self._built:
            with torch.inference_mode(False):  # what generation builds, training uses too
                self._built[key] = alibi_slopes(self.num_heads).to(*key)
        return self._built[key]


class Attention(nn.Module):
    """Causal self-attention; q, k, v, o projections without bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        kv_width = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.slopes = Slopes(self.num_heads) if config.positional_encoding == "alibi" else None
        self.backends = {
            name: for_model(config.backend, OPS[name]) for name in ("rope_attention", "paged_append", "paged_attention")
        }

    def forward(self, x: Tensor, where: Window | CacheView, layer: int) -> Tensor:
        q, k, v = self._projected(x, isinstance(where, Window))
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        k, v = (t.unflatten(-1, (self.num_kv_heads, self.head_dim)) for t in (k, v))
        slopes = None if self.slopes is None else self.slopes.beside(q)
        if isinstance(where, Window):
            y = rope_attention(
                q,
                k,
                v,
                where.cos,
                where.sin,
                cu_seqlens=where.cu_seqlens,
                alibi_slopes=slopes,
                backend=self.backends["rope_attention"],
            )
        else:
            k_cache, v_cache = where.k_cache[layer], where.v_cache[layer]
            paged_append(
                k.to(k_cache.dtype), v.to(v_cache.dtype), k_cache, v_cache, where.slot_mapping,
                positions=where.positions, cos=where.cos, sin=where.sin, backend=self.backends["paged_append"],
            )  # fmt: skip
            y = paged_attention(
                q.to(k_cache.dtype), k_cache, v_cache, where.block_table, where.seq_lens, where.cu_seqlens,
                cos=where.cos, sin=where.sin, alibi_slopes=slopes, backend=self.backends["paged_attention"],
            )  # fmt: skip
        return self.dropout(self.o_proj(y.flatten(-2)))

    def _projected(self, x: Tensor, is_window: bool) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (..., width). Of whole windows by one product, whose gradients are one product each too; for the few tokens of
        a decoding step, laying the matrices side by side would take longer than multiplying them."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        if not (is_window and x.shape[:-1].numel() >= ENOUGH_TOKENS and all(map(is_plain_linear, parts))):
            return tuple(part(x) for part in parts)
        weights = [part.weight for part in parts]
        return F.linear(x, torch.cat(weights)).split([len(weight) for weight in weights], -1)

    def example_calls(self) -> ExampleCalls:
        new = self.q_proj.weight.new_empty
        device = self.q_proj.weight.device
        q, k = new(1, 1, self.num_heads, self.head_dim), new(1, 1, self.num_kv_heads, self.head_dim)
        slopes = None if self.slopes is None else self.slopes.beside(q)
        yield OPS["rope_attention"], self.backends["rope_attention"], (q, k, k), {"alibi_slopes": slopes}
        cache = new(1, 16, self.num_kv_heads, self.head_dim)
        index = lambda *values, dtype: torch.tensor(values, dtype=dtype, device=device)  # noqa: E731 (three uses on the next lines)
        slot = index(0, dtype=torch.int64)
        yield OPS["paged_append"], self.backends["paged_append"], (k[0], k[0], cache, cache, slot), {}
        table, lens, cu = (index(*v, dtype=torch.int32) for v in ((0,), (1,), (0, 1)))
        yield (
            OPS["paged_attention"], self.backends["paged_attention"],
            (q[0], cache, cache, table.unsqueeze(0), lens, cu), {"alibi_slopes": slopes},
        )  # fmt: skip


def sine_options(config: ModelConfig) -> dict[str, Any]:
    """DampedSine's options that a configuration asks for."""
    return dict(
        amplitude=config.sine_amp_init,
        frequency=config.sine_freq_init,
        damping=config.sine_damp_init,
        amplitude_std=config.sine_amp_init_std,
        frequency_std=config.sine_freq_init_std,
        damping_std=config.sine_damp_init_std,
        learnable=config.learnable_sine,
        bounds=config.sine_bounds,
        mode=config.sine_mode,
    )


class SineMLP(DampedSineMLP):
    """dropout(fc2(damped_sine(fc1(x))))."""

    def __init__(self, config: ModelConfig) -> None:
        backend = for_model(config.backend, OPS["damped_sine_mlp"])
        super().__init__(config.d_model, config.d_mlp, backend=backend, **sine_options(config))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(super().forward(x))


class WaveBranch(nn.Module):
    """out_proj(damped_sine(causal depthwise dilated convolution of norm(x))): mixing over the near past, beside attention."""

    speaks_for = ("act",)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.dilation = config.wave_dilations[layer % len(config.wave_dilations)]
        self.kernel_size = config.wave_kernel
        self.norm = RMSNorm(config.d_model, config.backend)
        self.weight = nn.Parameter(torch.empty(config.d_model, self.kernel_size))
        self.bias = nn.Parameter(torch.zeros(config.d_model))
        self.act = DampedSine(config.d_model, backend=config.backend, **sine_options(config))
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.backend = for_model(config.backend, OPS["wave_conv"])

    @property
    def state_length(self) -> int:
        """Inputs that decoding must remember for each sequence."""
        return (self.kernel_size - 1) * self.dilation

    def forward(self, x: Tensor, where: Window | CacheView, layer: int) -> Tensor:
        x = self.norm(x)
        if isinstance(where, Window):
            cu_seqlens, state = where.cu_seqlens, None
        else:
            cu_seqlens, pool = where.cu_seqlens, where.wave_cache[layer].flatten(0, 1)
            state = pool[where.wave_slots[layer]].to(x.dtype) if self.state_length else None
            if self.state_length:
                pool[where.slot_mapping] = x.to(pool.dtype)
        y = wave_conv(
            x, self.weight, *self.act.parameters_of_sine(), bias=self.bias, dilation=self.dilation,
            cu_seqlens=cu_seqlens, state=state, mode=self.act.mode, backend=self.backend,
        )  # fmt: skip
        return self.dropout(self.out_proj(y))

    def example_calls(self) -> ExampleCalls:
        x = self.weight.new_empty(1, 1, len(self.weight))
        yield (
            OPS["wave_conv"], self.backend, (x, self.weight, *self.act.parameters_of_sine()),
            {"bias": self.bias, "dilation": self.dilation, "mode": self.act.mode},
        )  # fmt: skip
