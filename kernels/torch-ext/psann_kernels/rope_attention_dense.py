"""Attention of short windows on a CPU as matrix products of whole windows; part of rope_attention's reference, read that first.

torch's attention for CPUs multiplies small blocks in float32, one (sequence, head) after another. Where the scores of some rows
of a batch fit into the caches, batched products of all of them are faster, above all on CPUs that multiply bfloat16.

Scores, softmax and its sums are float32 as there; probabilities are rounded to the inputs' dtype before they meet the values, as in
attention kernels for GPUs. Kept for backward: those and the turned inputs, so memory grows with H * Tk * 2 bytes a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad

from .library import cpu_has_bf16, without_autocast

# Keys up to which this is faster, with products in float32 and in bfloat16 where the CPU multiplies that.
MOST_KEYS = {torch.float32: 128, torch.bfloat16: 512}
QUERIES = 128  # of a block: with 256 keys a quarter of the scores, which no query of the first block sees, is left out
SCORES_AT_ONCE = 1 << 20  # 4 MB of float32


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the products with probabilities for inputs of `dtype`: half precision is widened where the CPU has none."""
    return dtype if dtype == torch.bfloat16 and cpu_has_bf16() else torch.promote_types(dtype, torch.float32)


def serves(q: Tensor, k: Tensor) -> bool:
    """Whether attend is the way for q (B, Tq, H, D) and k (B, Tk, Hkv, D).

    Not under functorch or forward-mode differentiation, which this has no rules for.
    """
    if not torch.compiler.is_compiling() and (forward_ad._current_level >= 0 or _are_functorch_transforms_active()):
        return False
    return q.device.type == "cpu" and 0 < q.numel() and k.shape[1] <= MOST_KEYS.get(product_dtype(q.dtype), 0)


def attend(q: Tensor, k: Tensor, v: Tensor, turns: tuple[Tensor, Tensor] | None, bias: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T + bias) v of each row and head, q and k turned before.

    q, k   (B, Tq, H, D), (B, Tk, Hkv, D)   Tq <= Tk: queries are the newest tokens
    v      (B, Tk, Hkv, D)                  products with probabilities take place in product_dtype(v.dtype)
    turns                                   (1 or B, Tq, D / 2) for q and (1 or B, Tk, D / 2) for k, complex64: what to multiply
                                            pairs (2m, 2m + 1) of features by; None: nothing
    bias   (1 or B, 1 or H, Tq, Tk)         float32, -infinity where a query does not see a key, so at all later keys

    Returns (B, Tq, H, D) in v's dtype. Differentiable in q, k and v, once.
    """
    return _Attend.apply(q, k, v, *(turns or (None, None)), bias, scale)


class _Attend(torch.autograd.Function):
    # Inside, tensors are (B, Hkv, tokens, D), the queries' (B, Hkv, H / Hkv, Tq, D): the query heads of one key head are rows of
    # one product. What comes and goes, (B, T, H, D), is read and written through views of that form. q bears the scores' scale.

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, turn_q: Tensor | None, turn_k: Tensor | None, bias: Tensor, scale: float
    ) -> Tensor:  # fmt: skip
        narrow = product_dtype(v.dtype)
        kv_heads = k.shape[2]
        o = torch.empty(q.shape, dtype=v.dtype, device=q.device)
        with without_autocast(q.device):
            queries = _turn(_copy(by_key_head(q, kv_heads), torch.float32), turn_q, scale)
            keys = _turn(_copy(k.transpose(1, 2), torch.float32), turn_k, 1.0)
            values = _copy(v.transpose(1, 2), narrow)
            outs = by_key_head(o, kv_heads)

            def probabilities(scores: Tensor, piece: Piece) -> Tensor:
                return torch.softmax(scores.add_(_part(bias, kv_heads, piece)), -1).to(narrow)

            def put(out: Tensor, piece: Piece) -> None:
                piece.of_queries(outs).copy_(out)

            kept = forward_products(queries, keys, values, probabilities, put)
        if any(ctx.needs_input_grad):
            ctx.scale, ctx.shapes, ctx.dtypes = scale, (q.shape, k.shape), (q.dtype, k.dtype, v.dtype)
            ctx.save_for_backward(queries.to(narrow), keys.to(narrow), values, turn_q, turn_k, *kept)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a second derivative would silently miss what follows
            raise RuntimeError("rope_attention: its gradient has no derivative on a CPU (create_graph=True asks for one)")
        queries, keys, values, turn_q, turn_k, *kept = ctx.saved_tensors
        (q_shape, k_shape), narrow = ctx.shapes, values.dtype
        with without_autocast(do.device):
            douts = _copy(by_key_head(do, k_shape[2]), narrow)

            def differentiate(p: Tensor, dp: Tensor, piece: Piece) -> Tensor:
                return torch._softmax_backward_data(dp, p, -1, narrow)

            gradients = backward_products(douts, queries, keys, values, kept, differentiate)
            dqueries, dkeys, dvalues = (t.to(torch.float32) for t in gradients)
            shapes = zip((q_shape, k_shape, k_shape), ctx.dtypes)
            dq, dk, dv = (torch.empty(shape, dtype=dtype, device=do.device) for shape, dtype in shapes)
            back_q, back_k = (None if turn is None else turn.conj_physical() for turn in (turn_q, turn_k))
            by_key_head(dq, k_shape[2]).copy_(_turn(dqueries, back_q, ctx.scale))
            dk.transpose(1, 2).copy_(_turn(dkeys, back_k, 1.0))
            dv.transpose(1, 2).copy_(dvalues)
        return dq, dk, dv, None, None, None, None


@dataclass(frozen=True)
class Piece:
    """Rows of the batch, a block of their queries, and the keys that it may see; `is_whole` if that is all there is."""

    rows: slice
    block: slice
    seen: slice
    is_whole: bool

    def of_queries(self, t: Tensor) -> Tensor:
        """Of t (B, Hkv, G, Tq, D)."""
        return t if self.is_whole else t[self.rows, :, :, self.block]

    def of_keys(self, t: Tensor) -> Tensor:
        """Of t (B, Hkv, Tk, D)."""
        return t if self.is_whole else t[self.rows, :, self.seen]


Probabilities = Callable[[Tensor, Piece], Tensor]
Derivative = Callable[[Tensor, Tensor, Piece], Tensor]


def forward_products(
    queries: Tensor, keys: Tensor, values: Tensor, probabilities: Probabilities, put: Callable[[Tensor, Piece], None]
) -> list[Tensor]:  # fmt: skip
    """The products of attention, piece by piece.

    queries        (B, Hkv, G, Tq, D)  bear the scores' scale
    keys, values   (B, Hkv, Tk, D)
    probabilities  of scores (rows, Hkv, G, block, seen), theirs to overwrite, in the dtype of values
    put            takes what the probabilities make of the values, (rows, Hkv, G, block, D), to its place

    Returns the pieces' probabilities, for backward_products.
    """
    kept = []
    for piece in pieces(queries.shape, keys.shape):
        query = piece.of_queries(queries)
        scores = torch.bmm(_rows(query), piece.of_keys(keys).flatten(0, 1).mT)
        p = probabilities(scores.view(*query.shape[:-1], -1), piece)
        put(torch.bmm(_rows(p), piece.of_keys(values).flatten(0, 1)).view(query.shape), piece)
        kept.append(p)
    return kept


def backward_products(
    douts: Tensor, queries: Tensor, keys: Tensor, values: Tensor, kept: Sequence[Tensor], differentiate: Derivative
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of queries, keys and values, shaped as those; in their dtype, or in float32 where they are sums of pieces.

    douts          (B, Hkv, G, Tq, D)  the output's gradient
    kept           what forward_products returned
    differentiate  (p, dp, piece) -> the gradient of the piece's scores, in p's dtype; dp is its to overwrite
    """
    sums: tuple[Tensor, ...] = ()
    for piece, p in zip(pieces(queries.shape, keys.shape), kept):
        dout, query = _rows(piece.of_queries(douts)), _rows(piece.of_queries(queries))
        key, value = (piece.of_keys(t).flatten(0, 1) for t in (keys, values))
        dscores = _rows(differentiate(p, torch.bmm(dout, value.mT).view(p.shape), piece))
        found = torch.bmm(dscores, key), torch.bmm(dscores.mT, query), torch.bmm(_rows(p).mT, dout)
        if piece.is_whole:
            return tuple(t.view(like.shape) for t, like in zip(found, (queries, keys, values)))
        if not sums:
            sums = tuple(torch.empty_like(t, dtype=torch.float32) for t in (queries, keys, values))
        parts = piece.of_queries(sums[0]), piece.of_keys(sums[1]), piece.of_keys(sums[2])
        # The first block sees every key, and later ones add to it.
        is_later = piece.block.stop != queries.shape[3]
        for part, t, is_added in zip(parts, found, (False, is_later, is_later)):
            (part.add_ if is_added else part.copy_)(t.view(part.shape))
    return sums


def pieces(q_shape: torch.Size, k_shape: torch.Size) -> Iterator[Piece]:
    """What is multiplied at once, the newest queries first.

    q_shape, k_shape   (B, Hkv, G, Tq, D), (B, Hkv, Tk, D)
    """
    (batch, kv_heads, group, queries, _), keys = q_shape, k_shape[2]
    at_once = max(1, SCORES_AT_ONCE // (kv_heads * group * min(queries, QUERIES) * keys))
    is_whole = at_once >= batch and QUERIES >= queries
    for first in range(0, batch, at_once):
        for end in range(queries, 0, -QUERIES):
            rows, block = slice(first, min(batch, first + at_once)), slice(max(0, end - QUERIES), end)
            yield Piece(rows, block, slice(0, keys - queries + end), is_whole)


def by_key_head(t: Tensor, kv_heads: int) -> Tensor:
    """t (B, Tq, H, D) seen as (B, Hkv, H / Hkv, Tq, D)."""
    return t.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _rows(t: Tensor) -> Tensor:
    """(rows, Hkv, G, block, D or seen) as (rows * Hkv, G * block, D or seen)."""
    return t.reshape(t.shape[0] * t.shape[1], -1, t.shape[-1])


def _copy(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense copy, in one pass whatever changes."""
    return torch.empty(t.shape, dtype=dtype, device=t.device).copy_(t)


def _turn(t: Tensor, turn: Tensor | None, scale: float) -> Tensor:
    """t (B, ..., T, D) with its pairs turned and scaled, in place."""
    if turn is None:
        return t if scale == 1.0 else t.mul_(scale)
    pairs = torch.view_as_complex(t.unflatten(-1, (-1, 2)))
    pairs.mul_((turn if scale == 1.0 else turn * scale).view(turn.shape[0], *[1] * (t.dim() - 3), *turn.shape[1:]))
    return t


def _part(bias: Tensor, kv_heads: int, piece: Piece) -> Tensor:
    """The bias (1 or rows, 1 or Hkv, 1 or H / Hkv, block, seen) of a piece."""
    bias = bias[piece.rows if bias.shape[0] > 1 else slice(None), :, piece.block, piece.seen]
    return bias.unflatten(1, (kv_heads, -1) if bias.shape[1] > 1 else (1, 1))
