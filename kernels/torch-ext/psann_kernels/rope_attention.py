"""Causal attention with rotary positions, grouped heads, packed documents, sliding window and ALiBi.

    o_i = sum_j softmax_j(softmax_scale * <R_i q_i, R_j k_j> + slope * (j - i)) v_j      over the keys j that i sees

R_p turns pair m of a head's features by the angle p * theta^(-2m / D), so a score depends on i - j alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import rope_attention_dense as dense
from .documents import are_values_known, check_cu_seqlens, document_bounds
from .library import without_autocast
from .registry import Op

OP = Op("rope_attention")

# Keys up to which torch's attention of a CPU is as fast in float32 as in half precision, forward and backward, or faster (torch
# 2.13, Zen 4; 64 keys: 2.7 times, 128: 1.5 times, 256: alike): it multiplies small blocks, and in half precision each product
# begins by widening them.
CPU_WIDE_KEYS = 256


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of each token to itself and to earlier tokens of its document.

    q              (B, Tq, H, D)          float16, bfloat16, float32 or float64; any strides; or packed, (total, H, D)
    k, v           (B, Tk, Hkv, D)        dtype of q; H is a multiple of Hkv; or packed, (total, Hkv, D)
    cos, sin       (max_position, D / 2)  float32 (float64 beside a float64 q); both or neither. Given: q and k arrive
                                          unrotated and are rotated here. No gradient flows to them.
    cu_seqlens     (documents + 1,)       int32; offsets of documents in the B * T (or total) tokens, see documents.py. A row of
                                          a (B, T) batch starts a document in any case; Tq must be Tk. Packed tensors need it.
    interleaved                           True turns pairs (2m, 2m + 1), False turns (m, m + D / 2)
    softmax_scale                         default D ** -0.5
    window                                tokens seen, the query's own included; None: all
    alibi_slopes   (H,)                   float32 (float64 beside a float64 q): adds slope * (key position - query position)
                                          to the scaled scores. No gradient flows to them.
    backend                               "auto", "triton", "native" or "torch"; "gluon" for Hopper kernels that no GPU has run
                                          yet, which serve once self_test(gluon=True) has compared them there with "triton"

    Positions count from 0 in each document. Without cu_seqlens key j sits at position j and query i at Tk - Tq + i, so that
    fewer queries than keys are the newest tokens; queries beyond the keys (Tq > Tk) see nothing, give 0 and have no gradient.
    max_position must exceed every position; where that cannot be known without waiting for a GPU, it is the caller's promise.

    Returns o in the shape and dtype of q. Differentiable in q, k and v; gradients have the same bits in every run.
    Raises ValueError for other shapes or dtypes; BackendError if `backend` was named and cannot serve.
    Source: attention, Vaswani et al. 2017, arXiv:1706.03762; rotary positions, Su et al. 2021, arXiv:2104.09864; ALiBi, Press
    et al. 2021, arXiv:2108.12409.
    """
    check_attention("rope_attention", q, k, v, cos, sin, cu_seqlens, softmax_scale, window, alibi_slopes)
    options = dict(
        cu_seqlens=cu_seqlens,
        interleaved=interleaved,
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        window=window,
        alibi_slopes=alibi_slopes,
    )
    if q.dim() == 4:
        return OP.select(backend, q, k, v, cos, sin, **options)(q, k, v, cos, sin, **options)
    q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    return OP.select(backend, q, k, v, cos, sin, **options)(q, k, v, cos, sin, **options).squeeze(0)


@OP.specify
def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = True,
    softmax_scale: float,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    if queries > keys:
        # The first queries have no key. They leave before softmax would have to divide 0 by 0.
        seeing = reference(
            q[:, queries - keys :], k, v, cos, sin, interleaved=interleaved, softmax_scale=softmax_scale, window=window,
            alibi_slopes=alibi_slopes,
        )  # fmt: skip
        return F.pad(seeing, (0, 0, 0, 0, queries - keys, 0))

    dtype, is_dense = q.dtype, dense.serves(q, k)
    if q.device.type == "cpu" and keys <= CPU_WIDE_KEYS and not is_dense:
        q, k, v = (t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v))
    key = torch.arange(keys, device=q.device)
    query = key[keys - queries :]
    first = torch.zeros_like(query).unsqueeze(0)  # of the query's document; (1 or B, Tq)
    if cu_seqlens is not None:
        first = document_first(cu_seqlens, batch, keys)
    turns = None
    if cos is not None:
        is_packed = cu_seqlens is not None
        of_q, of_k = query - first if is_packed or queries < keys else None, key - first if is_packed else None
        if is_dense and interleaved:
            turns = tuple(_turns(cos, sin, p, n) for p, n in ((of_q, queries), (of_k, keys)))
        else:
            q = rotate(q, cos, sin, positions=of_q, interleaved=interleaved)
            k = rotate(k, cos, sin, positions=of_k, interleaved=interleaved)

    if not is_dense and queries == keys and cu_seqlens is None and window is None and alibi_slopes is None:
        return _attend(q, k, v, is_causal=True, scale=softmax_scale).to(dtype)

    if window is not None:
        first = torch.maximum(first, query - window + 1)
    seen = ((key <= query.unsqueeze(1)) & (key >= first.unsqueeze(-1))).unsqueeze(1)  # (1 or B, 1, Tq, Tk)
    if alibi_slopes is None and not is_dense:
        return _attend(q, k, v, attn_mask=seen, scale=softmax_scale).to(dtype)

    # A bias of some hundreds has no room for fractions in bfloat16, so scores with one are computed wide.
    is_level = alibi_slopes is None
    bias = key.new_zeros((), dtype=torch.float32) if is_level else alibi_slopes.view(heads, 1, 1) * (key - query.unsqueeze(1))
    bias = bias.masked_fill(~seen, float("-inf"))
    if is_dense:
        return dense.attend(q, k, v, turns, bias, softmax_scale)
    wide = (t.to(bias.dtype) for t in (q, k, v))
    return _attend(*wide, attn_mask=bias, scale=softmax_scale).to(dtype)


def document_first(cu_seqlens: Tensor, batch: int, keys: int) -> Tensor:
    """(batch, keys) int64: for each place of a row, the place in it where its document begins."""
    start, _ = document_bounds(cu_seqlens, batch * keys, row_length=keys)
    return start.view(batch, keys).long() - keys * torch.arange(batch, device=cu_seqlens.device).unsqueeze(1)


def _attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """torch's attention of (B, T, heads, D), in the dtype that is given whatever autocast would make of it."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with without_autocast(q.device):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, interleaved: bool = True) -> Tensor:
    """Turn each pair of a head's features by its position's angle.

    x            (..., T, H, D)         floating point
    cos, sin     (max_position, D / 2)  float32 (float64 beside a float64 x), from rotary_tables
    positions    (..., T)               integers below max_position; any shape that broadcasts; None: 0 to T - 1
    interleaved                         True: pairs (2m, 2m + 1), psann's convention; False: (m, m + D / 2), Llama's

    Returns the shape and dtype of x; the arithmetic is float32 at least.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    if positions is None:
        cos, sin = cos[: x.shape[-3]], sin[: x.shape[-3]]
    else:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # one angle for all heads
    wide = x.to(cos.dtype)
    if interleaved and _is_complex_cheaper(wide):
        if not _has_whole_pairs(wide):
            wide = wide.clone(memory_format=torch.contiguous_format)
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)
    return turned.to(x.dtype)


def _turns(cos: Tensor, sin: Tensor, positions: Tensor | None, length: int) -> Tensor:
    """(1 or B, length, D / 2) complex: what turns pairs of neighbours; of the first positions if none are given."""
    if positions is None:
        return torch.complex(cos[:length], sin[:length]).unsqueeze(0)
    return torch.complex(cos[positions], sin[positions])


def _is_complex_cheaper(x: Tensor) -> bool:
    """Whether x's pairs are turned as complex numbers: one product in place of eleven ops over every second feature, with the same
    two products and one sum a number.

    On a CPU, where each op is a pass over memory; compilers fuse the eleven, and not the one.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _has_whole_pairs(x: Tensor) -> bool:
    """Whether x's pairs of neighbours can be read as complex numbers where they lie."""
    return x.stride(-1) == 1 and not any(step % 2 for step in (*x.stride()[:-1], x.storage_offset()))


def rotary_tables(
    max_position: int,
    head_dim: int,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2m / head_dim), each (max_position, head_dim / 2) in `dtype` (float64 beside float64).

    The angles are computed in float64: at position 1e5 a float32 product is wrong in the third digit of its sine.
    Raises ValueError if head_dim is odd.
    """
    if head_dim % 2:
        raise ValueError(f"rotary_tables: head_dim is {head_dim}; rotary positions turn pairs of features, so it must be even")
    # On the CPU, because some devices have no float64.
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(max_position, dtype=torch.float64).unsqueeze(1) * frequency
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def check_attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor | None,
    softmax_scale: float | None,
    window: int | None,
    alibi_slopes: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments of rope_attention fit together; `op` opens the message."""
    if q.dim() not in (3, 4) or not q.is_floating_point():
        raise ValueError(
            f"{op}: q has shape {tuple(q.shape)} and dtype {q.dtype}; it must be floating point, (B, T, H, D) or packed "
            f"(total, H, D)"
        )
    if q.dim() == 3 and cu_seqlens is None:
        raise ValueError(
            f"{op}: q is packed, shape {tuple(q.shape)}, but cu_seqlens is None; pass the documents' offsets, or a (B, T, H, D) "
            f"batch"
        )
    *rows, tokens, heads, head_dim = q.shape
    for name, t in (("k", k), ("v", v)):
        if t.dim() != q.dim() or [*t.shape[:-3]] != rows or t.shape[-1] != head_dim or t.shape != k.shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(t.shape)} beside q {tuple(q.shape)} and k {tuple(k.shape)}; k and v must have one "
                f"shape, and differ from q in tokens and heads only"
            )
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(f"{op}: {name} is {t.dtype} on {t.device} and q {q.dtype} on {q.device}; make them alike")
    if head_dim == 0 or k.shape[-2] == 0 or heads % k.shape[-2]:
        raise ValueError(
            f"{op}: q has {heads} heads of {head_dim} features and k {k.shape[-2]} heads; head_dim must be at least 1 and the "
            f"heads of q a multiple of those of k"
        )
    if softmax_scale is not None and not 0 < softmax_scale < float("inf"):
        raise ValueError(f"{op}: softmax_scale is {softmax_scale}; it must be positive and finite, or None for {head_dim} ** -0.5")
    if window is not None and (isinstance(window, bool) or window < 1):
        raise ValueError(f"{op}: window is {window!r}; it counts the query's own token, so pass at least 1, or None for no window")

    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if alibi_slopes is not None:
        _check_constant(op, "alibi_slopes", alibi_slopes, (heads,), wide, q)
    if cu_seqlens is not None:
        if k.shape[-3] != tokens:
            raise ValueError(
                f"{op}: q has {tokens} tokens and k {k.shape[-3]}; with cu_seqlens both must hold the same tokens (without it, "
                f"fewer queries are the newest tokens)"
            )
        check_cu_seqlens(op, cu_seqlens, q.shape[:-2].numel(), q.device)
    if cos is not None or sin is not None:
        _check_tables(op, q, k, cos, sin, cu_seqlens, wide)


def _check_tables(
    op: str, q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, cu_seqlens: Tensor | None, wide: torch.dtype
) -> None:
    if cos is None or sin is None:
        missing = "cos" if cos is None else "sin"
        raise ValueError(f"{op}: {missing} is None but the other table is given; pass cos and sin, or neither")
    head_dim, longest = q.shape[-1], k.shape[-3]
    if head_dim % 2:
        raise ValueError(
            f"{op}: head_dim is {head_dim}; rotary positions turn pairs of features, so it must be even (or leave out cos and sin)"
        )
    _check_constant(op, "cos", cos, (cos.shape[0] if cos.dim() else 0, head_dim // 2), wide, q)
    _check_constant(op, "sin", sin, tuple(cos.shape), wide, q)
    if cos.shape[0] >= longest:
        return
    if cu_seqlens is not None:
        if not are_values_known(cu_seqlens):
            return
        start, end = document_bounds(cu_seqlens, q.shape[:-2].numel(), row_length=longest)
        longest = max((end - start).tolist(), default=0)
    if cos.shape[0] < longest:
        raise ValueError(
            f"{op}: cos and sin have {cos.shape[0]} positions, but {longest} tokens follow one another; pass tables of at least "
            f"{longest} rows (rotary_tables makes them)"
        )


def _check_constant(op: str, name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, q: Tensor) -> None:
    if t.shape != shape or t.dtype != dtype or t.device != q.device:
        raise ValueError(
            f"{op}: {name} has shape {tuple(t.shape)}, {t.dtype}, on {t.device}; beside q {tuple(q.shape)}, {q.dtype}, on "
            f"{q.device} it must be {shape}, {dtype}, on the same device"
        )
    if t.requires_grad:
        raise ValueError(f"{op}: {name} requires a gradient, but it is a constant here; pass {name}.detach()")
