"""The step loop: one path for one prompt or many.

Each step advances every running sequence: a prompt by a chunk, a finished prompt by the token just drawn. A request is admitted
when the blocks of its longest possible text are free, and gives them back when it ends, so nothing is ever preempted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Iterator, Sequence

import torch

from .cache import PagedCache
from .sampling import SamplingBatch, SamplingParams, next_tokens
from .text import TextStream

BLOCK_SIZE = 16
MAX_ROWS = 64
MAX_CACHED_TOKENS = 1 << 15
# Prompt tokens of one step beside the running rows' single ones: enough to fill the machine, small enough that attention's
# scores of a chunk stay small.
CHUNK = 512


@dataclass(eq=False)
class Request:
    """One text in the making. tokens: prompt and output; cached: how many of them the cache holds."""

    index: int
    tokens: list[int]
    params: SamplingParams
    text: TextStream
    prompt_length: int = 0
    cached: int = 0
    row: int = -1
    blocks: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def longest(self) -> int:
        """Tokens that the cache must hold at most: the last token drawn is never fed back."""
        return self.prompt_length + self.params.max_new_tokens - 1

    @property
    def blocks_needed(self) -> int:
        return -(-self.longest // BLOCK_SIZE)


@torch.inference_mode()
def run(module: torch.nn.Module, requests: Sequence[Request], eos_id: int, vocab_size: int) -> Iterator[tuple[Request, str]]:
    """Advance all requests to their ends; yields (request, new text) as text becomes certain, finish_reason set with the last piece.

    finish_reason is "eos", "stop" or "length".

    vocab_size  ids of the tokenizer; a model may have more rows, which are not drawn
    """
    if not requests:
        return
    longest = max(request.blocks_needed for request in requests)
    wanted = sum(request.blocks_needed for request in requests)
    num_blocks = max(longest, min(wanted, MAX_CACHED_TOKENS // BLOCK_SIZE))
    rows = min(MAX_ROWS, len(requests))
    cache = PagedCache(module, num_blocks, BLOCK_SIZE, longest, rows)
    waiting, running, free_rows = deque(requests), [], list(range(rows))
    device = module.embed.weight.device
    seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)
    batch: SamplingBatch | None = None
    drawing: list[Request] = []
    while waiting or running:
        while waiting and free_rows and cache.pool.free >= waiting[0].blocks_needed:
            request = waiting.popleft()
            request.row, request.blocks = free_rows.pop(), cache.pool.take(request.blocks_needed)
            cache.begin(request.row, request.blocks)
            seen[request.row] = False
            seen[request.row, request.tokens] = True
            running.append(request)

        begins, ends = [request.cached for request in running], []
        budget = CHUNK
        for request in running:
            left = len(request.tokens) - request.cached
            taken = left if left == 1 else min(left, max(budget, 1))
            budget -= taken if left > 1 else 0
            ends.append(request.cached + taken)
        ids = [t for request, a, b in zip(running, begins, ends) for t in request.tokens[a:b]]
        view = cache.view([request.row for request in running], begins, ends)
        hidden = module.decode(torch.tensor(ids, device=device), view)
        for request, end in zip(running, ends):
            request.cached = end
        ready = [i for i, request in enumerate(running) if request.cached == len(request.tokens)]
        if not ready:
            continue

        if drawing != [running[i] for i in ready]:
            drawing = [running[i] for i in ready]
            batch = SamplingBatch.of([r.params for r in drawing], vocab_size, device)
        last = view.cu_seqlens[1:].to(torch.int64) - 1
        if len(ready) < len(running):
            last = last[torch.tensor(ready, device=device)]
        row_index = torch.tensor([r.row for r in drawing], device=device)
        positions = torch.tensor([r.cached for r in drawing], device=device)
        drawn = next_tokens(module.lm_head(hidden[last])[:, :vocab_size], batch, positions, seen[row_index] if batch.has_penalty else None)
        if batch.has_penalty:
            seen[row_index, drawn] = True

        for request, token in zip(drawing, drawn.tolist()):
            piece = ""
            request.tokens.append(token)
            if token == eos_id:
                request.finish_reason = "eos"
            else:
                piece = request.text.push(token)
                if request.text.is_stopped:
                    request.finish_reason = "stop"
                elif len(request.tokens) - request.prompt_length == request.params.max_new_tokens:
                    request.finish_reason = "length"
            if request.finish_reason is not None:
                piece += request.text.finish()
                running.remove(request)
                free_rows.append(request.row)
                cache.pool.give_back(request.blocks)
            if piece or request.finish_reason is not None:
                yield request, piece
