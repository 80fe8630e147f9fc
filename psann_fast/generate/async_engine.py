"""The engine for an event loop: its step loop runs in a thread, requests come and go between two steps."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import deque
from dataclasses import dataclass
from typing import AsyncIterator, Sequence

from .engine import Engine, Request


class QueueFull(RuntimeError):
    """As many requests wait as may; later there is room again."""


class EngineClosed(RuntimeError):
    """The engine takes no more requests: it is closing, or a step failed."""


@dataclass(frozen=True)
class Piece:
    """Text of `request` that became certain. drawn: tokens drawn so far. The last piece has a finish_reason."""

    request: Request
    text: str
    drawn: int
    finish_reason: str | None


class Stream:
    """The pieces of one or several requests, in the order in which they come; ends with the last request. Leaving early cancels."""

    def __init__(self, owner: AsyncEngine, requests: Sequence[Request]) -> None:
        self._owner, self.requests = owner, list(requests)
        self._arrived: asyncio.Queue[Piece | EngineClosed] = asyncio.Queue()
        self._open = len(self.requests)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        try:
            while self._open:
                piece = await self._arrived.get()
                if isinstance(piece, EngineClosed):
                    self._open = 0
                    raise piece
                self._open -= piece.finish_reason is not None
                yield piece
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End what has not ended; the blocks are free after the step at hand."""
        if self._open:
            self._open = 0
            self._owner._post("cancel", self)


class AsyncEngine:
    """Serves requests of an event loop by one Engine.

    engine       nobody else may use it meanwhile
    max_waiting  requests that may wait besides the running ones

    Use inside a running loop: `async with AsyncEngine(engine, 100) as serving: async for piece in serving.submit([request])`.
    """

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self.engine, self.max_waiting = engine, max_waiting
        self.outstanding = 0  # requests that were submitted and have not ended
        self.failure: BaseException | None = None
        self._is_closing = False
        self._inbox: deque[tuple[str, Stream | None]] = deque()
        self._wake = threading.Condition()
        self._stream_of: dict[Request, Stream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._work, name="psann-fast engine", daemon=True)

    async def __aenter__(self) -> AsyncEngine:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Queue requests that belong together.

        Raises ValueError as Engine.check, or for more requests than may ever run and wait at once; QueueFull; EngineClosed.
        """
        if self.failure is not None:
            raise EngineClosed(f"a step failed: {self.failure}") from self.failure
        if self._is_closing:
            raise EngineClosed("the engine is closing")
        for request in requests:
            self.engine.check(request)
        most = self.engine.scheduler.max_rows + self.max_waiting
        if len(requests) > most:
            raise ValueError(f"{len(requests)} texts are asked for at once, and at most {most} run or wait here; ask for fewer")
        if self.outstanding + len(requests) > most:
            raise QueueFull(
                f"{self.outstanding} requests run or wait, and {len(requests)} more exceed the {most} that may; try later"
            )
        self.outstanding += len(requests)
        self._idle.clear()
        stream = Stream(self, requests)
        self._post("add", stream)
        return stream

    async def close(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests; give those that run `drain_seconds` to end, then cancel them and stop the thread."""
        self._is_closing = True
        if drain_seconds > 0 and self.failure is None:
            waiting = asyncio.ensure_future(self._idle.wait())
            await asyncio.wait([waiting], timeout=drain_seconds)
            waiting.cancel()
        self._post("stop", None)
        await asyncio.to_thread(self._thread.join)

    # -- the engine's thread ------------------------------------------------------------------------------------------------

    def _post(self, what: str, stream: Stream | None) -> None:
        with self._wake:
            self._inbox.append((what, stream))
            self._wake.notify()

    def _work(self) -> None:
        try:
            while self._take_in():
                if self.engine.has_work:
                    pieces = [
                        Piece(request, text, len(request.tokens) - request.prompt_length, request.finish_reason)
                        for request, text in self.engine.step()
                    ]
                    self._deliver(pieces)
        finally:
            # A failure goes on to threading.excepthook, which prints it; those who wait for pieces must hear of it too.
            self.failure = sys.exc_info()[1]
            why = "the engine was closed" if self.failure is None else f"a step failed: {self.failure}"
            self._loop.call_soon_threadsafe(self._end_all, why)

    def _take_in(self) -> bool:
        """Apply what was posted; waits where there is nothing to do. False: stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._inbox or self.engine.has_work)
            posted = list(self._inbox)
            self._inbox.clear()
        for what, stream in posted:
            if what == "stop":
                return False
            if what == "add":
                for request in stream.requests:
                    self._stream_of[request] = stream
                    self.engine.add(request)
            else:
                ended = [request for request in stream.requests if self._stream_of.pop(request, None) is not None]
                for request in ended:
                    self.engine.cancel(request)
                self._loop.call_soon_threadsafe(self._count_ended, len(ended))
        return True

    def _deliver(self, pieces: list[Piece]) -> None:
        addressed = [(self._stream_of[piece.request], piece) for piece in pieces]
        for piece in pieces:
            if piece.finish_reason is not None:
                del self._stream_of[piece.request]
        if addressed:
            self._loop.call_soon_threadsafe(self._hand_over, addressed)

    # -- back in the event loop ---------------------------------------------------------------------------------------------

    def _hand_over(self, addressed: list[tuple[Stream, Piece]]) -> None:
        for stream, piece in addressed:
            stream._arrived.put_nowait(piece)
        self._count_ended(sum(piece.finish_reason is not None for _, piece in addressed))

    def _count_ended(self, count: int) -> None:
        self.outstanding -= count
        if self.outstanding == 0:
            self._idle.set()

    def _end_all(self, why: str) -> None:
        with self._wake:
            posted = [stream for what, stream in self._inbox if what == "add"]
        for stream in {*self._stream_of.values(), *posted}:
            stream._arrived.put_nowait(EngineClosed(why))
        self._stream_of.clear()
        self.outstanding = 0
        self._idle.set()
