"""SIGINT and SIGTERM during training: the run is kept at its last finished step, and a second signal ends the process at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType
from typing import Any, Iterator


class Interrupted(BaseException):
    """A signal asked training to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    def as_exit(self) -> BaseException:
        """What ends the process as its caller expects: KeyboardInterrupt for SIGINT (exit status 130), else SystemExit(143)."""
        return KeyboardInterrupt() if self.signum == signal.SIGINT else SystemExit(128 + self.signum)


class Interrupts:
    """Notes the first signal while it is entered; then the handlers that were there before act again.

    Where `region` is entered, the signal raises Interrupted there and then, so that a long step, a compilation or a validation does
    not hold up the end; elsewhere (an optimizer step, a save) it waits for `check`. Outside the main thread, where Python
    allows no handlers, it does nothing. A signal that the process was started to ignore (as a shell's background jobs ignore
    SIGINT) stays ignored.

    at_once  False: `region` waits too, because other processes would be left in the middle of an exchange
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, *, at_once: bool = True) -> None:
        self.at_once = at_once
        self.received: int | None = None
        self._is_open = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            heeded = [signum for signum in self.SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
            self._before = {signum: signal.signal(signum, self._note) for signum in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)

    @contextlib.contextmanager
    def region(self) -> Iterator[None]:
        """Where a signal may interrupt at once, because nothing that is kept is being changed."""
        self._is_open = self.at_once
        try:
            if self.at_once:
                self.check()
            yield
        finally:
            self._is_open = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        self._give_back()
        if self._is_open:
            self._is_open = False
            raise Interrupted(signum)

    def _give_back(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._before = {}
