"""Triton twin of wave_conv. Read wave_conv.py first.

Forward reads x and writes y: 2 * x.numel() * itemsize bytes; the other taps are a few tokens back and come from the cache.
Backward reads x and dy and writes dx. It keeps only x and recomputes the convolution, exp, sin and cos.

Backward walks: dx at one token needs dc, the gradient at the convolution's output, of the K - 1 later tokens at distances of
`dilation`. So a lane steps through its tokens `dilation` at a time, computes dc once and adds weight * dc to the K unfinished
dx that it carries in registers; the oldest is then complete and written. The tokens of a row are cut into walks of `steps`
tokens, independent of each other: each repeats the K - 1 steps after its end, without which every element would be read once.
Offsets are searched in the kernel, so that packing costs no launch and no array of its own. Parameter gradients reduce in
two passes, a row of partial sums per program and one small sum, because atomics would let scheduling change the result.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .damped_sine_triton import gradients_of_sine, sine_of
from .library import define
from .triton_support import (
    Configuration,
    narrow,
    refuses_device,
    refuses_dtype,
    split_turns,
    widen,
)
from .wave_conv import OP

# Taps are unrolled and, in backward, carried in registers, which 16 taps overflow.
MAX_KERNEL_SIZE = 8
# Programs of a forward that fill any GPU: a larger call makes them longer, so that they read their parameters less often.
FORWARD_PROGRAMS = 1024
# Programs along the tokens whose partial sums the backward keeps: enough for any GPU, few enough that the second sum is small.
MAX_TOKEN_PROGRAMS = 512
# Tokens, a little beyond the last, and walks are divided in int32, at a third of int64's cost.
MAX_TOKENS = 2**31 - 2**20
# Tokens of one walk: with 4 taps backward computes 3 in 64 twice.
STEPS = 64


@triton.jit
def _document_of(t, row, tokens, cu_seqlens_ptr, documents, halvings):
    """(first token, number) of t's document in a packed call. Tokens are counted over all rows; each row begins a document."""
    # The last document that starts at or before t; more halvings than needed change nothing.
    low = tl.zeros(t.shape, tl.int32)
    high = low + documents
    for _ in range(0, halvings):
        middle = (low + high) // 2
        is_later = tl.load(cu_seqlens_ptr + middle) > t
        high = tl.where(is_later, middle, high)
        low = tl.where(is_later, low, middle)
    return tl.maximum(row * tokens, tl.load(cu_seqlens_ptr + low).to(tl.int64)), low.to(tl.int64)


@triton.jit
def _before(state_ptr, document, slot, length, c, features, here):
    """Input `slot` of the `length` that precede a document, oldest first; 0 where not `here` and where the slot is none of them:
    from `length` on it lies in the document itself."""
    mask = here & (slot >= 0) & (slot < length)
    return widen(tl.load(state_ptr + (document * length + slot) * features + c, mask=mask, other=0.0))


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, amplitude_ptr, frequency_ptr, damping_ptr, cu_seqlens_ptr, state_ptr, y_ptr,
    total, tokens, features, row_stride, token_stride, dilation, documents, halvings, tiles,
    MODE: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # Columns and their parameters stay while `tiles` tiles of tokens pass.
    c = (tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    inside = c < features
    hop = tl.cast(dilation, tl.int64)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    amplitude = tl.load(amplitude_ptr + c, mask=inside, other=0.0)
    damping = tl.load(damping_ptr + c, mask=inside, other=0.0)
    high, low = split_turns(tl.load(frequency_ptr + c, mask=inside, other=0.0))
    bias = tl.zeros((1, BLOCK_F), tl.float32)
    if bias_ptr is not None:
        bias += widen(tl.load(bias_ptr + c, mask=inside, other=0.0))
    weights = ()
    for j in tl.static_range(K):
        weights = weights + (widen(tl.load(weight_ptr + c * K + j, mask=inside, other=0.0)),)

    t = (tl.program_id(0).to(tl.int64) * tiles * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    for _ in range(0, tiles):
        here = (t < total) & inside
        row = (t.to(tl.int32) // tokens).to(tl.int64)
        start = row * tokens
        document = row
        if cu_seqlens_ptr is not None:
            start, document = _document_of(t, row, tokens, cu_seqlens_ptr, documents, halvings)
        row_ptr = x_ptr + row * row_stride + c

        convolved = bias + tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
        for j in tl.static_range(K):
            back = t - (K - 1 - j) * hop
            tap = widen(tl.load(row_ptr + (back - row * tokens) * token_stride, mask=here & (back >= start), other=0.0))
            if state_ptr is not None:
                length = (K - 1) * hop
                tap += _before(state_ptr, document, length + back - start, length, c, features, here)
            convolved = tl.fma(weights[j], tap, convolved)

        y = sine_of(convolved, amplitude, high, low, damping, MODE, dtype)

        tl.store(y_ptr + t * features + c, narrow(y, dtype), mask=here)
        t += BLOCK_T


@triton.jit
def _backward_kernel(
    x_ptr, dy_ptr, weight_ptr, bias_ptr, amplitude_ptr, frequency_ptr, damping_ptr, cu_seqlens_ptr, state_ptr, dx_ptr, partial_ptr,
    walks, tokens, features, x_row_stride, x_token_stride, dy_row_stride, dy_token_stride, dilation, documents, halvings,
    steps, chunks, residues,
    MODE: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # Columns stay while groups of LANES walks pass; partial_ptr is (programs, 4 + K, features).
    program = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    inside = c < features
    hop = tl.cast(dilation, tl.int64)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    amplitude = tl.load(amplitude_ptr + c, mask=inside, other=0.0)
    frequency = tl.load(frequency_ptr + c, mask=inside, other=0.0)
    damping = tl.load(damping_ptr + c, mask=inside, other=0.0)
    high, low = split_turns(frequency)
    nothing = tl.zeros((LANES, BLOCK_F), tl.float32)
    bias = nothing
    if bias_ptr is not None:
        bias += widen(tl.load(bias_ptr + c, mask=inside, other=0.0))
    weights = ()
    sum_weights = ()
    for j in tl.static_range(K):
        weights = weights + (widen(tl.load(weight_ptr + c * K + j, mask=inside, other=0.0)),)
        sum_weights = sum_weights + (nothing,)
    sum_amplitude = nothing
    sum_frequency = nothing
    sum_damping = nothing
    sum_bias = nothing

    walk = (program * LANES + tl.arange(0, LANES)).to(tl.int32)[:, None]
    for _ in range(program, tl.cdiv(walks, LANES), tl.num_programs(0)):
        row = (walk // residues // chunks).to(tl.int64)
        first = (walk // residues % chunks).to(tl.int64) * steps * dilation + walk % residues
        # This walk answers for the tokens of its row from `first` up to `last`, every `dilation`-th.
        last = tl.where(walk < walks, tl.minimum(first + steps * hop, tokens), first)
        end = tl.where(walk < walks, tokens, 0)
        x_row_ptr = x_ptr + row * x_row_stride + c
        dy_row_ptr = dy_ptr + row * dy_row_stride + c
        dx_row_ptr = dx_ptr + row * tokens * features + c

        # Oldest first: the inputs, and the unfinished dx, of the K - 1 tokens before the present one.
        inputs = ()
        gradients = ()
        for j in tl.static_range(K - 1):
            token = first - (K - 1 - j) * hop
            here = (token >= 0) & (token < end) & inside
            x = widen(tl.load(x_row_ptr + token * x_token_stride, mask=here, other=0.0))
            if state_ptr is not None and cu_seqlens_ptr is None:
                length = (K - 1) * hop
                x += _before(state_ptr, row, length + token, length, c, features, (walk < walks) & inside)
            inputs = inputs + (x,)
            gradients = gradients + (nothing,)

        token = first
        here = (token < end) & inside
        next_x = tl.load(x_row_ptr + token * x_token_stride, mask=here, other=0.0)
        next_dy = tl.load(dy_row_ptr + token * dy_token_stride, mask=here, other=0.0)
        for _ in range(0, steps + K - 1):
            # The next step's loads are under way while this one computes.
            x = widen(next_x)
            dy = widen(next_dy)
            coming = token + hop
            here = (coming < end) & inside
            next_x = tl.load(x_row_ptr + coming * x_token_stride, mask=here, other=0.0)
            next_dy = tl.load(dy_row_ptr + coming * dy_token_stride, mask=here, other=0.0)

            taps = inputs + (x,)
            inputs = taps[1:]
            if cu_seqlens_ptr is not None:
                t = row * tokens + token
                start, document = _document_of(t, row, tokens, cu_seqlens_ptr, documents, halvings)
                own = ()
                for j in tl.static_range(K):
                    back = t - (K - 1 - j) * hop
                    tap = tl.where(back >= start, taps[j], 0.0)
                    if state_ptr is not None:
                        length = (K - 1) * hop
                        here = (token < end) & inside
                        tap += _before(state_ptr, document, length + back - start, length, c, features, here)
                    own = own + (tap,)
                taps = own
            convolved = bias
            for j in tl.static_range(K):
                convolved = tl.fma(weights[j], taps[j], convolved)

            dc, ps, pc, g = gradients_of_sine(
                dy, convolved, high, low, damping, amplitude * frequency, amplitude * damping, MODE, dtype
            )
            dc = tl.where(token < end, dc, 0.0)

            # The tokens after the last are another walk's to count.
            sum_amplitude += tl.where(token < last, ps, 0.0)
            sum_frequency += tl.where(token < last, convolved * pc, 0.0)
            sum_damping += tl.where(token < last, g * ps, 0.0)
            counted = tl.where(token < last, dc, 0.0)
            sum_bias += counted
            grown = ()
            for j in tl.static_range(K):
                grown = grown + (tl.fma(counted, taps[j], sum_weights[j]),)
            sum_weights = grown

            gradients = gradients + (nothing,)
            added = ()
            for j in tl.static_range(K):
                share = weights[j] * dc
                if cu_seqlens_ptr is not None:
                    share = tl.where(row * tokens + token - (K - 1 - j) * hop >= start, share, 0.0)
                added = added + (gradients[j] + share,)
            gradients = added[1:]
            finished = token - (K - 1) * hop
            dx_here = (finished >= first) & (finished < last) & inside
            tl.store(dx_row_ptr + finished * features, narrow(added[0], dtype), mask=dx_here)
            token = coming

        walk += (tl.num_programs(0).to(tl.int64) * LANES).to(tl.int32)

    c = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    partial = partial_ptr + program * (4 + K) * features + c
    sums = (sum_amplitude, sum_frequency, sum_damping, sum_bias) + sum_weights
    for j in tl.static_range(4 + K):
        tl.store(partial, tl.sum(sums[j], 0), mask=c < features)
        partial += features


def forward_tile(features: int) -> tuple[int, int]:
    """(BLOCK_T, BLOCK_F): 1024 elements a program; 64 half features are a cache line, and 16 tokens share most of their taps."""
    block_f = min(triton.next_power_of_2(features), 64)
    return 1024 // block_f, block_f


def backward_tile(features: int) -> tuple[int, int]:
    """(LANES, BLOCK_F): 256 elements a program, 2 a thread, because backward keeps 5 * K + 20 numbers for each."""
    block_f = min(triton.next_power_of_2(features), 64)
    return 256 // block_f, block_f


def _sequences(t: Tensor) -> Tensor:
    """t as (rows, tokens, F) with unit stride along F; copied only where its features are not adjacent."""
    t = t if t.dim() == 3 else t[None]
    return t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()


def _documents(cu_seqlens: Tensor | None) -> tuple[int, int]:
    """(documents, halvings of their number until one is left)"""
    documents = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return documents, max(documents - 1, 0).bit_length()


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, amplitude: Tensor, frequency: Tensor, damping: Tensor,
    cu_seqlens: Tensor | None, state: Tensor | None, dilation: int, mode: str,
) -> Tensor:  # fmt: skip
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    x = _sequences(x)
    rows, tokens, features = x.shape
    block_t, block_f = forward_tile(features)
    columns = triton.cdiv(features, block_f)
    tiles = min(max(triton.cdiv(rows * tokens, block_t) * columns // FORWARD_PROGRAMS, 1), 8)
    _forward_kernel[(triton.cdiv(rows * tokens, block_t * tiles), columns)](
        x, weight.contiguous(), None if bias is None else bias.contiguous(),
        amplitude.contiguous(), frequency.contiguous(), damping.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(), None if state is None else state.contiguous(), y,
        rows * tokens, tokens, features, x.stride(0), x.stride(1), dilation, *_documents(cu_seqlens), tiles,
        MODE=mode, K=weight.shape[1], BLOCK_T=block_t, BLOCK_F=block_f, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, amplitude: Tensor, frequency: Tensor, damping: Tensor,
    cu_seqlens: Tensor | None, state: Tensor | None, dilation: int, mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernel_size = weight.shape[1]
    sums = torch.zeros((4 + kernel_size, x.shape[-1]), dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        x, dy = _sequences(x), _sequences(dy)
        rows, tokens, features = x.shape
        lanes, block_f = backward_tile(features)
        residues = min(dilation, tokens)
        strides = triton.cdiv(tokens, dilation)
        steps = min(strides, STEPS)
        chunks = triton.cdiv(strides, steps)
        walks = rows * chunks * residues
        programs = min(triton.cdiv(walks, lanes), MAX_TOKEN_PROGRAMS)
        partial = torch.empty((programs, *sums.shape), dtype=torch.float32, device=x.device)
        _backward_kernel[(programs, triton.cdiv(features, block_f))](
            x, dy, weight.contiguous(), None if bias is None else bias.contiguous(),
            amplitude.contiguous(), frequency.contiguous(), damping.contiguous(),
            None if cu_seqlens is None else cu_seqlens.contiguous(), None if state is None else state.contiguous(), dx, partial,
            walks, tokens, features, x.stride(0), x.stride(1), dy.stride(0), dy.stride(1), dilation, *_documents(cu_seqlens),
            steps, chunks, residues,
            MODE=mode, K=kernel_size, LANES=lanes, BLOCK_F=block_f, enable_fp_fusion=True,
        )  # fmt: skip
        sums = partial.sum(0)
    # Copies, so that no output of the op shares memory with another.
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device).copy_(sums[4:].T)
    dbias = sums[3].to((weight if bias is None else bias).dtype, copy=True)
    return dx, dweight, dbias, sums[0].clone(), amplitude * sums[1], -amplitude * sums[2]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.dilation, ctx.mode = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias, damplitude, dfrequency, ddamping = wave_conv_triton_backward(dy, *ctx.saved_tensors, ctx.dilation, ctx.mode)
    has_bias = ctx.saved_tensors[2] is not None
    return dx, dweight, dbias if has_bias else None, damplitude, dfrequency, ddamping, None, None, None, None


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor amplitude, Tensor frequency, Tensor damping, "
    "Tensor? cu_seqlens, Tensor? state, int dilation, str mode"
)
wave_conv_triton_backward = define(
    f"wave_conv_triton_backward(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda dy, x, weight, bias, amplitude, frequency, damping, *rest: (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        (weight if bias is None else bias).new_empty(weight.shape[:1]),
        *(t.new_empty(t.shape) for t in (amplitude, frequency, damping)),
    ),
)
wave_conv_triton = define(
    f"wave_conv_triton({_ARGUMENTS}) -> Tensor", _forward, lambda x, *rest: x.new_empty(x.shape), _differentiate, _setup_context
)


def refuses(
    x: Tensor, weight: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, *, dilation: int = 1, **options: Any
) -> str | None:
    if weight.shape[1] > MAX_KERNEL_SIZE:
        return f"kernel_size is {weight.shape[1]}; the kernel serves at most {MAX_KERNEL_SIZE}"
    reach = weight.shape[1] * dilation
    if x.shape[:-1].numel() + reach > MAX_TOKENS:
        return f"x is {tuple(x.shape)} and the taps reach {reach} tokens back; the kernel counts {MAX_TOKENS} tokens at most"
    return refuses_device(x) or refuses_dtype("x", x)


@OP.offer("triton", refuses)
def _serve(
    x: Tensor,
    weight: Tensor,
    amplitude: Tensor,
    frequency: Tensor,
    damping: Tensor,
    *,
    bias: Tensor | None = None,
    dilation: int = 1,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    mode: str = "abs",
) -> Tensor:
    return wave_conv_triton(x, weight, bias, amplitude, frequency, damping, cu_seqlens, state, dilation, mode)


def configurations() -> list[Configuration]:
    """What dispatch can choose: K and the presence of bias, state and offsets are the caller's, so the usual ones stand for all."""
    absent = {"cu_seqlens_ptr": None, "state_ptr": None}
    calls = [
        ("bf16", 4, "abs", absent),
        ("fp32", 4, "abs", absent),
        ("bf16", 3, "relu", absent | {"bias_ptr": None}),
        ("bf16", MAX_KERNEL_SIZE, "abs", {}),
    ]
    found = []
    for dtype, kernel_size, mode, missing in calls:
        for kernel, sizes in (
            (_forward_kernel, dict(zip(("BLOCK_T", "BLOCK_F"), forward_tile(512)))),
            (_backward_kernel, dict(zip(("LANES", "BLOCK_F"), backward_tile(512)))),
        ):
            constants = dict(MODE=mode, K=kernel_size, **sizes) | missing
            found.append(_configuration(kernel, dtype, constants))
    return found


def _configuration(kernel: Any, dtype: str, constants: dict[str, Any]) -> Configuration:
    types = {f"{name}_ptr": f"*{dtype}:16" for name in ("x", "dy", "state", "y", "dx")} | {"cu_seqlens_ptr": "*i32:16"}
    types |= {name: "i32:16" for name in kernel.arg_names if name in ("features", "tokens") or name.endswith("stride")}
    signature = {
        name: types.get(name, "*fp32:16" if name.endswith("_ptr") else "i32") for name in kernel.arg_names if name not in constants
    }
    absent = "".join(f" without {name.removesuffix('_ptr')}" for name, value in constants.items() if value is None)
    name = f"wave_conv {kernel.__name__.strip('_').removesuffix('_kernel')} {dtype} K={constants['K']} {constants['MODE']}{absent}"
    return Configuration(kernel, signature, constants, name=name)
