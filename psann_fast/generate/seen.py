"""Which tokens stand in each running request's text, for the repetition penalty: one row of a table on the device for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .engine import Request


class SeenTokens:
    """Kept from step to step, made anew where a row changed hands.

    rows        requests that run at once
    vocabulary  token ids of the model
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        # The last row belongs to nobody: rows that only pad a step mark there.
        self.table = torch.zeros(rows + 1, vocabulary, dtype=torch.bool, device=device)
        self.nobody = rows
        self._yes = torch.ones((), dtype=torch.bool, device=device)
        self._owners: list[tuple[Request | None, int]] = [(None, 0)] * rows

    def refresh(self, requests: Sequence[Request]) -> None:
        """Fill the rows of requests that took theirs since the last call, with all of their tokens."""
        for request in requests:
            row = request.sequence.row
            owner = request, request.sequence.preemptions
            if self._owners[row] != owner:
                self._owners[row] = owner
                self.table[row] = False
                self.table[row, torch.tensor(request.tokens, device=self.table.device)] = True

    def of(self, rows: Tensor, newest: Tensor) -> Tensor:
        """(B, vocabulary) bool: tokens in the texts of these rows (B,), to which their newest tokens (B,) are added first."""
        self.table.index_put_((rows, newest), self._yes)
        return self.table.index_select(0, rows)
