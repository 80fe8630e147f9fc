"""The campaign and skip-counting plugins, run on small suites of their own."""

import re
import textwrap

import campaign as plugin
import hypothesis  # noqa: F401  its plugin imports it at the end of a run, and pytester forgets what an inner run imported
import pytest
from skips import rises

pytest_plugins = ["pytester"]


class Clock:
    """Stands in for the plugin's `time`, so that no assertion depends on how busy the machine is. Its seconds pass by sleep."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def suite(pytester, monkeypatch):
    pytester.makeconftest('pytest_plugins = ["campaign"]')
    monkeypatch.setattr(plugin, "time", Clock())

    def run(source, *options):
        pytester.makepyfile(textwrap.dedent(source))
        return pytester.runpytest_inprocess(*options)

    return run


TWO_ROWS = """
    import pytest
    from campaign import time

    @pytest.mark.campaign(weight=3)
    def test_heavy(campaign):
        for seed in campaign(weight=3):
            time.sleep(1)

    @pytest.mark.campaign
    @pytest.mark.parametrize("half", [0, 1])
    def test_light(campaign, half):
        for seed in campaign:
            time.sleep(2)

    def test_everyday():
        pass
"""


def rows_of(result):
    """{row: (cases, outcome)} from the final table"""
    found = re.findall(r"^(\S+::\S+) +(\d+) +[\d.]+ +[\d.]+  (.*)$", "\n".join(result.outlines), re.MULTILINE)
    return {name.split("::")[1]: (int(cases), outcome) for name, cases, outcome in found}


def test_without_the_option_no_campaign_runs(suite):
    suite(TWO_ROWS).assert_outcomes(passed=1, deselected=3)


def test_a_forgotten_marker_still_keeps_a_campaign_out_of_the_everyday_run(suite):
    suite("def test_x(campaign):\n    for seed in campaign: pass").assert_outcomes(deselected=1)


def test_minutes_are_divided_by_weight_and_parametrisations_share(suite):
    result = suite(TWO_ROWS, "-m", "campaign", "--minutes=2")
    result.assert_outcomes(passed=3, deselected=1)
    # 90 of 120 seconds for the row of weight 3; a half of the other takes 15 and overruns by 1, which leaves 14 to its sibling.
    assert rows_of(result) == {"test_heavy": (90, "passed"), "test_light[0]": (8, "passed"), "test_light[1]": (7, "passed")}


def test_the_time_of_a_skipped_row_goes_to_those_after_it(suite):
    source = TWO_ROWS.replace("def test_heavy(campaign):", "def test_heavy(campaign):\n        pytest.skip('nothing to run it on')")
    rows = rows_of(suite(source, "-m", "campaign", "--minutes=2"))
    assert rows == {"test_heavy": (0, "skipped"), "test_light[0]": (30, "passed"), "test_light[1]": (30, "passed")}


@pytest.mark.parametrize("setup, cases", [(40, 20), (90, 1)])
def test_setup_counts_towards_the_share_and_one_case_always_runs(suite, setup, cases):
    result = suite(
        f"""
        import pytest
        from campaign import time

        @pytest.fixture
        def slow():
            time.sleep({setup})

        @pytest.mark.campaign
        def test_x(slow, campaign):
            for seed in campaign:
                time.sleep(1)
        """,
        "-m", "campaign", "--minutes=1",
    )  # fmt: skip
    assert rows_of(result) == {"test_x": (cases, "passed")}


def test_cases_runs_exactly_so_many(suite):
    result = suite(TWO_ROWS, "-m", "campaign", "--cases=4")
    assert {name: count for name, (count, _) in rows_of(result).items()} == {
        "test_heavy": 4,
        "test_light[0]": 2,
        "test_light[1]": 2,
    }


FAILS_SOMETIMES = """
    import pytest

    @pytest.mark.campaign
    @pytest.mark.parametrize("name", ["a b"])
    def test_x(campaign, name):
        for seed in campaign:
            print("drew", seed)
            assert seed % 50
"""


def test_a_failure_prints_a_line_that_reproduces_exactly_that_case(suite, pytester):
    result = suite(FAILS_SOMETIMES, "-m", "campaign")
    result.assert_outcomes(failed=1)
    line = re.search(
        r"^reproduce: pytest -m campaign '(.+)' (--campaign-seed=\d+) (--campaign-case=\d+)$", result.stdout.str(), re.MULTILINE
    )
    last = re.findall(r"^drew (\d+)$", result.stdout.str(), re.MULTILINE)[-1]
    again = pytester.runpytest_inprocess("-m", "campaign", *line.groups())
    again.assert_outcomes(failed=1)
    assert re.findall(r"^drew (\d+)$", again.stdout.str(), re.MULTILINE) == [last]


def test_seeds_are_fresh_unless_the_base_seed_is_given(suite, pytester):
    source = "import pytest\n@pytest.mark.campaign\ndef test_x(campaign):\n    print('drew', list(campaign))"
    runs = [suite(source, "-s", "-m", "campaign", "--cases=5")]
    runs += [
        pytester.runpytest_inprocess("-s", "-m", "campaign", "--cases=5", *seed)
        for seed in ([], ["--campaign-seed=7"], ["--campaign-seed=7"])
    ]
    first, second, seven, seven_again = (re.search(r"drew (\[.*\])", run.stdout.str()).group(1) for run in runs)
    assert first != second and seven == seven_again
    assert len(set(eval(seven))) == 5


def test_a_campaign_that_draws_no_seed_fails(suite):
    suite("import pytest\n@pytest.mark.campaign\ndef test_x(campaign): pass", "-m", "campaign").assert_outcomes(failed=1)


def test_a_weight_that_contradicts_the_marker_is_an_error(suite):
    result = suite(
        "import pytest\n@pytest.mark.campaign\ndef test_x(campaign):\n    for seed in campaign(weight=2): pass", "-m", "campaign"
    )
    result.assert_outcomes(failed=1)
    assert "write @pytest.mark.campaign(weight=2)" in result.stdout.str()


def test_cases_and_minutes_exclude_each_other(suite):
    assert suite(TWO_ROWS, "-m", "campaign", "--cases=4", "--minutes=1").ret == pytest.ExitCode.USAGE_ERROR


def test_skips_rise():
    known = {"no GPU*": 2, "slow": 1}
    assert rises(["no GPU here", "no GPU there", "slow"], known) == []
    assert rises(["no GPU here"] * 3, known) == ["3 skipped, at most 2 known: no GPU*"]
    assert rises(["new reason"], known) == ["1 skipped, at most 0 known: new reason"]


def test_a_rise_of_skipped_tests_fails_the_run(pytester, monkeypatch):
    pytester.makeconftest(
        "import skips\npytest_plugins = ['skips']\nskips.LIST = __import__('pathlib').Path(__file__).parent / 'known.txt'"
    )
    pytester.makefile(".txt", known="# reasons\n1 not today*\n")
    pytester.makepyfile(
        test_one="import pytest\n@pytest.mark.skip(reason='not today, maybe')\ndef test_x(): pass\n@pytest.mark.xfail\n"
        "def test_y(): assert 0",
        test_two="import pytest\npytest.importorskip('no_such_module')",
    )
    assert pytester.runpytest_inprocess("test_one.py").ret == pytest.ExitCode.OK
    both = pytester.runpytest_inprocess()
    assert both.ret == pytest.ExitCode.TESTS_FAILED
    assert "1 skipped, at most 0 known: could not import 'no_such_module'" in both.stdout.str()
