"""Every test file gets a clean environment and hears Ctrl-C; a run has new seeds and ends with a table of seconds."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.seeds import FIRST_SEED

# A shell that starts the suite in the background has it ignored, and all that tests start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A busy machine may stand still for longer than an example may take by default.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    """vLLM writes LOCAL_WORLD_SIZE, for example, by which ranks that a later test starts find their place."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_configure(config: pytest.Config) -> None:
    """The processes of pytest-xdist inherit the seed of the first one."""
    if FIRST_SEED not in os.environ:
        os.environ[FIRST_SEED] = str(int(time.time()))


def pytest_report_header() -> str:
    return f"seeds from {os.environ[FIRST_SEED]}; the same again: {FIRST_SEED}={os.environ[FIRST_SEED]}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: with several processes the last ones then have short files to share."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With `--durations`: the seconds of each file, the slowest one first."""
    if config.option.durations is None:
        return
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section("seconds of each file")
    for file, spent in seconds.most_common():
        terminalreporter.write_line(f"{spent:7.1f}  {file}")
