"""The progress bar: loss, tokens/s, time left."""

from __future__ import annotations

import sys

from tqdm import tqdm


class Progress:
    """A tqdm bar over optimizer steps; silent if not wanted."""

    def __init__(self, total_steps: int, *, shown: bool) -> None:
        # A log file wants a line now and then, a terminal ten a second.
        interval = 0.1 if sys.stderr.isatty() else 5.0
        self._bar = tqdm(
            total=total_steps, unit="step", desc="training", disable=not shown, mininterval=interval, dynamic_ncols=True
        )
        self._notes: dict[str, str] = {}

    def step(self, count: int) -> None:
        self._bar.update(count)

    def note(self, **values: str) -> None:
        """Show or change values at the end of the bar."""
        self._notes.update(values)
        self._bar.set_postfix(self._notes, refresh=False)

    def close(self) -> None:
        self._bar.close()
