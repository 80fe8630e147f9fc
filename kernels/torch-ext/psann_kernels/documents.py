"""Documents packed end to end: where the document of each token begins and ends.

`cu_seqlens` (documents + 1,) int32 holds the offsets at which documents start, and the total at its end; document d owns
tokens cu_seqlens[d] to cu_seqlens[d + 1]. A document may be empty anywhere, so a vector of fixed size is padded at its tail
with the total. Nothing here waits for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_bounds(cu_seqlens: Tensor, total: int, row_length: int | None = None) -> tuple[Tensor, Tensor]:
    """Index of the first token of each token's document, and one past that of its last.

    cu_seqlens  (documents + 1,) int32, as above
    total       tokens in all
    row_length  tokens in a row of a (B, T) batch: a document that crosses the end of a row is cut there. None: one row.

    Returns (start, end), each (total,) int32 on cu_seqlens' device; start <= token < end.
    """
    token = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
    # Offsets at or before the token: of empty documents at one place the last one counts, and padding never does.
    following = torch.searchsorted(cu_seqlens, token, right=True)
    start, end = cu_seqlens[following - 1], cu_seqlens[following]
    if row_length is None:
        return start, end
    row = token - token % max(row_length, 1)
    return torch.maximum(start, row), torch.minimum(end, row + row_length)


def check_cu_seqlens(op: str, cu_seqlens: Tensor, total: int, device: torch.device) -> None:
    """Raise ValueError unless cu_seqlens packs `total` tokens on `device`; `op` opens the message.

    The values are checked on a CPU only: on a GPU reading them would make the host wait. There, offsets that do not start
    at 0, decrease or do not end at the total are the caller's mistake, and what is computed is undefined.
    """
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; pass the documents' offsets, "
            f"shape (documents + 1,), torch.int32"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"{op}: cu_seqlens is on {cu_seqlens.device} and the tokens on {device}; put them on one device")
    if not are_values_known(cu_seqlens):
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != total or (cu_seqlens.diff() < 0).any():
        raise ValueError(
            f"{op}: cu_seqlens is {_shortened(cu_seqlens)}; it must start at 0, never decrease and end at {total}, the number "
            f"of tokens"
        )


def are_values_known(t: Tensor) -> bool:
    """True if the values of t can be read at once: it lies on a CPU and is no tensor of a trace."""
    return not torch.compiler.is_compiling() and type(t) is Tensor and t.device.type == "cpu"


def _shortened(t: Tensor) -> str:
    values = t.tolist()
    return str(values) if len(values) <= 12 else f"{str(values[:6])[:-1]}, ..., {str(values[-6:])[1:]} ({len(values)} values)"
