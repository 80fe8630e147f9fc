"""linear_cross_entropy chunk by chunk: the loop that every backend shares, and torch's part of it.
Read linear_cross_entropy.py first.

For each chunk of tokens: logits by a matrix product into one reused buffer; `turn` takes their losses and makes them, in place,
their gradient; two more products add to dx and dweight. So "sum" and "mean" take three products, as a linear layer and its backward
do, and no memory that grows with tokens times classes. The loss's own gradient is one number there, which scales what was kept; a
gradient per token, for "none", comes too late for that, so its backward goes through the chunks again (four products).
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import torch
from torch import Tensor

from .library import define, without_autocast
from .linear_cross_entropy import OP

# Bytes of one chunk's logits: on a CPU what its caches hold (and less than what the allocator gives back to the system at every
# call), with rows enough for a fast product; on a GPU 2048 tokens of 128k classes.
CPU_CHUNK_BYTES, CPU_LEAST_TOKENS = 768 << 10, 256
GPU_CHUNK_BYTES, GPU_LEAST_TOKENS = 512 << 20, 256

# turn(logits, targets, losses, dloss, ignore_index, label_smoothing, z_loss, soft_cap, wants_gradient): reads logits (rows, V),
# writes losses (rows,), and if asked makes logits their own gradient, times dloss (rows,) unless that is None.
Turn = Callable[..., None]


def chunk_of(x: Tensor, classes: int) -> int:
    """Tokens in a chunk where the caller leaves it open."""
    is_cpu = x.device.type == "cpu"
    most, least = (CPU_CHUNK_BYTES, CPU_LEAST_TOKENS) if is_cpu else (GPU_CHUNK_BYTES, GPU_LEAST_TOKENS)
    return max(least, most // (classes * x.element_size()) // 128 * 128)


def run(
    turn: Turn, x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, dloss: Tensor | None, ignore_index: int,
    label_smoothing: float, z_loss: float, soft_cap: float | None, chunk: int | None, needs_x: bool, needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """losses (N,), dx (N, K), dweight (V, K), dbias (V,); the last two wide, each (0,) where it is not needed."""
    losses, dx, dweight, dbias = _outputs(x, weight, needs_x, needs_weight, needs_bias)
    if needs_weight:
        dweight.zero_()
    if needs_bias:
        dbias.zero_()
    if x.shape[0] == 0:
        return losses, dx, dweight, dbias
    if x.device.type == "cpu":
        _check_targets(targets, weight.shape[0], ignore_index)
    tokens = min(x.shape[0], chunk or chunk_of(x, weight.shape[0]))
    wants_gradient = needs_x or needs_weight or needs_bias
    with without_autocast(x.device):
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        buffer = torch.empty((tokens, weight.shape[0]), dtype=x.dtype, device=x.device)
        for first in range(0, x.shape[0], tokens):
            here = slice(first, first + tokens)
            part = x[here]
            logits = buffer[: part.shape[0]]
            if bias is None:
                torch.mm(part, weight.t(), out=logits)
            else:
                torch.addmm(bias, part, weight.t(), out=logits)
            turn(
                logits, targets[here], losses[here], None if dloss is None else dloss[here], ignore_index, label_smoothing, z_loss,
                soft_cap, wants_gradient,
            )  # fmt: skip
            if needs_x:
                torch.mm(logits, weight, out=dx[here])
            if needs_weight:
                _add_product(dweight, logits.t(), part)
            if needs_bias:
                dbias += logits.sum(0, dtype=dbias.dtype)
    return losses, dx, dweight, dbias


def _outputs(
    x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty((x.shape[0],), dtype=wide),
        x.new_empty(x.shape if needs_x else (0,)),
        x.new_empty(weight.shape if needs_weight else (0,), dtype=wide),
        x.new_empty(weight.shape[:1] if needs_bias else (0,), dtype=wide),
    )


def _check_targets(targets: Tensor, classes: int, ignore_index: int) -> None:
    is_wrong = (targets != ignore_index) & ((targets < 0) | (targets >= classes))
    if is_wrong.any():
        raise ValueError(
            f"linear_cross_entropy: targets holds {targets[is_wrong][0].item()}; "
            f"classes go from 0 to {classes - 1}, and ignore_index is {ignore_index}"
        )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        if _adds_wide(a.dtype, a.device):
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        else:
            total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@functools.cache
def _adds_wide(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch adds a product of `dtype` to a float32 matrix in place; older ones want the sum in the factors' dtype."""
    square = torch.zeros((16, 16), dtype=dtype, device=device)
    try:
        torch.addmm(square.float(), square, square, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def turn(
    logits: Tensor, targets: Tensor, losses: Tensor, dloss: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
    soft_cap: float | None, wants_gradient: bool,
) -> None:  # fmt: skip
    """`Turn` by torch."""
    classes = logits.shape[1]
    is_counted = targets != ignore_index
    is_wrong = is_counted & ((targets < 0) | (targets >= classes))
    index = targets.where(is_counted & ~is_wrong, 0).unsqueeze(1)
    capped = logits.to(losses.dtype)
    if soft_cap is not None:
        capped = torch.tanh(capped / soft_cap).mul_(soft_cap)
    log_p = torch.log_softmax(capped, 1)

    loss = log_p.gather(1, index).squeeze(1).mul_(label_smoothing - 1)
    if label_smoothing:
        loss -= label_smoothing * log_p.mean(1)
    if z_loss:
        lse = capped.logsumexp(1)
        loss += z_loss * lse.square()
    losses.copy_(loss.where(is_counted, 0).masked_fill_(is_wrong, float("nan")))

    if not wants_gradient:
        return
    gradient = log_p.exp_()
    if z_loss:
        gradient *= (2 * z_loss * lse + 1).unsqueeze(1)
    if label_smoothing:
        gradient -= label_smoothing / classes
    gradient.scatter_add_(1, index, torch.full_like(index, label_smoothing - 1, dtype=losses.dtype))
    if soft_cap is not None:
        gradient *= 1 - (capped / soft_cap).square_()
    if dloss is not None:
        gradient *= dloss.to(losses.dtype).unsqueeze(1)
    # Looked at on a CPU, where looking is free and the pass over all logits is not.
    if logits.device.type != "cpu" or not is_counted.all():
        gradient.masked_fill_(~is_counted.unsqueeze(1), 0)
    logits.copy_(gradient)


def define_ops(backend: str, turn: Turn) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two ops of one backend: (losses one by one, their sum with the gradients)."""
    name = f"linear_cross_entropy_{backend}"
    inputs = "Tensor x, Tensor weight, Tensor targets, Tensor? bias"
    options = "int ignore_index, float label_smoothing, float z_loss, float? soft_cap, int? chunk"
    needs = "bool needs_x, bool needs_weight, bool needs_bias"

    def losses_of(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        return run(turn, x, weight, targets, bias, None, *options, False, False, False)[0]

    def gradients_of(
        dloss: Tensor, x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *options: Any
    ) -> tuple[Tensor, ...]:
        _, dx, dweight, dbias = run(turn, x, weight, targets, bias, dloss, *options)
        return dx, dweight.to(weight.dtype), dbias.to(dbias.dtype if bias is None else bias.dtype)

    def sum_of(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
        losses, *gradients = run(turn, x, weight, targets, bias, None, *options)
        return losses.sum(), *gradients

    def gradients_fake(
        dloss: Tensor, x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *options: Any
    ) -> tuple[Tensor, ...]:
        _, dx, dweight, dbias = _outputs(x, weight, *options[-3:])
        return dx, dweight.to(weight.dtype), dbias.to(dbias.dtype if bias is None else bias.dtype)

    def sum_fake(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
        losses, *gradients = _outputs(x, weight, *options[-3:])
        return losses.new_empty(()), *gradients

    def setup_losses(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.ignore_index, ctx.label_smoothing, ctx.z_loss, ctx.soft_cap, ctx.chunk = inputs
        ctx.save_for_backward(*tensors)

    def differentiate_losses(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second()
        is_needed = [ctx.needs_input_grad[place] for place in (0, 1, 3)]
        options = ctx.ignore_index, ctx.label_smoothing, ctx.z_loss, ctx.soft_cap, ctx.chunk
        found = gradients_op(dloss, *ctx.saved_tensors, *options, *is_needed)
        dx, dweight, dbias = (gradient if is_wanted else None for gradient, is_wanted in zip(found, is_needed))
        return dx, dweight, None, dbias, *[None] * 5

    def setup_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, bias, *_, needs_x, needs_weight, needs_bias = inputs
        ctx.needs = needs_x, needs_weight, needs_bias
        ctx.dtypes = x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
        ctx.save_for_backward(*output[1:])
        ctx.mark_non_differentiable(*output[1:])

    def differentiate_sum(ctx: Any, dsum: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second()
        for place, what, was_said in zip((0, 1, 3), ("x", "weight", "bias"), ctx.needs):
            if ctx.needs_input_grad[place] and not was_said:
                raise RuntimeError(f"{name}_sum: {what} needs a gradient, but needs_{what} was False when the loss was computed")
        dx, dweight, dbias = (
            (kept * dsum).to(dtype) if was_said else None for kept, dtype, was_said in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs)
        )
        return dx, dweight, None, dbias, *[None] * 8

    gradients_op = define(
        f"{name}_backward(Tensor dloss, {inputs}, {options}, {needs}) -> (Tensor, Tensor, Tensor)", gradients_of, gradients_fake
    )
    losses_op = define(
        f"{name}({inputs}, {options}) -> Tensor",
        losses_of, lambda x, weight, *_: _outputs(x, weight, False, False, False)[0], differentiate_losses, setup_losses,
    )  # fmt: skip
    sum_op = define(
        f"{name}_sum({inputs}, {options}, {needs}) -> (Tensor, Tensor, Tensor, Tensor)",
        sum_of,
        sum_fake,
        differentiate_sum,
        setup_sum,
    )
    return losses_op, sum_op


def _refuse_second() -> None:
    """Raise inside a backward that is itself to be differentiated: what was kept counts as a constant there,
    and no error would tell."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy: its gradient has no derivative (create_graph=True asks for one); "
            "linear_cross_entropy.definition has all"
        )


def serve(
    ops: tuple[Callable[..., Any], Callable[..., Any]], x: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, soft_cap: float | None, reduction: str, chunk: int | None,
) -> Tensor:  # fmt: skip
    """linear_cross_entropy by one backend's ops."""
    losses_op, sum_op = ops
    rows, classes = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    arguments = rows, weight, classes, bias, ignore_index, label_smoothing, z_loss, soft_cap, chunk
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    if reduction == "none":
        return losses_op(*arguments).reshape(targets.shape)
    total = sum_op(*arguments, *needs)[0] if any(needs) else losses_op(*arguments).sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


OPS = define_ops("torch", turn)


@OP.specify
def _serve(x: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return serve(OPS, x, weight, targets, **options)
