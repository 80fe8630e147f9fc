"""Skipped tests are counted, and a rise fails. A pytest plugin, loaded by conftest.py.

known_skips.txt holds one line a reason: the most tests that may be skipped for it, then the reason (* matches anything). A
skip for a reason that is not there, or one more than its number, fails the run.
"""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

LIST = Path(__file__).with_name("known_skips.txt")


def read_known(path: Path) -> dict[str, int]:
    """{reason pattern: most tests that may be skipped for it}"""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return {reason: int(most) for most, reason in (line.split(maxsplit=1) for line in lines)}


def rises(reasons: list[str], known: dict[str, int]) -> list[str]:
    """A sentence for each reason that skipped more tests than `known` allows."""
    counts: Counter[str] = Counter()
    for reason in reasons:
        counts[next((pattern for pattern in known if fnmatchcase(reason, pattern)), reason)] += 1
    return [
        f"{count} skipped, at most {known.get(pattern, 0)} known: {pattern}"
        for pattern, count in counts.items()
        if count > known.get(pattern, 0)
    ]


class Skips:
    def __init__(self, known: dict[str, int]) -> None:
        self.known = known
        self.reasons: list[str] = []

    def _count(self, report: Any) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.reasons.append(report.longrepr[2].removeprefix("Skipped: "))

    pytest_runtest_logreport = pytest_collectreport = _count

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if rises(self.reasons, self.known) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.reasons:
            return
        terminalreporter.section("skipped tests")
        terminalreporter.write_line(f"{len(self.reasons)} skipped; {LIST.name} allows {sum(self.known.values())}")
        for rise in rises(self.reasons, self.known):
            terminalreporter.write_line(f"FAILED: {rise} (make it run, or write it into {LIST.name} with its reason)", red=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Skips(read_known(LIST)), "skips-counter")
