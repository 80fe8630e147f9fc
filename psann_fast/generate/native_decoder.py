"""The step of our own bases on a CPU, as a plain sequence of native kernels.

With one text the time of a step is that of reading the weights once, so what stands between two kernels must cost little: here
that is one call by address into buffers made once for each number of rows, about 2 us, where a module's forward, the registry and
an op's checks take 10 to 20. Read models/layers.py first: this is the same computation, and a test compares the two.

Residual additions ride on the norms that follow them. Matrices may be held in bfloat16 or int8 (EngineOptions.weights). They are
packed once, and one kernel multiplies one row or a whole chunk of a prompt with them, bit for bit as it would each row alone.
"""

from __future__ import annotations

from typing import Any, Callable, Iterator
from weakref import WeakKeyDictionary

import torch
from psann_kernels.damped_sine import MODES
from psann_kernels.linear import quantize
from psann_kernels.linear_native import WEIGHT_TYPES
from psann_kernels.native import NATIVE, TYPES, WHY_NOT, address
from psann_kernels.packed_linear import pack
from torch import Tensor, nn

from ..models import CacheView
from ..models.language_model import LanguageModel, sinusoidal
from ..models.layers import Attention, RMSNorm, SineMLP, WaveBranch
from ..models.respsann import ResPSANNBlock
from ..models.waveresnet import WaveResNetBlock

Call = tuple[Callable[..., Any], tuple[Any, ...]]

# Programs are kept for steps of at most this many rows; that of a prompt's chunk is made anew, for its buffers are large.
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
        found = ", ".join(sorted(f"{dtype} on {where}" for dtype, where in dtypes))
        return f"the weights are {found}; it serves one of float32, bfloat16 and float16 on a CPU"
    if module.config.backend not in ("auto", "native"):
        return f"the model was made with backend={module.config.backend!r}"
    if module.config.wave_kernel > NATIVE.wave_conv_max_taps:
        return f"wave_kernel is {module.config.wave_kernel}; the native convolution has at most {NATIVE.wave_conv_max_taps} taps"
    if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
        return "a module has a forward hook, which would not be called"
    return None


class Matrix:
    """The weights of one linear layer, or of several that read the same input, rounded if asked for, and their biases."""

    def __init__(self, weights: str, *layers: nn.Linear) -> None:
        weight = torch.cat([layer.weight.detach() for layer in layers]) if len(layers) > 1 else layers[0].weight.detach()
        self.scale: Tensor | None = None
        if weights == "bf16":
            weight = weight.to(torch.bfloat16)
        elif weights == "int8":
            weight, self.scale = quantize(weight)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        assert len(biases) in (0, len(layers)), "some of the layers have a bias and some have none"
        self._bias = torch.cat(biases).float() if biases else None
        self.outputs, self.inputs = weight.shape
        self._packed = pack(weight)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that a product reads."""
        return self.outputs * self.inputs * self._packed.element_size()

    def call(self, x: Tensor, y: Tensor) -> Call:
        """Write x (rows, inputs) times the weight, plus bias, into y (rows, outputs); both contiguous, of one dtype."""
        return NATIVE.packed_linear, (
            x.data_ptr(), self._packed.data_ptr(), address(self.scale), address(self._bias), y.data_ptr(), x.shape[0], self.inputs,
            self.outputs, self.inputs, TYPES[x.dtype], WEIGHT_TYPES[self._packed.dtype], torch.get_num_threads(),
        )  # fmt: skip


class Norm:
    def __init__(self, norm: RMSNorm) -> None:
        self.scale, self.eps = norm.scale.detach().contiguous(), norm.eps

    def call(self, x: Tensor, residual: Tensor | None, y: Tensor) -> Call:
        """y = norm of x + residual, which x becomes too."""
        rows, features = x.shape
        return NATIVE.rms_norm_forward, (
            x.data_ptr(), address(residual), self.scale.data_ptr(), y.data_ptr(), 0 if residual is None else x.data_ptr(), rows,
            features, features, features, self.eps, TYPES[x.dtype], TYPES[self.scale.dtype], TYPES[x.dtype], TYPES[y.dtype],
            torch.get_num_threads(),
        )  # fmt: skip


class Sine:
    """The positive parameters, computed once."""

    def __init__(self, sine: nn.Module) -> None:
        self._kept = [t.detach().contiguous() for t in sine.parameters_of_sine()]
        self.pointers = [t.data_ptr() for t in self._kept]
        self.mode = MODES.index(sine.mode)

    def call(self, z: Tensor) -> Call:
        """In place."""
        rows, features = z.shape
        return NATIVE.damped_sine_forward, (
            z.data_ptr(), *self.pointers, z.data_ptr(), rows, features, features, TYPES[z.dtype], self.mode, torch.get_num_threads()
        )  # fmt: skip


class Wave:
    def __init__(self, wave: WaveBranch, weights: str) -> None:
        self.norm, self.sine, self.out = Norm(wave.norm), Sine(wave.act), Matrix(weights, wave.out_proj)
        self._taps, self._bias = wave.weight.detach().float().contiguous(), wave.bias.detach().float().contiguous()
        self._kernel, self._dilation, self._length = wave.kernel_size, wave.dilation, wave.state_length

    def convolve(self, n: Tensor, view: CacheView, layer: int, y: Tensor) -> None:
        """Convolve the normed inputs n with their past, which lies in the cache; write the sine of that into y."""
        state = None
        if self._length:
            pool = view.wave_cache[layer].view(-1, n.shape[1])
            state = pool.index_select(0, view.wave_slots[layer].view(-1))
            pool.index_copy_(0, view.slot_mapping, n)
        rows, features = n.shape
        numbers = (rows, features, self._kernel, self._dilation, len(view.seq_lens), 0, features, TYPES[n.dtype], self.sine.mode)
        pointers = (
            n.data_ptr(),
            address(state),
            self._taps.data_ptr(),
            self._bias.data_ptr(),
            *self.sine.pointers,
            view.cu_seqlens.data_ptr(),
        )
        NATIVE.wave_conv_forward((*pointers, *numbers), y.data_ptr(), torch.get_num_threads())


class Layer:
    """The parts of one block."""

    def __init__(self, block: ResPSANNBlock, weights: str) -> None:
        attn, mlp = block.attn, block.mlp
        self.wave = Wave(block.wave, weights) if hasattr(block, "wave") else None
        self.norm1, self.norm2 = Norm(block.norm1), Norm(block.norm2)
        # One product where the modules have three: threads meet less often, and each weight's run is longer.
        self.qkv, self.o = Matrix(weights, attn.q_proj, attn.k_proj, attn.v_proj), Matrix(weights, attn.o_proj)
        self.fc1, self.sine, self.fc2 = Matrix(weights, mlp.fc1), Sine(mlp.act), Matrix(weights, mlp.fc2)
        self.alpha = block.alpha.item()
        self.slopes = None if attn.slopes is None else attn.slopes.beside(attn.q_proj.weight).contiguous()

    @property
    def matrices(self) -> list[Matrix]:
        return [self.qkv, self.o, self.fc1, self.fc2] + ([] if self.wave is None else [self.wave.out])


class Weights:
    """A model's weights as they are now, in the form that this decoder reads; several engines may share them."""

    def __init__(self, module: LanguageModel, weights: str) -> None:
        # Not the module itself: _PREPARED would then keep it alive.
        self.config, self.embedding = module.config, module.embed.weight.detach()
        self.layers = [Layer(block, weights) for block in module.blocks]
        self.last, self.head = Norm(module.ln_f), Matrix(weights, module.lm_head)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that a step of one token reads."""
        matrices = [m for layer in self.layers for m in layer.matrices] + [self.head]
        return sum(m.bytes_read for m in matrices)


class Program:
    """The calls of a step of `rows` tokens, in order, with the buffers that they work on; what depends on the step comes at run."""

    def __init__(self, weights: Weights, rows: int) -> None:
        config, dtype = weights.config, weights.embedding.dtype
        kv_width = config.n_kv_heads * config.head_dim
        # Calls hold addresses, not tensors, so all buffers are kept.
        widths = [config.d_model] * 4 + [config.d_model + 2 * kv_width, config.d_mlp]
        self.x, self.n, self._added, self._o, self._qkv, self._z = (torch.empty(rows, width, dtype=dtype) for width in widths)
        self._num_heads, self._layers = config.n_heads, weights.layers
        # For each layer: calls up to its convolution, if it has one, those up to attention, and those after it.
        self._parts: list[tuple[list[Call], list[Call], list[Call]]] = []
        added = None  # what is to be added to x, and rides on the next norm
        for layer in weights.layers:
            before: list[Call] = []
            if layer.wave is not None:
                before = [layer.wave.norm.call(self.x, added, self.n)]
                added = self._added
            middle = [] if layer.wave is None else [layer.wave.out.call(self._o, self._added)]
            middle.append(layer.norm1.call(self.x, added, self.n))
            middle.append(layer.qkv.call(self.n, self._qkv))
            added = self._added
            after = [layer.o.call(self._o, self._added), layer.norm2.call(self.x, added, self.n)]
            after += [layer.fc1.call(self.n, self._z), layer.sine.call(self._z), layer.fc2.call(self._z, self._added)]
            if layer.alpha != 1.0:
                after.append((added.mul_, (layer.alpha,)))
            self._parts.append((before, middle, after))
        self._parts.append(([weights.last.call(self.x, added, self.n)], [], []))

    def run(self, view: CacheView) -> Tensor:
        """What the output projection takes, of the embeddings in x."""
        attend = self._attention_of(view)
        for index, (layer, (before, middle, after)) in enumerate(zip(self._layers, self._parts)):
            for function, arguments in before:
                function(*arguments)
            if layer.wave is not None:
                layer.wave.convolve(self.n, view, index, self._o)
            for function, arguments in middle:
                function(*arguments)
            attend(index, layer)
            for function, arguments in after:
                function(*arguments)
        (function, arguments), *_ = self._parts[-1][0]
        function(*arguments)
        return self.n

    def _attention_of(self, view: CacheView) -> Callable[[int, Layer], None]:
        """Appends one layer's keys and values, and attends; what all layers share is looked up once."""
        num_blocks, block_size, kv_heads, head_dim = view.k_cache[0].shape
        strides = view.k_cache[0].stride()[:3]
        rows, width = self._qkv.shape
        kind, threads = TYPES[self._qkv.dtype], torch.get_num_threads()
        rotary = address(view.cos), address(view.sin), True
        max_position = 0 if view.cos is None else len(view.cos)
        sequences, max_blocks = view.block_table.shape
        q_width, kv_width = self._num_heads * head_dim, kv_heads * head_dim
        q, k, v = (part.data_ptr() for part in self._qkv.split((q_width, kv_width, kv_width), dim=1))
        append = (
            view.slot_mapping.data_ptr(), view.positions.data_ptr(), *rotary, rows, kv_heads, head_dim, block_size, num_blocks,
            max_position, width, head_dim, width, head_dim, kind, threads,
        )  # fmt: skip
        tables = view.block_table.data_ptr(), view.seq_lens.data_ptr(), view.cu_seqlens.data_ptr()
        sizes = (
            self._o.data_ptr(), *rotary, rows, sequences, self._num_heads, kv_heads, head_dim, block_size, num_blocks, max_blocks,
            max_position, max_blocks, width, head_dim, 0, head_dim**-0.5, kind, threads,
        )  # fmt: skip

        def attend(index: int, layer: Layer) -> None:
            k_cache, v_cache = view.k_cache[index].data_ptr(), view.v_cache[index].data_ptr()
            NATIVE.paged_append(k, v, k_cache, strides, v_cache, strides, *append)
            NATIVE.paged_attention(q, k_cache, strides, v_cache, strides, *tables, address(layer.slopes), *sizes)

        return attend


class NativeDecoder:
    """See Decoder. Its buffers serve one engine."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._programs: dict[tuple[int, int], Program] = {}

    def hidden(self, ids: Tensor, view: CacheView) -> Tensor:
        program = self._program(len(ids))
        torch.index_select(self.weights.embedding, 0, ids, out=program.x)
        config = self.weights.config
        if config.positional_encoding == "sinusoidal":
            program.x.add_(sinusoidal(view.positions, config.d_model).to(program.x.dtype))
        return program.run(view)

    def logits(self, hidden: Tensor) -> Tensor:
        x = hidden.contiguous()  # held, since the call knows only its address
        y = x.new_empty(len(x), self.weights.head.outputs)
        function, arguments = self.weights.head.call(x, y)
        function(*arguments)
        return y

    def _program(self, rows: int) -> Program:
        key = rows, torch.get_num_threads()
        held = self._programs.get(key)
        if held is None:
            held = Program(self.weights, rows)
            if rows <= KEPT_ROWS:
                self._programs[key] = held
        return held


_PREPARED: WeakKeyDictionary[nn.Module, dict[str, tuple[tuple[tuple[int, int], ...], Weights]]] = WeakKeyDictionary()


def prepared(module: LanguageModel, weights: str) -> Weights:
    """The weights of a model that `refuses` has nothing against; kept until one of them changes."""
    state = tuple(_versions(module))
    held = _PREPARED.setdefault(module, {})
    if weights not in held or held[weights][0] != state:
        held[weights] = state, Weights(module, weights)
    return held[weights][1]


def _versions(module: nn.Module) -> Iterator[tuple[int, int]]:
    for parameter in module.parameters():
        yield parameter.data_ptr(), parameter._version
