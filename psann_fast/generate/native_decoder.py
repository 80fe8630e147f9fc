"""The step of our own bases on a CPU, as a plain sequence of native kernels.

With one text the time of a step is that of reading the weights once, so what stands between two kernels must cost little: here
that is one call by address into buffers made once for each number of rows, about 2 us, where a module's forward, the registry and an
op's checks take 10 to 20. Read models/layers.py first: this is the same computation, and a test compares the two.

Residual additions ride on the norms that follow them. Matrices may be held in bfloat16 or int8 (EngineOptions.weights); more than
MAX_ROWS rows are a matter for torch's matrix product, with the same rounded weights in float32, made when they are first needed.
"""

from __future__ import annotations

from typing import Iterator
from weakref import WeakKeyDictionary

import torch
from psann_kernels.damped_sine import MODES
from psann_kernels.linear import quantize
from psann_kernels.native import NATIVE, TYPES, WHY_NOT, address
from torch import Tensor, nn

from ..config import ModelConfig
from ..models import CacheView
from ..models.language_model import LanguageModel, sinusoidal
from ..models.layers import Attention, RMSNorm, SineMLP, WaveBranch
from ..models.respsann import ResPSANNBlock
from ..models.waveresnet import WaveResNetBlock

WEIGHT_TYPES = {**TYPES, torch.int8: 3}
# As linear_native serves; more rows reuse each weight enough for a product that blocks for the caches.
MAX_ROWS = 8
# Buffers are kept for steps of at most this many rows; those of a prompt's chunk are made anew.
KEPT_ROWS = 64


def refuses(module: nn.Module) -> str | None:
    """Why this decoder cannot serve the model, or None."""
    if NATIVE is None:
        return WHY_NOT
    if type(module) is not LanguageModel or any(type(block) not in (ResPSANNBlock, WaveResNetBlock) for block in module.blocks):
        return "the base is not one of ours, and only its own modules know how it computes"
    for block in module.blocks:
        parts = (type(block.attn), type(block.mlp), type(getattr(block, "wave", None)))
        if parts[:2] != (Attention, SineMLP) or parts[2] not in (WaveBranch, type(None)):
            return f"a block was given other parts than it was built with: {', '.join(part.__name__ for part in parts)}"
    dtypes = {(p.dtype, p.device.type) for p in module.parameters()}
    if len(dtypes) > 1 or not dtypes <= {(dtype, "cpu") for dtype in TYPES}:
        return f"the weights are {', '.join(sorted(f'{d} on {where}' for d, where in dtypes))}; it serves one of float32, bfloat16 and float16 on a CPU"
    if module.config.backend not in ("auto", "native"):
        return f"the model was made with backend={module.config.backend!r}"
    if module.config.wave_kernel > NATIVE.wave_conv_max_taps:
        return f"wave_kernel is {module.config.wave_kernel}; the native convolution has at most {NATIVE.wave_conv_max_taps} taps"
    if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
        return "a module has a forward hook, which would not be called"
    return None


class Matrix:
    """A linear layer's weight, rounded if asked for, and its bias."""

    def __init__(self, layer: nn.Linear, weights: str) -> None:
        weight = layer.weight.detach()
        self.scale: Tensor | None = None
        if weights == "bf16":
            weight = weight.to(torch.bfloat16)
        elif weights == "int8":
            weight, self.scale = quantize(weight)
        self.weight = weight.contiguous()
        self.bias = None if layer.bias is None else layer.bias.detach()
        self._bias32 = None if self.bias is None else self.bias.float().contiguous()
        self.outputs, self.inputs = weight.shape
        self._pointers = self.weight.data_ptr(), address(self.scale), address(self._bias32)
        self._type = WEIGHT_TYPES[weight.dtype]
        self._wide: Tensor | None = None

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Write x (rows, inputs) times the weight, plus bias, into y (rows, outputs); both contiguous, of one dtype."""
        rows = x.shape[0]
        if rows <= MAX_ROWS:
            NATIVE.linear(
                x.data_ptr(), *self._pointers, y.data_ptr(), rows, self.inputs, self.outputs, self.inputs, self.inputs,
                TYPES[x.dtype], self._type, torch.get_num_threads(),
            )  # fmt: skip
            return
        if self._wide is None:
            wide = self.weight if self.scale is None else self.weight.float() * self.scale[:, None]
            self._wide = wide.to(x.dtype).t()
        if self.bias is None:
            torch.mm(x, self._wide, out=y)
        else:
            torch.addmm(self.bias, x, self._wide, out=y)


class Norm:
    def __init__(self, norm: RMSNorm) -> None:
        self.scale, self.eps = norm.scale.detach().contiguous(), norm.eps

    def __call__(self, x: Tensor, residual: Tensor | None, y: Tensor, h: Tensor | None) -> None:
        """y = norm of h, and h = x + residual; h is x itself without a residual."""
        rows, features = x.shape
        NATIVE.rms_norm_forward(
            x.data_ptr(), address(residual), self.scale.data_ptr(), y.data_ptr(), address(h), rows, features, features, features,
            self.eps, TYPES[x.dtype], TYPES[self.scale.dtype], torch.get_num_threads(),
        )  # fmt: skip


class Sine:
    """The positive parameters, computed once."""

    def __init__(self, sine: nn.Module) -> None:
        self._kept = [t.detach().contiguous() for t in sine.parameters_of_sine()]
        self.pointers = [t.data_ptr() for t in self._kept]
        self.mode = MODES.index(sine.mode)

    def __call__(self, z: Tensor) -> None:
        """In place."""
        rows, features = z.shape
        NATIVE.damped_sine_forward(
            z.data_ptr(), *self.pointers, z.data_ptr(), rows, features, features, TYPES[z.dtype], self.mode, torch.get_num_threads()
        )


class Wave:
    def __init__(self, wave: WaveBranch, weights: str) -> None:
        self.norm, self.sine, self.out = Norm(wave.norm), Sine(wave.act), Matrix(wave.out_proj, weights)
        self._taps, self._bias = wave.weight.detach().float().contiguous(), wave.bias.detach().float().contiguous()
        self._kernel, self._dilation, self._length = wave.kernel_size, wave.dilation, wave.state_length

    def __call__(self, n: Tensor, view: CacheView, layer: int, y: Tensor) -> None:
        """Convolve the normed inputs n with their past, which lies in the cache; write the sine of that into y."""
        state = None
        if self._length:
            pool = view.wave_cache[layer].view(-1, n.shape[1])
            slots = view.wave_slots[layer]
            state = pool.index_select(0, slots.view(-1))
            pool.index_copy_(0, view.slot_mapping, n)
        rows, features = n.shape
        numbers = (rows, features, self._kernel, self._dilation, len(view.seq_lens), 0, features, TYPES[n.dtype], self.sine.mode)
        pointers = (n.data_ptr(), address(state), self._taps.data_ptr(), self._bias.data_ptr(), *self.sine.pointers, view.cu_seqlens.data_ptr())
        NATIVE.wave_conv_forward((*pointers, *numbers), y.data_ptr(), torch.get_num_threads())


class Layer:
    """One block; what it leaves is x and an addition to x that nobody has made yet."""

    def __init__(self, block: ResPSANNBlock, weights: str) -> None:
        attn, mlp = block.attn, block.mlp
        self.wave = Wave(block.wave, weights) if hasattr(block, "wave") else None
        self.norm1, self.norm2 = Norm(block.norm1), Norm(block.norm2)
        self.q, self.k, self.v, self.o = (Matrix(p, weights) for p in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj))
        self.fc1, self.sine, self.fc2 = Matrix(mlp.fc1, weights), Sine(mlp.act), Matrix(mlp.fc2, weights)
        self.alpha = block.alpha.item()
        self.heads, self.kv_heads, self.head_dim = attn.num_heads, attn.num_kv_heads, attn.head_dim
        self.slopes = None if attn.slopes is None else attn.slopes.beside(attn.q_proj.weight).contiguous()

    def __call__(self, x: Tensor, added: Tensor | None, view: CacheView, layer: int, b: Buffers) -> Tensor:
        """Updates x in place; returns what is to be added to it, in one of the buffers."""
        if self.wave is not None:
            self.wave.norm(x, added, b.n, None if added is None else x)
            self.wave(b.n, view, layer, b.o)
            self.wave.out(b.o, b.added)
            added = b.added
        self.norm1(x, added, b.n, None if added is None else x)
        self.q(b.n, b.q)
        self.k(b.n, b.k)
        self.v(b.n, b.v)
        self._attend(view, layer, b)
        self.o(b.o, b.added)
        self.norm2(x, b.added, b.n, x)
        self.fc1(b.n, b.z)
        self.sine(b.z)
        self.fc2(b.z, b.added)
        if self.alpha != 1.0:
            b.added.mul_(self.alpha)
        return b.added

    def _attend(self, view: CacheView, layer: int, b: Buffers) -> None:
        k_cache, v_cache = view.k_cache[layer], view.v_cache[layer]
        num_blocks, block_size, kv_heads, head_dim = k_cache.shape
        rows, width, kv_width = len(b.q), self.heads * head_dim, kv_heads * head_dim
        strides, threads, kind = k_cache.stride()[:3], torch.get_num_threads(), TYPES[b.q.dtype]
        cos, sin, max_position = address(view.cos), address(view.sin), 0 if view.cos is None else len(view.cos)
        NATIVE.paged_append(
            b.k.data_ptr(), b.v.data_ptr(), k_cache.data_ptr(), strides, v_cache.data_ptr(), strides, view.slot_mapping.data_ptr(),
            view.positions.data_ptr(), cos, sin, True, rows, kv_heads, head_dim, block_size, num_blocks, max_position,
            kv_width, head_dim, kv_width, head_dim, kind, threads,
        )  # fmt: skip
        sequences, max_blocks = view.block_table.shape
        NATIVE.paged_attention(
            b.q.data_ptr(), k_cache.data_ptr(), strides, v_cache.data_ptr(), strides, view.block_table.data_ptr(),
            view.seq_lens.data_ptr(), view.cu_seqlens.data_ptr(), address(self.slopes), b.o.data_ptr(), cos, sin, True, rows, sequences,
            self.heads, kv_heads, head_dim, block_size, num_blocks, max_blocks, max_position, max_blocks, width, head_dim, 0,
            head_dim**-0.5, kind, threads,
        )  # fmt: skip


class Buffers:
    """Activations of a step of `rows` tokens."""

    def __init__(self, rows: int, config: ModelConfig, dtype: torch.dtype) -> None:
        kv_width = config.n_kv_heads * config.head_dim
        widths = dict(x=config.d_model, n=config.d_model, added=config.d_model, q=config.d_model, k=kv_width, v=kv_width)
        for name, width in {**widths, "o": config.d_model, "z": config.d_mlp}.items():
            setattr(self, name, torch.empty(rows, width, dtype=dtype))


class NativeDecoder:
    """See Decoder. Holds references to the model's weights as they are now; decoder_for makes a new one when they have changed."""

    def __init__(self, module: LanguageModel, weights: str) -> None:
        # Not the module itself: _PREPARED would then keep it alive.
        self._config, self._embedding = module.config, module.embed.weight.detach()
        self._layers = [Layer(block, weights) for block in module.blocks]
        self._last = Norm(module.ln_f)
        self._head = Matrix(module.lm_head, weights)
        self._is_sinusoidal = module.config.positional_encoding == "sinusoidal"
        self._buffers: dict[int, Buffers] = {}

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that a step of one token reads."""
        matrices = [m for layer in self._layers for m in (layer.q, layer.k, layer.v, layer.o, layer.fc1, layer.fc2)]
        matrices += [layer.wave.out for layer in self._layers if layer.wave is not None] + [self._head]
        return sum(m.weight.numel() * m.weight.element_size() for m in matrices)

    def hidden(self, ids: list[int], view: CacheView) -> Tensor:
        b = self._buffers_of(len(ids))
        torch.index_select(self._embedding, 0, torch.tensor(ids), out=b.x)
        if self._is_sinusoidal:
            b.x.add_(sinusoidal(view.positions, b.x.shape[1]).to(b.x.dtype))
        added = None
        for index, layer in enumerate(self._layers):
            added = layer(b.x, added, view, index, b)
        self._last(b.x, added, b.n, b.x)
        return b.n

    def logits(self, hidden: Tensor) -> Tensor:
        y = hidden.new_empty(len(hidden), self._head.outputs)
        self._head(hidden, y)
        return y

    def _buffers_of(self, rows: int) -> Buffers:
        held = self._buffers.get(rows)
        if held is None:
            held = Buffers(rows, self._config, self._embedding.dtype)
            if rows <= KEPT_ROWS:
                self._buffers[rows] = held
        return held


_PREPARED: WeakKeyDictionary[nn.Module, dict[str, tuple[tuple[tuple[int, int], ...], NativeDecoder]]] = WeakKeyDictionary()


def prepared(module: LanguageModel, weights: str) -> NativeDecoder:
    """The decoder of a model that `refuses` has nothing against; kept until a weight changes."""
    state = tuple(_versions(module))
    held = _PREPARED.setdefault(module, {})
    if weights not in held or held[weights][0] != state:
        held[weights] = state, NativeDecoder(module, weights)
    return held[weights][1]


def _versions(module: nn.Module) -> Iterator[tuple[int, int]]:
    for parameter in module.parameters():
        yield parameter.data_ptr(), parameter._version
