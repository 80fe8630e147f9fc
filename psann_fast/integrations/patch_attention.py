"""Attention of other people's models, as patch replaces it: psannlm's module, and the attention that transformers takes by name."""

from __future__ import annotations

import copy
from typing import Any, Callable

import torch
from psann_kernels import OPS, rope_attention
from psann_kernels.registry import for_model
from torch import Tensor, nn

from ..models.layers import RotaryTables
from .patch_rows import ALREADY, ORIGINAL, Plan, Row, equals, kept, replacement, serving

PSANNLM_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "attn_drop", "proj_drop")
THETA = 10000.0  # psannlm's, which it does not store
PROBE_TOKENS = 5


def of_psannlm(name: str, module: nn.Module, backend: str) -> Plan | None:
    """psannlm's SelfAttention: four projections, rotary tables or ALiBi slopes, and a cache given by the caller."""
    old, parts = type(module).__name__, dict(module.named_children())
    if old != "SelfAttention" or any(part not in parts for part in PSANNLM_PARTS) or not hasattr(module, "positional_encoding"):
        return None
    dropout = getattr(module.attn_drop, "p", 0.0)
    if dropout:
        return kept(name, old, f"it drops attention's probabilities (p = {dropout:g}), and the kernels have no dropout")
    heads, op, weight = module.n_heads, OPS["rope_attention"], module.q_proj.weight
    has_rotation, has_slopes = module.positional_encoding == "rope", module.positional_encoding == "alibi"
    tables, chosen = RotaryTables(module.head_dim, THETA), for_model(backend, op)

    def attend(self: nn.Module, x: Tensor, serving_backend: str) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = tables.get(x.shape[1], x.device, q.dtype) if has_rotation else (None, None)
        slopes = self._alibi_slopes.to(q.device, torch.promote_types(q.dtype, torch.float32)) if has_slopes else None
        o = rope_attention(q, k, v, cos, sin, alibi_slopes=slopes, backend=serving_backend)
        return self.proj_drop(self.o_proj(o.flatten(-2)))

    def forward(self: nn.Module, x: Tensor, *, past_kv: Any = None, use_cache: bool = False) -> Any:
        if use_cache or past_kv is not None:  # its cache holds what its own code makes
            return type(self).forward(self, x, past_kv=past_kv, use_cache=use_cache)
        return attend(self, x, chosen)

    if weight.device.type != "meta" and ORIGINAL not in module.__dict__:
        probe = torch.linspace(-1, 1, PROBE_TOKENS * weight.shape[1], dtype=weight.dtype, device=weight.device).sin()
        probe = probe.view(1, PROBE_TOKENS, -1)
        with torch.no_grad():
            expected = attend(module, probe, "torch")
        if not equals(type(module).forward, module, probe, expected, roundings=1024):
            return kept(name, old, "its forward does not compute causal attention as psannlm 2.0.1 does")
    q = weight.new_empty((1, 1, heads, module.head_dim))
    slopes = module._alibi_slopes if has_slopes else None
    note = "given a cache, it runs its own code"
    return replacement(name, module, op, backend, (q, q, q), {"alibi_slopes": slopes}, forward, note)


def whole_models(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The models of transformers in `model`, which may be one itself, by name; not the parts of one."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        is_one = hasattr(module, "set_attn_implementation") and hasattr(getattr(module, "config", None), "_attn_implementation")
        if is_one and not any(outer == "" or name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, module))
    return found


def of_transformers(name: str, model: nn.Module, backend: str) -> Plan:
    """The attention of a transformers model, which takes it by name from its own configuration."""
    from .attention_transformers import BACKENDS, register

    config = model.config
    before = config._attn_implementation
    old = f"attention {before}"
    if before in BACKENDS:
        return kept(name, old, ALREADY)
    if not getattr(model, "_supports_attention_backend", False):
        return kept(name, old, "this model does not take another attention (_supports_attention_backend)")
    reason = _not_served(model, config)
    if reason is not None:
        return kept(name, old, reason)
    device = next((p.device.type for p in model.parameters()), "cpu")
    chosen = {"auto": "triton" if device == "cuda" else "torch"}.get(for_model(backend, OPS["rope_attention"]), backend)
    chosen, refusal = serving(OPS["rope_attention"], chosen, (torch.empty(1, 1, 1, 16, device=device),) * 3, {})
    if refusal is not None:
        return kept(name, old, f"{chosen}: {refusal}")
    new = f"psann_{chosen}"

    def apply() -> Callable[[], None]:
        register()
        # Other models may hold the same configuration, so this one gets its own, and so do its parts.
        copies: dict[int, Any] = {}
        copy.deepcopy(config, copies)
        changed = [(part, part.config) for part in model.modules() if id(getattr(part, "config", None)) in copies]
        for part, theirs in changed:
            part.config = copies[id(theirs)]
        model.set_attn_implementation(new)

        def undo() -> None:
            for part, theirs in changed:
                part.config = theirs

        return undo

    return Row(name, old, "rope_attention, paged_attention", chosen, "rotation stays in the model's own code"), apply


def _not_served(model: nn.Module, config: Any) -> str | None:
    """What this model's attention does and the kernels do not, or None. Attention itself would raise, at the first batch."""
    if getattr(config, "attention_dropout", 0.0):
        return f"attention_dropout is {config.attention_dropout}, and the kernels have none"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"it caps scores (attn_logit_softcapping={config.attn_logit_softcapping}), and the kernels do not"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "its attention has sinks, and the kernels have none"
    causal = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return None if causal and all(causal) else "not all of its attention is known to be causal, and the kernels are"


KINDS = (of_psannlm,)
