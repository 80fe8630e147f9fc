"""Native twin of paged_append: csrc/cpu/paged_append.cpp. Read paged_attention.py first.

Reads the new keys and values once, turns the keys, and writes both once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .direct import shortcut
from .library import define
from .native import NATIVE, TYPES, address, launch, refuses_device, refuses_dtype
from .paged_attention import APPEND
from .paged_attention_native import refuses_cache, tables, unit_heads


def _forward(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, positions: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool,
) -> None:  # fmt: skip
    if k.numel() == 0:
        return
    k, v, slot_mapping = unit_heads(k), unit_heads(v), slot_mapping.contiguous()
    cos, sin, max_position = tables(cos, sin)
    positions = None if positions is None else positions.to(torch.int64).contiguous()
    launch(
        "paged_append", k,
        k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), k_cache.stride()[:3], v_cache.data_ptr(), v_cache.stride()[:3],
        slot_mapping.data_ptr(), address(positions), address(cos), address(sin), interleaved, *k.shape, k_cache.shape[1],
        k_cache.shape[0], max_position, *k.stride()[:2], *v.stride()[:2], TYPES[k.dtype],
    )  # fmt: skip


paged_append_native = define(
    "paged_append_native(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, Tensor? positions, "
    "Tensor? cos, Tensor? sin, bool interleaved) -> ()",
    _forward,
    lambda *arguments: None,
)
_call = shortcut(paged_append_native, _forward)


def refuses(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, **options: object) -> str | None:
    return refuses_device(k) or refuses_dtype("k", k) or refuses_cache(k_cache, v_cache)


@APPEND.offer("native", refuses, at_once=NATIVE.paged_append_at_once)
def _serve(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *, positions: Tensor | None = None,
    cos: Tensor | None = None, sin: Tensor | None = None, interleaved: bool = True, k_scale: None = None, v_scale: None = None,
) -> None:  # fmt: skip
    _call(k, v, k_cache, v_cache, slot_mapping, positions, cos, sin, interleaved)
