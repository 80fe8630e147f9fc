"""The step loop: one path for one prompt or many, for a notebook or a server.

Each step advances every running sequence: a prompt by a chunk, a finished prompt by the token just drawn and, where guesses were
confirmed, by several. The scheduler says which tokens run in which blocks; here they become tensors, and draws become text.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Iterator, Sequence as Several

import torch
from psann_kernels import explain
from torch import Tensor

from ..cuda_graphs import CUDACapture
from . import graphs
from .cache import PagedCache, bytes_per_token
from .decoder import Decoder, decoder_for
from .memory import SHARE, available_bytes
from .options import EngineOptions
from .sampling import SamplingBatch, SamplingParams, next_tokens
from .scheduler import Scheduler, Sequence, Work
from .seen import SeenTokens
from .speculation import Lookup
from .text import TextStream

BLOCK_SIZE = 16
MAX_ROWS = 64
# The cache grows as it is used; beyond this, requests wait for each other's blocks unless one of them alone needs more.
MAX_CACHED_TOKENS = 1 << 15
# Prompt tokens of one step beside the running rows' single ones: enough to fill the machine, small enough that attention's
# scores of a chunk stay small.
CHUNK = 512


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log probability under the model (before penalty, temperature and filters), and the likeliest ones there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Request:
    """One text in the making.

    tokens           the prompt, then the output too
    logprobs         how many of the likeliest tokens to report beside each drawn one; None: no log probabilities
    prompt_logprobs  also report each prompt token but the first; such a prompt is computed whole

    finish_reason    "eos", "stop", "length" or "cancelled", once it has ended
    """

    index: int
    tokens: list[int]
    params: SamplingParams
    text: TextStream
    logprobs: int | None = None
    prompt_logprobs: bool = False
    prompt_length: int = 0
    finish_reason: str | None = None
    drawn_logprobs: list[TokenLogprob] = field(default_factory=list)
    given_logprobs: list[TokenLogprob] = field(default_factory=list)
    sequence: Sequence | None = None
    lookup: Lookup | None = None

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def longest(self) -> int:
        """Tokens that the cache must hold at most: the last token drawn is never fed back."""
        return self.prompt_length + self.params.max_new_tokens - 1

    @property
    def has_penalty(self) -> bool:
        return (self.params.repetition_penalty or 1.0) != 1.0


class Engine:
    """Requests in, text out, a step at a time.

    module        a model of psann_fast.models, in eval mode
    eos_id        the id that ends a text
    vocab_size    ids of the tokenizer; a model may have more rows, which are not drawn
    cache_tokens  tokens that the cache may hold at most
    max_rows      requests that run at once; default MAX_ROWS
    chunk         prompt tokens of a step; default CHUNK
    block_size    tokens of a block; default BLOCK_SIZE
    options       EngineOptions

    Not for several threads at once; AsyncEngine is. Raises ValueError for options that the model's device cannot serve.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        eos_id: int,
        vocab_size: int,
        *,
        cache_tokens: int,
        max_rows: int | None = None,
        chunk: int | None = None,
        block_size: int | None = None,
        options: EngineOptions = EngineOptions(),
    ) -> None:
        self.module, self.eos_id, self.vocab_size, self.options = module, eos_id, vocab_size, options
        rows = MAX_ROWS if max_rows is None else max_rows
        size = BLOCK_SIZE if block_size is None else block_size
        num_blocks = -(-cache_tokens // size)
        self.scheduler = Scheduler(num_blocks, size, rows, CHUNK if chunk is None else chunk)
        self.cache = PagedCache(module, num_blocks, size, rows)
        self.device = module.embed.weight.device
        self.decoder: Decoder = decoder_for(module, options.weights)
        self.counts: Counter[str] = Counter()  # steps; tokens computed, drawn, guessed, confirmed
        self._request_of: dict[Sequence, Request] = {}
        self._seen: SeenTokens | None = None
        self._drawing: list[Request] = []
        self._batch: SamplingBatch | None = None
        self._graphs = self._made_graphs()

    def _made_graphs(self) -> graphs.DecodeGraphs | None:
        wanted, scheduler = self.options.cuda_graphs, self.scheduler
        self._why_no_graphs = "cuda_graphs is False" if wanted is False else graphs.refuses(self.module, scheduler.block_size)
        if self._why_no_graphs is not None:
            if wanted is True:
                raise ValueError(f"cuda_graphs is True, and {self._why_no_graphs}; leave cuda_graphs out")
            return None
        self.cache.hold_all()  # a graph is of the memory that it was captured over
        return graphs.DecodeGraphs(
            self.module, self.decoder, self.cache, self._seen_tokens, self.vocab_size, scheduler.max_rows,
            CUDACapture(self.device), is_needed=wanted is True,
        )  # fmt: skip

    def explain(self) -> list[dict[str, str]]:
        """As psann_kernels.explain of the model, and a row "decode_step": whether CUDA graphs run it, and why."""
        made = self._graphs
        if made is None or made.reason is not None:
            backend, reason = "eager", self._why_no_graphs if made is None else made.reason
        else:
            backend = "cuda_graphs"
            reason = f"{made.captures} captured, each compared with the step that it is of; {made.replays} steps taken with them"
        return [*explain(self.module), {"op": "decode_step", "backend": backend, "serves": "yes", "reason": reason}]

    @property
    def has_work(self) -> bool:
        return bool(self._request_of)

    def check(self, request: Request) -> None:
        """Raise ValueError for an id that the model does not know, no seed, or a request that can never fit. Changes nothing."""
        check_ids(request.tokens, self.module.config.vocab_size)
        if request.params.seed is None:
            raise ValueError("seed is None; the engine draws nothing at random, so give every request a whole number below 2^63")
        if request.longest > self.scheduler.capacity:
            raise ValueError(too_long(request, self.scheduler.capacity, "the cache holds"))

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError as check does."""
        self.check(request)
        request.sequence = Sequence(request.tokens, request.longest, shares=not request.prompt_logprobs)
        self.scheduler.add(request.sequence)
        if self.options.speculate and not request.has_penalty:
            request.lookup = Lookup()
        self._request_of[request.sequence] = request
        if self._graphs is not None:
            self._graphs.note_request()

    def cancel(self, request: Request) -> None:
        """End a request between two steps; its blocks are free at once. One that has ended stays as it is."""
        if request.sequence in self._request_of:
            self.scheduler.cancel(request.sequence)
            del self._request_of[request.sequence]
            request.finish_reason = "cancelled"

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, str]]:
        """Advance every running request; returns (request, text that became certain), finish_reason set with the last piece."""
        if self.options.speculate:
            self._guess()
        plan = self.scheduler.plan()
        if not plan.work:
            return []
        self.counts["steps"] += 1
        self.cache.copy(plan.copies)
        if self._graphs is not None and self._graphs.serves(plan.work):
            self.counts["computed_tokens"] += len(plan.work)
            return self._take(plan.work, *self._draw_by_graph(plan.work))
        ids, rows, drawing = [], [], []
        for work in plan.work:
            s = work.sequence
            stop = work.end - work.drafted
            ids += s.tokens[work.begin : stop]
            ids += s.drafts[: work.drafted]
            if stop == len(s.tokens):
                rows += range(len(ids) - 1 - work.drafted, len(ids))
                drawing += [self._request_of[s]] * (1 + work.drafted)
        hidden = self.decoder.hidden(torch.tensor(ids, device=self.device), self.cache.view(plan.work))
        self._report_prompts(plan.work, hidden)
        self.counts["computed_tokens"] += len(ids)
        drawn, reports = self._draw(hidden, rows, drawing, plan.work) if rows else ([], {})
        return self._take(plan.work, drawn, reports)

    # -- parts of a step ----------------------------------------------------------------------------------------------------

    def _guess(self) -> None:
        for sequence in self.scheduler.running:
            request = self._request_of[sequence]
            room = min(self.options.speculate, sequence.longest - len(sequence.tokens))
            if request.lookup is not None and room > 0:
                sequence.drafts = request.lookup.guess(sequence.tokens, room)

    def _draw(
        self, hidden: Tensor, rows: list[int], drawing: list[Request], works: list[Work]
    ) -> tuple[list[int], dict[int, TokenLogprob]]:
        """The token that each of `rows` of hidden draws for the request beside it, and the log probabilities that are wanted."""
        if len(rows) < len(hidden):
            hidden = hidden[torch.tensor(rows, device=self.device)]
        logits = self.decoder.logits(hidden)[:, : self.vocab_size]
        if drawing != self._drawing:
            self._drawing = drawing
            self._batch = SamplingBatch.of([r.params for r in drawing], self.vocab_size, self.device)
        batch = self._batch
        # The position that a drawn token will have is the number of tokens before it.
        places = [w.end - w.drafted + i for w in works if w.end - w.drafted == len(w.sequence.tokens) for i in range(1 + w.drafted)]
        positions = None if batch.is_greedy else torch.tensor(places, device=self.device)
        seen = self._seen_by(drawing) if batch.has_penalty else None
        tokens = next_tokens(logits, batch, positions, seen).tolist()
        return tokens, self._reports(logits, tokens, drawing)

    def _draw_by_graph(self, works: list[Work]) -> tuple[list[int], dict[int, TokenLogprob]]:
        """As _draw, of works that each add the newest token of a text."""
        drawing = [self._request_of[work.sequence] for work in works]
        tokens, logits = self._graphs.run(works, drawing)
        return tokens, self._reports(logits, tokens, drawing)

    def _reports(self, logits: Tensor, tokens: list[int], drawing: list[Request]) -> dict[int, TokenLogprob]:
        """Row -> log probabilities, of the rows that want them."""
        wanting = [i for i, request in enumerate(drawing) if request.logprobs is not None]
        if not wanting:
            return {}
        wanted = max(drawing[i].logprobs for i in wanting)
        return dict(zip(wanting, token_logprobs(logits[wanting], [tokens[i] for i in wanting], wanted)))

    def _seen_tokens(self) -> SeenTokens:
        if self._seen is None:
            self._seen = SeenTokens(self.scheduler.max_rows, self.module.config.vocab_size, self.device)
        return self._seen

    def _seen_by(self, drawing: list[Request]) -> Tensor:
        """(B, V) bool: tokens in each request's prompt or output."""
        seen = self._seen_tokens()
        seen.refresh(drawing)
        rows = torch.tensor([request.sequence.row for request in drawing], device=self.device)
        newest = torch.tensor([request.tokens[-1] for request in drawing], device=self.device)
        return seen.of(rows, newest)[:, : self.vocab_size]

    def _report_prompts(self, works: list[Work], hidden: Tensor) -> None:
        """Log probabilities of prompt tokens: the row of token t predicts token t + 1."""
        offset = 0
        for work in works:
            request = self._request_of[work.sequence]
            first, last = work.begin + 1, min(work.end, request.prompt_length - 1)  # predicted tokens, `last` included
            known = len(request.given_logprobs) + 1  # after a preemption some are there already
            first = max(first, known)
            if request.prompt_logprobs and first <= last:
                logits = self.decoder.logits(hidden[offset + first - 1 - work.begin : offset + last - work.begin])[
                    :, : self.vocab_size
                ]
                request.given_logprobs += token_logprobs(logits, request.tokens[first : last + 1], request.logprobs or 0)
            offset += work.end - work.begin

    def _take(self, works: list[Work], drawn: list[int], reports: dict[int, TokenLogprob]) -> list[tuple[Request, str]]:
        """Give the draws to their requests, and text to whoever waits for it."""
        events = []
        at = 0
        for work in works:
            sequence, request = work.sequence, self._request_of[work.sequence]
            if work.end - work.drafted < len(sequence.tokens):
                self.scheduler.commit(work, work.end - work.begin, [])
                continue
            # Draw i is what the text alone would have drawn if all guesses before it were right.
            confirmed = 0
            while confirmed < work.drafted and drawn[at + confirmed] == sequence.drafts[confirmed]:
                confirmed += 1
            piece, kept = self._write(request, drawn[at : at + confirmed + 1])
            if request.logprobs is not None:
                own = [reports[at + i] for i in range(len(kept))]
                request.drawn_logprobs += [TokenLogprob(r.token, r.logprob, r.top[: request.logprobs]) for r in own]
            at += 1 + work.drafted
            sequence.drafts = []
            self.scheduler.commit(work, work.end - work.begin - work.drafted + len(kept) - 1, kept)
            self.counts["guessed_tokens"] += work.drafted
            self.counts["confirmed_tokens"] += confirmed
            self.counts["drawn_tokens"] += len(kept)
            if request.finish_reason is not None:
                piece += request.text.finish()
                self.scheduler.finish(sequence)
                del self._request_of[sequence]
            if piece or request.finish_reason is not None:
                events.append((request, piece))
        return events

    def _write(self, request: Request, tokens: list[int]) -> tuple[str, list[int]]:
        """Text of the drawn tokens, and those of them that count: none follows the one that ends the text."""
        piece = ""
        room = request.params.max_new_tokens - (len(request.tokens) - request.prompt_length)
        for count, token in enumerate(tokens, start=1):
            if token == self.eos_id:
                request.finish_reason = "eos"
            else:
                piece += request.text.push(token)
                if request.text.is_stopped:
                    request.finish_reason = "stop"
                elif count == room:
                    request.finish_reason = "length"
            if request.finish_reason is not None:
                return piece, tokens[:count]
        return piece, tokens


def check_ids(tokens: Several[int], vocab_size: int) -> None:
    """Raise ValueError for an id that is no row of the model's embedding."""
    for worst in (min(tokens), max(tokens)):
        if not 0 <= worst < vocab_size:
            raise ValueError(
                f"the prompt holds token id {worst}, but the model's vocab_size is {vocab_size}: ids are 0 to {vocab_size - 1}; "
                "use the tokenizer that the model was trained with"
            )


def too_long(request: Request, tokens: int, where: str) -> str:
    """What to say of a request that needs more than `tokens` of cache."""
    room = tokens - request.prompt_length + 1
    remedy = f"pass max_new_tokens of at most {room}" if room > 0 else f"shorten the prompt to less than {tokens + 1} tokens"
    return (
        f"max_new_tokens is {request.params.max_new_tokens} after a prompt of {request.prompt_length} tokens: that needs a cache "
        f"of {request.longest} tokens, and {where} {max(tokens, 0)}; {remedy}"
    )


def token_logprobs(logits: Tensor, tokens: list[int], count: int) -> list[TokenLogprob]:
    """For each row of logits (B, V) its token's log probability and the `count` likeliest, ties in the order of their ids."""
    logprobs = logits.to(torch.float64).log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    if not count:
        return [TokenLogprob(token, value, ()) for token, value in zip(tokens, chosen)]
    values, ids = (t[:, :count].tolist() for t in logprobs.sort(dim=-1, descending=True, stable=True))
    return [TokenLogprob(t, value, tuple(zip(i, v))) for t, value, i, v in zip(tokens, chosen, ids, values)]


def tokens_that_fit(module: torch.nn.Module) -> int:
    """Tokens of cache for which the device of `module` has memory now."""
    return int(available_bytes(module.embed.weight.device) * SHARE) // bytes_per_token(module) // BLOCK_SIZE * BLOCK_SIZE


def run(
    module: torch.nn.Module, requests: Several[Request], eos_id: int, vocab_size: int, options: EngineOptions = EngineOptions()
) -> Iterator[tuple[Request, str]]:
    """Advance all requests to their ends; yields (request, new text) as text becomes certain.

    finish_reason is set with the last piece. Raises ValueError, at once, for a request that does not fit into memory,
    or an id that the model does not know.
    """
    if not requests:
        return iter(())
    capacity = tokens_that_fit(module)
    longest = max(requests, key=lambda request: request.longest)
    if longest.longest > capacity:
        raise ValueError(too_long(longest, capacity, "memory has room for"))
    wanted = sum(-(-request.longest // BLOCK_SIZE) * BLOCK_SIZE for request in requests)
    tokens = max(longest.longest, min(wanted, MAX_CACHED_TOKENS, capacity))
    rows = min(MAX_ROWS, len(requests))
    engine = Engine(module, eos_id, vocab_size, cache_tokens=tokens, max_rows=rows, options=options)
    for request in requests:
        engine.add(request)
    return _steps(engine)


def _steps(engine: Engine) -> Iterator[tuple[Request, str]]:
    while engine.has_work:
        yield from engine.step()
