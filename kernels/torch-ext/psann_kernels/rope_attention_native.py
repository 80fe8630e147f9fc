"""Native twin of rope_attention for short windows: csrc/cpu/attention_parts.cpp around torch's matrix products.
Read rope_attention.py and rope_attention_dense.py first.

As there: scores and softmax are float32, probabilities are rounded to the inputs' dtype before they meet the values. What the
kernels save is what lies between the products: heads change places, turn and are widened in one pass, and the softmax visits only
the keys that a query sees, without a matrix that says which.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .direct import is_watched
from .library import without_autocast
from .native import TYPES, address, launch, refuses_dtype
from .rope_attention import OP, document_first
from .rope_attention_dense import Piece, backward_products, by_key_head, forward_products, product_dtype

# Keys up to which this is faster than torch's attention, by the dtype of its products.
MOST_KEYS = {torch.float32: 256, torch.bfloat16: 512}
FORWARD, BACK = 1, -1


class _Attend(torch.autograd.Function):
    # Inside, tensors are (B, Hkv, tokens, D), the queries' (B, Hkv, H / Hkv, Tq, D), as in rope_attention_dense.py.

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, first: Tensor | None,
        slopes: Tensor | None, interleaved: bool, window: int, scale: float,
    ) -> Tensor:  # fmt: skip
        (batch, tokens, heads, head_dim), (_, length, kv_heads, _) = q.shape, k.shape
        narrow, turning = product_dtype(v.dtype), (cos, sin, first, interleaved)
        with without_autocast(q.device):
            o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            queries = torch.empty((batch, kv_heads, heads // kv_heads, tokens, head_dim), dtype=torch.float32, device=q.device)
            keys = torch.empty((batch, kv_heads, length, head_dim), dtype=torch.float32, device=q.device)
            values = torch.empty_like(keys, dtype=narrow)
            narrowed = [t if narrow == torch.float32 else torch.empty_like(t, dtype=narrow) for t in (queries, keys)]
            _turn(by_key_head(q, kv_heads), queries, narrowed[0], turning, length - tokens, scale, FORWARD)
            _turn(k.transpose(1, 2), keys, narrowed[1], turning, 0, 1.0, FORWARD)
            _turn(v.transpose(1, 2), values)
            outs, rules = by_key_head(o, kv_heads), (first, slopes, window, length - tokens)

            def probabilities(scores: Tensor, piece: Piece) -> Tensor:
                p = torch.empty_like(scores, dtype=narrow)
                launch("softmax_scores", p, _scores(p, rules, piece), scores.data_ptr(), p.data_ptr(), TYPES[narrow])
                return p

            def put(out: Tensor, piece: Piece) -> None:
                _turn(out, piece.of_queries(outs))

            kept = forward_products(queries, keys, values, probabilities, put)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*narrowed, values, *kept)
            # Constants, which autograd would not save where they were made under inference_mode.
            ctx.turning, ctx.rules, ctx.scale = turning, rules, scale
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a second derivative would silently miss what follows
            raise RuntimeError("rope_attention: its gradient has no derivative on a CPU (create_graph=True asks for one)")
        queries, keys, values, *kept = ctx.saved_tensors
        (batch, kv_heads, group, tokens, head_dim), length, narrow = queries.shape, keys.shape[2], values.dtype

        def differentiate(p: Tensor, dp: Tensor, piece: Piece) -> Tensor:
            launch("softmax_scores_backward", p, _scores(p, ctx.rules, piece), p.data_ptr(), dp.data_ptr(), TYPES[narrow])
            return dp

        with without_autocast(do.device):
            douts = torch.empty_like(queries)
            _turn(by_key_head(do, kv_heads), douts)
            dqueries, dkeys, dvalues = backward_products(douts, queries, keys, values, kept, differentiate)
            dq = torch.empty((batch, tokens, kv_heads * group, head_dim), dtype=do.dtype, device=do.device)
            dk, dv = (torch.empty((batch, length, kv_heads, head_dim), dtype=do.dtype, device=do.device) for _ in range(2))
            _turn(dqueries, by_key_head(dq, kv_heads), None, ctx.turning, length - tokens, ctx.scale, BACK)
            _turn(dkeys, dk.transpose(1, 2), None, ctx.turning, 0, 1.0, BACK)
            _turn(dvalues, dv.transpose(1, 2))
        return dq, dk, dv, *[None] * 7


def _turn(
    source: Tensor, out: Tensor, narrow: Tensor | None = None, turning: tuple[Any, ...] = (None, None, None, True), offset: int = 0,
    factor: float = 1.0, direction: int = FORWARD,
) -> None:  # fmt: skip
    """out, and narrow if it is another tensor, = source, both (B, Hkv[, G], T, D), turned if `turning` has tables, times factor."""
    shape, steps, out_steps = source.shape, source.stride(), out.stride()
    if steps[-1] != 1:
        source = source.contiguous()
        steps = source.stride()
    # Hkv and G are one axis of even steps.
    heads = shape[1] if len(shape) == 4 else shape[1] * shape[2]
    head = -3 if shape[-3] > 1 else 1
    cos, sin, first, interleaved = turning
    launch(
        "turn_heads", out,
        source.data_ptr(), (steps[0], steps[-2], steps[head]), out.data_ptr(), (out_steps[0], out_steps[-2], out_steps[head]),
        0 if narrow is None or narrow is out else narrow.data_ptr(), address(first), 0 if first is None else first.shape[1],
        address(cos), address(sin), interleaved, (shape[0], shape[-2], heads, shape[-1]), offset, factor, direction,
        TYPES[source.dtype], TYPES[out.dtype],
    )  # fmt: skip


def _scores(p: Tensor, rules: tuple[Any, ...], piece: Piece) -> tuple[int, ...]:
    """What the kernels take of a piece's scores, p (rows, Hkv, G, block, seen)."""
    first, slopes, window, offset = rules
    batch, kv_heads, group, queries, keys = p.shape
    width = 0 if first is None else first.shape[1]
    where = 0 if first is None else first.data_ptr() + piece.rows.start * width * first.element_size()
    return where, address(slopes), batch, kv_heads * group, queries, keys, offset + piece.block.start, width, window


def refuses(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, **options: Any) -> str | None:
    if q.device.type != "cpu":
        return f"q is on {q.device}; the native kernels of rope_attention run on a CPU"
    most = MOST_KEYS.get(product_dtype(q.dtype))
    if most is None or k.shape[1] > most:
        return refuses_dtype("q", q) or f"there are {k.shape[1]} keys; of {q.dtype} the native kernels serve at most {most}"
    if is_watched(q, k, v):
        return "a trace, a mode, a transform or a tensor's own class looks at the call, and would not see the native kernels"
    return None


@OP.offer("native", refuses, is_partial=True)
def _serve(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, *, cu_seqlens: Tensor | None = None,
    interleaved: bool = True, softmax_scale: float, window: int | None = None, alibi_slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    without = max(0, q.shape[1] - k.shape[1])
    if without or q.numel() == 0:
        # Queries without keys leave before a softmax would have to divide 0 by 0, and nothing at all has no products.
        rest = OP.implementations["torch" if without == q.shape[1] or q.numel() == 0 else "native"].function
        o = rest(
            q[:, without:], k, v, cos, sin, cu_seqlens=cu_seqlens, interleaved=interleaved, softmax_scale=softmax_scale,
            window=window, alibi_slopes=alibi_slopes,
        )  # fmt: skip
        return F.pad(o, (0, 0, 0, 0, without, 0))
    first = None if cu_seqlens is None else document_first(cu_seqlens, q.shape[0], k.shape[1])
    cos, sin, alibi_slopes = (None if t is None else t.contiguous() for t in (cos, sin, alibi_slopes))
    return _Attend.apply(q, k, v, cos, sin, first, alibi_slopes, interleaved, window or 0, softmax_scale)
