"""Time-boxed random searches: `pytest -m campaign --minutes=M`. A pytest plugin, loaded by conftest.py.

    @pytest.mark.campaign(weight=2)
    def test_sine_holds_its_bound(campaign):
        for seed in campaign:
            check_one_case(random.Random(seed))

M minutes (30 unless told) are divided among the collected rows by their weights; a test's parametrisations share its weight.
A row's share is dealt when it starts, out of what is left for it and the rows after it, so that a skipped row's time is not
lost. Its clock starts before its fixtures, and it stops at the first case that ends after its share, so it overruns by one case
at most. A campaign test without the fixture takes the time that it needs. `--cases=N` runs exactly N cases a row instead (a test's
parametrisations share them too).

Seeds are fresh in every run; they derive from a base seed that is printed, the test's id and the number of the case. A
failure prints the line that runs that case alone. Without -m campaign these tests are not run.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections import Counter
from typing import Any, Iterator

import pytest

WHOLE = pytest.StashKey["Campaign"]()
MINE = pytest.StashKey["Row"]()


class Row:
    """One test's share of the campaign. Iterating it gives seeds, whole numbers below 2^32, until the share is used up."""

    def __init__(self, nodeid: str, weight: float, seed: int, case: int | None) -> None:
        self.nodeid, self.weight, self.base_seed, self.only_case = nodeid, weight, seed, case
        self.share = 0.0  # seconds
        self.part = 1.0  # of the weight, where a test has parametrisations
        self.limit: int | None = None  # cases
        self.started = self.seconds = 0.0
        self.cases = 0
        self.outcome = "not run"

    def __call__(self, weight: float) -> "Row":
        """`campaign(weight=2)` beside the marker: allowed where it says the same,
        because the rows before this one were dealt by it."""
        if weight != self.weight:
            raise ValueError(
                f"campaign(weight={weight}): the marker says {self.weight}; write @pytest.mark.campaign(weight={weight})"
            )
        return self

    def __iter__(self) -> Iterator[int]:
        if self.only_case is not None:
            self.cases += 1
            yield self._seed(self.only_case)
            return
        while self.cases == 0 or not self._is_used_up():
            self.cases += 1
            yield self._seed(self.cases - 1)

    def _is_used_up(self) -> bool:
        return self.cases >= self.limit if self.limit is not None else time.perf_counter() - self.started >= self.share

    def _seed(self, case: int) -> int:
        digest = hashlib.sha256(f"{self.base_seed}:{self.nodeid}:{case}".encode()).digest()
        return int.from_bytes(digest[:4], "little")

    def reproduction(self) -> str:
        case = self.only_case if self.only_case is not None else self.cases - 1
        return f"pytest -m campaign '{self.nodeid}' --campaign-seed={self.base_seed} --campaign-case={case}"


class Campaign:
    def __init__(self, config: pytest.Config) -> None:
        option = config.option
        if option.cases is not None and option.minutes is not None:
            raise pytest.UsageError("--cases and --minutes exclude each other: a row runs by count or by time")
        self.minutes = 30.0 if option.minutes is None else option.minutes
        self.seed = secrets.randbelow(2**32) if option.campaign_seed is None else option.campaign_seed
        self.cases, self.only_case = option.cases, option.campaign_case
        self.is_chosen = "campaign" in option.markexpr
        self.started = time.perf_counter()
        self.rows: list[Row] = []

    def collect(self, items: list[pytest.Item]) -> None:
        """Make the rows."""
        siblings = Counter(_function_of(item) for item in items)
        for item in items:
            weight = item.get_closest_marker("campaign").kwargs.get("weight", 1)
            row = item.stash[MINE] = Row(item.nodeid, weight, self.seed, self.only_case)
            row.part = 1 / siblings[_function_of(item)]
            row.limit = None if self.cases is None else math.ceil(self.cases * row.part)
            self.rows.append(row)

    def start(self, row: Row) -> None:
        """Deal the row its share of the time that is left."""
        row.started = time.perf_counter()
        row.outcome = "running"
        waiting = sum(other.weight * other.part for other in self.rows if other.outcome == "not run")
        left = self.minutes * 60 - (row.started - self.started)
        row.share = max(left, 0.0) * row.weight * row.part / (row.weight * row.part + waiting)


def _function_of(item: pytest.Item) -> str:
    return item.nodeid.split("[")[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("campaign", "time-boxed random search (-m campaign)")
    group.addoption("--minutes", type=float, default=None, help="minutes to divide among the campaign's rows (default 30)")
    group.addoption("--cases", type=int, default=None, help="run exactly this many cases a row, however long it takes")
    group.addoption("--campaign-seed", type=int, default=None, help="base seed of an earlier run")
    group.addoption("--campaign-case", type=int, default=None, help="run only the case of this number")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "campaign(weight=1): time-boxed random search; run with -m campaign --minutes=M")
    config.stash[WHOLE] = Campaign(config)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A test that asks for the fixture is a row even if its author forgot the marker: it must not run forever every day.
    for item in items:
        if "campaign" in getattr(item, "fixturenames", ()) and item.get_closest_marker("campaign") is None:
            item.add_marker(pytest.mark.campaign)
    if not config.stash[WHOLE].is_chosen:
        rows = [item for item in items if item.get_closest_marker("campaign") is not None]
        if rows:
            config.hook.pytest_deselected(items=rows)
            items[:] = [item for item in items if item.get_closest_marker("campaign") is None]


def pytest_collection_finish(session: pytest.Session) -> None:
    rows = [item for item in session.items if item.get_closest_marker("campaign") is not None]
    if rows:
        session.config.stash[WHOLE].collect(rows)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if MINE in item.stash:
        item.config.stash[WHOLE].start(item.stash[MINE])


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> Row:
    """Seeds to try, for as long as this row's share of the campaign lasts."""
    return request.node.stash[MINE]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    report = yield
    if MINE not in item.stash:
        return report
    row = item.stash[MINE]
    row.seconds = time.perf_counter() - row.started
    if call.when == "call":
        if report.passed and row.cases == 0 and "campaign" in item.fixturenames:
            report.outcome, report.longrepr = "failed", "the test asked for the campaign fixture and drew no seed from it"
        elif report.failed and row.cases:
            report.sections.append(("reproduce", row.reproduction()))
    if call.when == "call" or not report.passed:
        row.outcome = report.outcome
    return report


def pytest_report_header(config: pytest.Config) -> str | None:
    whole = config.stash[WHOLE]
    if not whole.is_chosen:
        return None
    amount = f"{whole.minutes:g} minutes" if whole.cases is None else f"{whole.cases} cases a row"
    return f"campaign: {amount}, --campaign-seed={whole.seed}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    whole = config.stash[WHOLE]
    if not whole.rows:
        return
    terminalreporter.section(f"campaign --campaign-seed={whole.seed}")
    width = max(len(row.nodeid) for row in whole.rows)
    terminalreporter.write_line(f"{'row':{width}}  {'cases':>8}  {'cases/s':>8}  {'minutes':>7}  outcome")
    for row in whole.rows:
        rate = row.cases / row.seconds if row.seconds else 0.0
        terminalreporter.write_line(f"{row.nodeid:{width}}  {row.cases:8}  {rate:8.2f}  {row.seconds / 60:7.2f}  {row.outcome}")
    for row in whole.rows:
        if row.outcome == "failed" and row.cases:
            terminalreporter.write_line(f"reproduce: {row.reproduction()}")
