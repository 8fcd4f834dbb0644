"""A pytest plugin that says what tests cost: `pytest --cpu 30` lists the thirty tests and files that took most.

Seconds of CPU, of the test's processes too, and not of the clock: they are the same on a machine that does other work.
"""

from collections import Counter
from collections.abc import Generator

import psutil
import pytest

COST = pytest.StashKey[float]()
SPENT: Counter[str] = Counter()


def cpu_seconds() -> float:
    """What this process and all that it started have used, those that ended included."""
    this, total = psutil.Process(), 0.0
    for process in [this, *this.children(recursive=True)]:
        try:
            total += sum(process.cpu_times()[:4])  # user and system, its own and of its children that ended
        except psutil.NoSuchProcess:  # it ended just now: its parent has it
            continue
    return total


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu", type=int, default=0, metavar="N", help="list the N tests that took most seconds of CPU")


def pytest_collection_finish(session: pytest.Session) -> None:
    session.stash[COST] = cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Notes in a test's last report what was used since that of the one before; xdist's workers send it along."""
    report = yield
    if item.config.option.cpu and report.when == "teardown":
        now = cpu_seconds()
        report.cpu = now - item.session.stash[COST]
        item.session.stash[COST] = now
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    SPENT[report.nodeid] += getattr(report, "cpu", 0.0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if number := config.option.cpu:
        files: Counter[str] = Counter()
        for name, seconds in SPENT.items():
            files[name.partition("::")[0]] += seconds
        for title, spent in (("tests", SPENT), ("files", files)):
            terminalreporter.section(f"{title} by seconds of CPU: {sum(spent.values()):.0f}")
            for name, seconds in spent.most_common(number):
                terminalreporter.line(f"{seconds:8.2f} {name}")
