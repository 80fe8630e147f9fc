"""The loss of transformers' causal models, as patch replaces it: lm_head and cross-entropy in one,
without all the logits at once."""

from __future__ import annotations

import functools
from typing import Any

import torch
from psann_kernels import OPS, linear_cross_entropy
from psann_kernels.registry import for_model
from torch import Tensor, nn
from torch.nn import functional as F

from .patch_rows import Plan, kept, replacement

# The arguments that come before labels: ids, mask, positions, cache, embeddings, in forward as in the model beneath it.
BEFORE_LABELS = 5
# Models whose loss is the cross-entropy of lm_head(last hidden state), nothing scaled, capped or added.
KNOWN = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Olmo", "Olmo2", "SmolLM3", "Starcoder2", "PSANN")


def of_transformers(name: str, module: nn.Module, backend: str) -> Plan | None:
    """A model of transformers that computes its own loss from labels."""
    old = type(module).__name__
    if not old.endswith("ForCausalLM") or not hasattr(module, "loss_function") or not hasattr(module, "lm_head"):
        return None
    if old.removesuffix("ForCausalLM") not in KNOWN:
        return kept(name, old, "its loss is not known to be the cross-entropy of lm_head's output alone")
    if type(module.lm_head) is not nn.Linear:
        return kept(name, old, f"its lm_head is a {type(module.lm_head).__name__}, not nn.Linear")
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.utils import can_return_tuple

    if module.loss_function is not ForCausalLMLoss:
        return kept(name, old, "its loss_function is another than transformers' ForCausalLMLoss")
    plain, chosen = type(module).forward, for_model(backend, OPS["linear_cross_entropy"])

    @functools.wraps(plain)  # generate and Trainer read its arguments
    @can_return_tuple
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        # Hooks on lm_head may be what makes its weight whole (FSDP); who passes more than five arguments by place, or
        # logits_to_keep, gets the model's own code.
        has_hooks = self.lm_head._forward_hooks or self.lm_head._forward_pre_hooks
        is_plain = labels is None or not self.training or self.loss_function is not ForCausalLMLoss
        if is_plain or has_hooks or len(args) > BEFORE_LABELS or "logits_to_keep" in kwargs:
            options = kwargs if labels is None else {"labels": labels, **kwargs}
            return plain(self, *args, **options)
        outputs = self.model(*args, **kwargs)
        x = outputs.last_hidden_state
        return CausalLMOutputWithPast(
            loss=_loss(self.lm_head, x, labels.to(x.device), chosen, **kwargs), past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states, attentions=outputs.attentions,
        )  # fmt: skip

    weight = module.lm_head.weight
    example = (weight.new_empty((1, weight.shape[1])), weight, torch.zeros(1, dtype=torch.int64, device=weight.device))
    note = "in training with labels, the output's logits are None"
    return replacement(
        name, module, OPS["linear_cross_entropy"], backend, example, {"bias": module.lm_head.bias, "reduction": "mean"}, forward,
        note
    )  # fmt: skip


def _loss(
    head: nn.Linear,
    x: Tensor,
    labels: Tensor,
    backend: str,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """ForCausalLMLoss of head(x), with its arguments: labels (B, T) are shifted here, shift_labels (B, T) have been."""
    targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels.to(x.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    options = dict(bias=head.bias, ignore_index=ignore_index, reduction=reduction, backend=backend)
    loss = linear_cross_entropy(x, head.weight, targets.reshape(x.shape[:-1]), **options)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


KINDS = (of_transformers,)
