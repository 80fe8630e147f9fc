"""Other libraries' kernels for the same calls, each taking the arguments that the case makes.

A peer that has no rotation of its own gets q and k turned by a compiled rotation first, which is in its time; the cases without
rotation compare the attention alone. A library that is missing is reported by name and by the version that was sought.
"""

from __future__ import annotations

import importlib.metadata
from typing import Callable, Iterator, Sequence

import torch
from psann_kernels import rotate
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import suite
from .case import Case, Function
from .ops import Bench, Limit, Planned, Variant, compiled, measure
from .timing import Call

# distribution -> the version that the figures we compare with were published for
SOUGHT = {"liger-kernel": "0.8.5", "fla-core": "0.6.0", "flashinfer-python": "0.6.6", "cut-cross-entropy": "25.1.1"}
Builder = Callable[[Bench, Case], Variant]


def peers_section(bench: Bench) -> Iterator[suite.Case]:
    """Our own choice and every peer that serves the case."""
    for distribution, version in SOUGHT.items():
        yield f"peer {distribution}", lambda d=distribution, v=version: [presence(d, v)]
    for case in bench.cases():
        if isinstance(case, str):
            yield case, lambda op=case: [{"op": op, "refused": "not in this version"}]
        elif case.op in PEERS:
            yield case.name, lambda case=case: measure(bench, case, variants(bench, case))


def presence(distribution: str, version: str) -> suite.Row:
    found = installed(distribution)
    return {"peer": distribution, "sought": version, "found": found or "absent"}


def installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def variants(bench: Bench, case: Case) -> dict[str, Variant]:
    found: dict[str, Variant] = {"auto": case.call("auto")}
    for name, (distribution, build) in PEERS[case.op].items():
        if distribution != "torch" and installed(distribution) is None:
            found[name] = f"absent: {distribution} {SOUGHT[distribution]} was sought"
            continue
        try:
            found[name] = build(bench, case)
        except suite.VARIANT_FAILURES as error:
            found[name] = f"cannot be set up: {suite.describe(error)}"
    return found


def specification(bench: Bench, case: Case) -> Variant:
    """The op's reference, eager."""
    return case.call("torch")


def inductor(bench: Bench, case: Case) -> Variant:
    return compiled(case.call("torch")) if bench.has_compile else "left out by --no-compile"


# -- attention ----------------------------------------------------------------------------------------------------------------


def _turned(case: Case, attend: Callable[[Tensor, Tensor, Tensor], Tensor], has_compile: bool) -> Function:
    """attend takes (B, H, T, D) and gives it back."""
    turn = torch.compile(rotate, dynamic=False) if has_compile else rotate

    def attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        if cos is not None:
            q, k = turn(q, cos, sin), turn(k, cos, sin)
        return attend(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    return attention


def _sdpa(kind: SDPBackend) -> Builder:
    def build(bench: Bench, case: Case) -> Variant:
        if case.facts["window"] is not None:
            return "SDPA has no window but as a mask, which this kernel does not take"

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

        return _turned(case, attend, bench.has_compile)

    return build


def _flex(bench: Bench, case: Case) -> Variant:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not bench.has_compile:
        return "left out by --no-compile: FlexAttention is a kernel only when compiled"
    window = case.facts["window"]
    q = case.make(0)[0][0]

    def is_seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) if window is None else (i >= j) & (i - j < window)

    mask = create_block_mask(is_seen, None, None, q.shape[1], q.shape[1], device=str(bench.device))
    flex = compiled(flex_attention)
    return _turned(case, lambda q, k, v: flex(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]), bench.has_compile)


def _dense(bench: Bench, case: Case) -> Variant:
    """SDPA over keys that somebody gathered for free: what paging may cost."""
    new, length, blocks = case.facts["new"], case.facts["length"], case.facts["blocks"]

    def plan(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, seq_lens: Tensor, offsets: Tensor, cos: Tensor, sin: Tensor
    ) -> Call:
        batch = len(table)
        k, v = (
            c[table.long()].view(batch, blocks * 16, *c.shape[2:])[:, :length].transpose(1, 2).contiguous()
            for c in (k_cache, v_cache)
        )
        position = torch.arange(length, device=q.device)
        mask = None if new == 1 else position[length - new :].unsqueeze(1) >= position

        def attend() -> Tensor:
            rows = rotate(q.view(batch, new, *q.shape[1:]), cos[length - new :], sin[length - new :]).transpose(1, 2)
            return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2).reshape(q.shape)

        return attend

    return Planned(plan)


def _flashinfer_decode(bench: Bench, case: Case) -> Variant:
    """Its own rotation is of another convention, so q is turned before and its time is without a rotation; so is its plan."""
    import flashinfer

    new, length, blocks = case.facts["new"], case.facts["length"], case.facts["blocks"]
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=bench.device)

    def plan(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, seq_lens: Tensor, offsets: Tensor, cos: Tensor, sin: Tensor
    ) -> Call:
        batch = len(table)
        pages = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * blocks
        last = torch.full((batch,), (length - 1) % 16 + 1, dtype=torch.int32, device=q.device)
        sizes = (q.shape[1], k_cache.shape[2], q.shape[2], 16)
        if new == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
            wrapper.plan(pages, table.flatten(), last, *sizes, q_data_type=q.dtype, kv_data_type=q.dtype)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            wrapper.plan(offsets, pages, table.flatten(), last, *sizes, causal=True, q_data_type=q.dtype, kv_data_type=q.dtype)
        turned = rotate(q.view(batch, new, *q.shape[1:]), cos[length - new :], sin[length - new :]).reshape(q.shape)
        return lambda: wrapper.run(turned, (k_cache, v_cache))

    return Planned(plan)


# -- rows and losses ----------------------------------------------------------------------------------------------------------


def _liger_rms_norm(bench: Bench, case: Case) -> Variant:
    if case.facts["residual"]:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return lambda x, weight, residual: LigerFusedAddRMSNormFunction.apply(x, residual, weight, 1e-6, 0.0, "llama", False)
    from liger_kernel.transformers.functional import liger_rms_norm

    return lambda x, weight: liger_rms_norm(x, weight, 1e-6, in_place=False)


def _fla_rms_norm(bench: Bench, case: Case) -> Variant:
    from fla.modules.layernorm import rms_norm

    if case.facts["residual"]:
        return lambda x, weight, residual: rms_norm(x, weight, None, residual=residual, eps=1e-6, prenorm=True)
    return lambda x, weight: rms_norm(x, weight, None, eps=1e-6)


def _torch_rms_norm(bench: Bench, case: Case) -> Variant:
    if case.facts["residual"]:
        return "F.rms_norm adds no residual"
    return lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6)


def _conv1d(bench: Bench, case: Case) -> Variant:
    """cuDNN's or oneDNN's depthwise convolution, then the specification's sine."""
    from psann_kernels.damped_sine import reference as sine

    dilation = case.facts["dilation"]

    def branch(x: Tensor, weight: Tensor, amplitude: Tensor, frequency: Tensor, damping: Tensor, bias: Tensor) -> Tensor:
        features, taps = weight.shape
        padded = F.pad(x.transpose(1, 2), ((taps - 1) * dilation, 0))
        c = F.conv1d(padded, weight.unsqueeze(1).to(x.dtype), bias.to(x.dtype), dilation=dilation, groups=features)
        return sine(c.transpose(1, 2), amplitude, frequency, damping)

    return branch


def _liger_loss(bench: Bench, case: Case) -> Variant:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda x, weight, targets: liger_fused_linear_cross_entropy(x, weight, targets)


def _fla_loss(bench: Bench, case: Case) -> Variant:
    from fla.modules.fused_linear_cross_entropy import FusedLinearCrossEntropyLoss

    loss = FusedLinearCrossEntropyLoss()
    return lambda x, weight, targets: loss(x, targets, weight)


def _cut_loss(bench: Bench, case: Case) -> Variant:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def _torch_loss(bench: Bench, case: Case) -> Variant:
    """All logits at once."""
    return lambda x, weight, targets: F.cross_entropy((x @ weight.t()).float(), targets)


def _bare_linear(bench: Bench, case: Case) -> Variant:
    return Limit(lambda x, w, b, *sine: _with_zeros(F.linear(x, w, b), sine))


def _bare_linears(bench: Bench, case: Case) -> Variant:
    """The two products without any activation."""
    return Limit(lambda x, w1, b1, a, f, d, w2, b2: _with_zeros(F.linear(F.linear(x, w1, b1), w2, b2), (a, f, d)))


def _with_zeros(y: Tensor, sine: Sequence[Tensor]) -> Tensor:
    """y in a graph that the sine's parameters are in too, since their gradients are asked for."""
    return y + (0 * sum(sine)).sum().to(y.dtype) if torch.is_grad_enabled() else y


PEERS: dict[str, dict[str, tuple[str, Builder]]] = {
    "damped_sine": {"torch": ("torch", specification), "torch.compile": ("torch", inductor)},
    "rms_norm": {
        "torch": ("torch", specification),
        "torch.compile": ("torch", inductor),
        "F.rms_norm": ("torch", _torch_rms_norm),
        "liger": ("liger-kernel", _liger_rms_norm),
        "fla": ("fla-core", _fla_rms_norm),
    },
    "wave_conv": {"torch": ("torch", specification), "torch.compile": ("torch", inductor), "F.conv1d": ("torch", _conv1d)},
    "rope_attention": {
        "torch": ("torch", specification),
        "torch.compile": ("torch", inductor),
        "sdpa flash": ("torch", _sdpa(SDPBackend.FLASH_ATTENTION)),
        "sdpa cudnn": ("torch", _sdpa(SDPBackend.CUDNN_ATTENTION)),
        "sdpa efficient": ("torch", _sdpa(SDPBackend.EFFICIENT_ATTENTION)),
        "flex": ("torch", _flex),
    },
    "paged_attention": {"sdpa, keys gathered before": ("torch", _dense), "flashinfer": ("flashinfer-python", _flashinfer_decode)},
    "linear_cross_entropy": {
        "torch": ("torch", _torch_loss),
        "torch.compile": ("torch", lambda b, c: compiled(_torch_loss(b, c)) if b.has_compile else "left out by --no-compile"),
        "liger": ("liger-kernel", _liger_loss),
        "fla": ("fla-core", _fla_loss),
        "cut-cross-entropy": ("cut-cross-entropy", _cut_loss),
    },
    "linear_damped_sine": {
        "torch": ("torch", specification),
        "torch.compile": ("torch", inductor),
        "bare linear": ("torch", _bare_linear),
    },
    "damped_sine_mlp": {
        "torch": ("torch", specification),
        "torch.compile": ("torch", inductor),
        "bare linears": ("torch", _bare_linears),
    },
}
