"""Our attention as an `attn_implementation` of transformers: "psann_triton" and "psann_torch".

transformers describes who sees whom by a (B, 1, Tq, Tk) mask. Causal attention with padding, packed documents, sliding windows and
caches has a simpler form: query i sees the keys first[i] to last[i]. The mask function below gives that, (B, 1, Tq, 2) int32, and
refuses a mask of another form; attention turns it into documents, or into the block table of a cache that is read where it lies.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Iterator

import torch
from psann_kernels import paged_attention, rope_attention
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ..models.language_model import document_offsets

BACKENDS = {"psann_triton": "triton", "psann_torch": "torch"}
# Where the mask function notes the sliding window for attention: an attribute of the tensor that it returns.
WINDOW = "_psann_window"


def register() -> None:
    """Make `attn_implementation="psann_triton"` and `"psann_torch"` known to transformers. Models that do not ask are not "
    "touched."""
    for name, backend in BACKENDS.items():
        AttentionInterface.register(name, attention_function(backend))
        AttentionMaskInterface.register(name, interval_mask)


def interval_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The keys that each query sees, (B, 1, Tq, 2) int32 of first and last; None where all are plainly causal.

    Arguments as transformers gives them to sdpa_mask. Raises ValueError for a mask that is no causal interval.
    """
    mask = sdpa_mask(batch_size, q_length, kv_length, q_offset=q_offset, kv_offset=kv_offset, local_size=local_size, **kwargs)
    if mask is None:
        return None
    found = intervals(mask)
    setattr(found, WINDOW, local_size)
    return found


def intervals(mask: Tensor) -> Tensor:
    """(B, 1, Tq, 2) int32 of a mask (B, 1, Tq, Tk), bool or additive. A query that sees nothing, being padding, gets itself.

    Raises ValueError if a query sees keys that are no interval, or heads see different ones.
    """
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if seen.shape[1] != 1:
        raise ValueError(
            f"psann attention: the mask has shape {tuple(mask.shape)}, one for each head; all heads must see the same keys"
        )
    queries, keys = seen.shape[-2:]
    count, first = seen.sum(-1), seen.int().argmax(-1)
    last = first + count - 1
    if not torch.compiler.is_compiling():
        # One look at the values for each forward pass: a mask with holes would otherwise give other logits without a word.
        key = torch.arange(keys, device=mask.device)
        is_interval = (seen == ((key >= first.unsqueeze(-1)) & (key <= last.unsqueeze(-1)))).all()
        if not is_interval:
            raise ValueError(
                "psann attention: a query sees keys that are no interval (padding inside a text, or a special mask); "
                "use attn_implementation='sdpa' for this model or batch"
            )
    itself = (torch.arange(queries, device=mask.device) + (keys - queries)).clamp(min=0).expand_as(first)
    first, last = torch.where(count > 0, first, itself), torch.where(count > 0, last, itself)
    return torch.stack((first, last), -1).to(torch.int32)


def attention_function(backend: str) -> Any:
    """The function that transformers calls for every layer."""

    def psann_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        alibi_slopes: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query (B, H, Tq, D), key and value (B, Hkv, Tk, D), rotated -> ((B, Tq, H, D), None)."""
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is None and query.shape[2] > 1 and not is_causal:
            raise ValueError("psann attention: this layer is not causal, and the kernels are; use attn_implementation='sdpa'")
        _refuse(dropout, kwargs)
        if cache is not None:  # transformers' continuous batching keeps keys and values in pages of its own
            key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        options = dict(softmax_scale=scaling, alibi_slopes=alibi_slopes, backend=backend)
        if attention_mask is None:
            if 1 < query.shape[2] < key.shape[2]:
                # The first tokens in an empty static cache, as in sdpa: the slots behind them are not written yet.
                key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
            return rope_attention(*(t.transpose(1, 2) for t in (query, key, value)), **options), None
        is_ours = attention_mask.dtype == torch.int32
        spans = attention_mask if is_ours else intervals(attention_mask)
        window = getattr(attention_mask, WINDOW, sliding_window)
        if is_ours and query.shape[2] == key.shape[2]:
            return _over_window(query, key, value, spans, window, options), None
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
            raise ValueError(
                "psann attention: a gradient is wanted through a cache or a mask made by hand; pass use_cache=False and a 2D "
                "attention_mask, or work under torch.no_grad()"
            )
        return _over_cache(query, key, value, spans, options), None

    return psann_attention


def _refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for what the kernels do not compute."""
    if dropout:
        raise ValueError(
            f"psann attention: attention_dropout is {dropout}, and the kernels have none; set config.attention_dropout = 0.0"
        )
    for name in ("softcap", "position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"psann attention: this model needs {name}, which the kernels do not have; use attn_implementation='sdpa'"
            )
    if kwargs.get("output_attentions"):
        raise ValueError("psann attention: output_attentions=True needs the weights, which are never stored; use 'eager'")


def _over_window(query: Tensor, key: Tensor, value: Tensor, spans: Tensor, window: int | None, options: dict[str, Any]) -> Tensor:
    """As many queries as keys: documents begin where a query sees itself first."""
    first = spans[:, 0, :, 0]
    starts = first == torch.arange(first.shape[1], device=first.device)
    return rope_attention(
        *(t.transpose(1, 2) for t in (query, key, value)),
        cu_seqlens=document_offsets(starts.expand(len(query), -1)),
        window=window,
        **options,
    )


def _over_cache(query: Tensor, key: Tensor, value: Tensor, spans: Tensor, options: dict[str, Any]) -> Tensor:
    """Few queries over many keys, which are read where they lie: blocks of one token, and each query a sequence of its own, because
    the intervals of a row's queries may be unrelated."""
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    first, last = spans[:, 0].expand(batch, -1, -1).long().reshape(-1, 2).unbind(-1)
    row = torch.arange(batch, device=query.device).repeat_interleave(queries)
    if options["alibi_slopes"] is None:
        # Each key head on its own: keys (B, Hkv, Tk, D) are then a row of slots as they lie.
        k_cache, v_cache = (t.reshape(-1, 1, 1, head_dim) for t in (key, value))
        base = ((row * kv_heads)[:, None] + torch.arange(kv_heads, device=query.device)) * keys
    else:
        # A slope belongs to a head, so the heads stay together, which moves the keys.
        k_cache, v_cache = (t.transpose(1, 2).reshape(-1, 1, kv_heads, head_dim) for t in (key, value))
        base = (row * keys)[:, None]
    table = (base + first[:, None])[..., None] + torch.arange(keys, device=query.device)
    sequences = base.numel()
    o = paged_attention(
        query.transpose(1, 2).reshape(sequences, -1, head_dim),
        k_cache,
        v_cache,
        table.clamp_(max=len(k_cache) - 1).view(sequences, keys).to(torch.int32),
        (last - first + 1).repeat_interleave(base.shape[1]).to(torch.int32),
        torch.arange(sequences + 1, dtype=torch.int32, device=query.device),
        **options,
    )
    return o.view(batch, queries, heads, head_dim)


@contextlib.contextmanager
def continuous_batching_attention(model: nn.Module, implementation: str) -> Iterator[None]:
    """Within, models of `model`'s modelling file that ask for "sdpa" get our attention.

    model            a transformers model with attn_implementation="sdpa", the one that continuous batching accepts
    implementation   "psann_triton" or "psann_torch"

    Continuous batching takes names that it knows, so the name stays and the table behind it, that file's alone, is another one.
    Raises ValueError for another name, or a model whose file has no such table.
    """
    if implementation not in BACKENDS:
        raise ValueError(f"implementation is {implementation!r}; choose one of {', '.join(map(repr, BACKENDS))}")
    file = sys.modules[type(model).__module__]
    if not isinstance(getattr(file, "ALL_ATTENTION_FUNCTIONS", None), AttentionInterface):
        raise ValueError(
            f"{type(model).__name__}: its file {file.__name__} has no ALL_ATTENTION_FUNCTIONS; such models do not take another "
            "attention"
        )
    table = AttentionInterface()
    table["sdpa"] = attention_function(BACKENDS[implementation])
    original, file.ALL_ATTENTION_FUNCTIONS = file.ALL_ATTENTION_FUNCTIONS, table
    try:
        yield
    finally:
        file.ALL_ATTENTION_FUNCTIONS = original
