"""Decode steps as CUDA graphs: a step of many small launches becomes one, which matters where it takes well under a millisecond.

What is captured is `decode_step`, the function that also runs when nothing is captured, on buffers that stay where they are. A
graph serves a number of sequences (padded up to 1, 2, 4 or a multiple of 8), a number of blocks each (a power of two) and a kind of
draw (greedy or not, with or without a repetition penalty). It is captured when such a step has come EAGER_STEPS times, and again
when the cache or the weights lie elsewhere. Steps that compute prompts, or check guesses, are not captured.

The capture itself has not run on a device yet. Everything else has: the tests put in its place a recording of the step's
operations, which is run again on the same memory with all Python values as they were.
"""

from __future__ import annotations

import logging
from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING, Callable, NamedTuple, Sequence

import torch
from psann_kernels import explain
from torch import Tensor

from ..cuda_graphs import CaptureError
from ..models import CacheView
from .cache import PagedCache
from .decoder import Decoder
from .sampling import next_tokens
from .scheduler import Work
from .seen import SeenTokens
from .step_buffers import StepBuffers

if TYPE_CHECKING:
    from .engine import Request

Key = tuple[int, int, bool, bool]  # rows, blocks, is_greedy, has_penalty
_LOG = logging.getLogger("psann_fast")

# A capture costs about as much as so many steps without one.
EAGER_STEPS = 2
LEAST_WIDTH = 32
# Roundings of the largest logit that may lie between a graph's logits and those of the same step without it: the same kernels on
# the same numbers, but a library may choose another workspace while a graph is captured.
ROUNDINGS = 16


def refuses(module: torch.nn.Module, block_size: int) -> str | None:
    """Why decode steps of this model cannot be captured, or None."""
    device = module.embed.weight.device
    if device.type != "cuda":
        return f"the model is on {device}, and graphs are CUDA's"
    if block_size < 2:
        return f"block_size is {block_size}, which leaves padding no slot to write to; take 2 or more"
    for row in explain(module):
        if row["op"] in ("paged_append", "paged_attention") and row["backend"] == "torch":
            return f"{row['op']} runs as plain torch, which reads lengths on the host ({row['reason']})"
    return None


def decode_step(
    decoder: Decoder, view: CacheView, buffers: StepBuffers, seen: SeenTokens | None, is_greedy: bool, has_penalty: bool
) -> None:
    """One token for each row of the buffers: their inputs to their outputs. Running it twice changes nothing."""
    logits = decoder.logits(decoder.hidden(buffers.ids, view))[:, : buffers.vocab_size]
    tokens = seen.of(buffers.seen_rows, buffers.ids)[:, : buffers.vocab_size] if has_penalty else None
    # The position that a drawn token will have is one past the newest one's.
    drawn = next_tokens(logits, buffers.batch(is_greedy, has_penalty), buffers.positions + 1, tokens)
    buffers.logits.copy_(logits)
    buffers.drawn.copy_(drawn)


class _Size(NamedTuple):
    """Buffers of so many rows and blocks, and the cache as it is now under them."""

    buffers: StepBuffers
    view: CacheView
    moves: int  # PagedCache.moves when the view was made


class DecodeGraphs:
    """Runs the decode steps of one engine.

    capture    CUDACapture, or what stands in for it
    is_needed  whether a step that cannot be captured is an error; otherwise it runs without a graph, and `reason` says why
    """

    def __init__(
        self, module: torch.nn.Module, decoder: Decoder, cache: PagedCache, seen: Callable[[], SeenTokens], vocab_size: int,
        max_rows: int, capture: Callable[[Callable[[], None]], Callable[[], None]], is_needed: bool,
    ) -> None:  # fmt: skip
        self._module, self._decoder, self._cache, self._seen = module, decoder, cache, seen
        self._vocab_size, self._max_rows, self._capture, self._is_needed = vocab_size, max_rows, capture, is_needed
        self._sizes: dict[tuple[int, int], _Size] = {}
        self._replay_of: dict[Key, Callable[[], None]] = {}
        self._met: Counter[Key] = Counter()
        self._weights: tuple[Tensor, ...] = ()
        self._is_new = True
        self.captures = self.replays = 0
        self.reason: str | None = None  # why nothing is captured any more

    def serves(self, work: Sequence[Work]) -> bool:
        """Whether each of these adds just the newest token of its text."""
        return all(w.end - w.begin == 1 and w.end == len(w.sequence.tokens) for w in work)

    def note_request(self) -> None:
        """Call when a request arrives: the next step looks whether the weights were replaced since the last one arrived."""
        self._is_new = True

    def run(self, work: Sequence[Work], requests: Sequence[Request]) -> tuple[list[int], Tensor]:
        """The tokens drawn, and the logits (requests, vocab_size), which stay until the next step. work[i] is of requests[i].

        Raises CaptureError for a step that cannot be captured, if it must be.
        """
        if self._is_new:
            self._look_at_weights()
        placed = self._cache.place(work)
        size = self._size(padded_rows(len(work), self._max_rows), padded_width(placed.table.shape[1]))
        buffers, view, _ = size
        buffers.fill(placed, requests)
        is_greedy, has_penalty = buffers.kind
        seen = self._seen() if has_penalty else None
        if seen is not None:
            seen.refresh(requests)
        key = (buffers.rows, buffers.width, is_greedy, has_penalty)
        replay = self._replay_of.get(key)
        if replay is not None:
            buffers.send()
            replay()
            self.replays += 1
        else:
            step = lambda: decode_step(self._decoder, view, buffers, seen, is_greedy, has_penalty)  # noqa: E731 (two uses)
            self._met[key] += 1
            if self.reason is None and self._met[key] > EAGER_STEPS:
                self._try_to_capture(key, step, buffers, lambda: buffers.fill(placed, requests), len(work))
            else:
                buffers.send()
                step()
        return buffers.drawn[: len(work)].tolist(), buffers.logits[: len(work)]

    def _look_at_weights(self) -> None:
        self._is_new = False
        weights = tuple(chain(self._module.parameters(), self._module.buffers()))
        if [t.data_ptr() for t in weights] != [t.data_ptr() for t in self._weights]:
            # Held, so that no graph ever reads memory that went to somebody else.
            self._weights = tuple(t.detach() for t in weights)
            self._sizes.clear()
            self._replay_of.clear()

    def _size(self, rows: int, width: int) -> _Size:
        held = self._sizes.get((rows, width))
        if held is not None and held.moves == self._cache.moves:
            return held
        if held is None:
            buffers = StepBuffers(self._cache, rows, width, self._vocab_size, self._max_rows, self._module.embed.weight.dtype)
        else:
            buffers = held.buffers
            self._replay_of = {key: replay for key, replay in self._replay_of.items() if key[:2] != (rows, width)}
        view = self._cache.view_over(
            block_table=buffers.table,
            seq_lens=buffers.seq_lens,
            cu_seqlens=buffers.cu_seqlens,
            positions=buffers.positions,
            slot_mapping=buffers.slots,
            past=buffers.past,
            tokens=width * self._cache.block_size,
        )
        made = self._sizes[rows, width] = _Size(buffers, view, self._cache.moves)
        return made

    def _try_to_capture(
        self, key: Key, step: Callable[[], None], buffers: StepBuffers, fill: Callable[[], None], rows: int
    ) -> None:
        """Capture the step over padding, then take it with the graph and without, and keep the graph if that is the same."""
        buffers.clear()
        buffers.send()
        replay = None
        try:
            replay = self._capture(step)
        except CaptureError as error:
            self._give_up(str(error), error)
        fill()
        buffers.send()
        step()
        if replay is None:
            return
        expected = buffers.drawn[:rows].clone(), buffers.logits[:rows].clone()
        replay()
        wrong = difference(expected, (buffers.drawn[:rows], buffers.logits[:rows]))
        if wrong is not None:
            buffers.drawn[:rows], buffers.logits[:rows] = expected
            self._give_up(f"a graph of {key[0]} rows and {key[1]} blocks gave other results than the step that it is of: {wrong}")
            return
        self._replay_of[key] = replay
        self.captures += 1

    def _give_up(self, reason: str, cause: CaptureError | None = None) -> None:
        self._replay_of.clear()
        self.reason = reason
        if self._is_needed:
            raise CaptureError(f"cuda_graphs is True, and {reason}; leave cuda_graphs out") from cause
        _LOG.warning("decode steps run without CUDA graphs: %s", reason)


def difference(expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> str | None:
    """What is wrong with the (tokens, logits) of a replayed step, or None: logits that differ by more than rounding, or tokens that
    do though no logit does."""
    (tokens, logits), (got_tokens, got_logits) = expected, found
    scale = logits.abs().max()
    error = (got_logits.double() - logits.double()).abs().max()
    if not bool(error <= ROUNDINGS * torch.finfo(logits.dtype).eps * scale):
        return f"logits differ by {error.item():.3g} beside a largest one of {scale.item():.3g}"
    if error == 0 and not torch.equal(tokens, got_tokens):
        return f"tokens {got_tokens.tolist()} where {tokens.tolist()} are right, from equal logits"
    return None


def padded_rows(rows: int, most: int) -> int:
    """1, 2, 4 or a multiple of 8, and `most` at the most."""
    return min(most, 1 << (rows - 1).bit_length() if rows <= 4 else -(-rows // 8) * 8)


def padded_width(blocks: int) -> int:
    """A power of two, so that a growing text meets few of them."""
    return max(LEAST_WIDTH, 1 << (blocks - 1).bit_length())
