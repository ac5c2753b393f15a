"""Shares engines between tests, and prints minutes by file and the number of engines at the end."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "engine"))

import harness
from hypothesis import settings

# No test is timed, and the same inputs come in every run: a failure is one of the code.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

# Files that take minutes, longest first: if one of them began last, the other workers would wait for it.
LONGEST = (
    "test_v2.py",
    "test_identity.py",
    "test_audit.py",
    "test_ray.py",
    "test_v2_chains.py",
    "test_chains.py",
    "test_list.py",
    "test_minhash.py",
    "test_native_drafters.py",
    "test_example_training.py",
    "test_acceptance.py",
    "test_docs.py",
    "test_serve.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def engines() -> Iterator[harness.Engines]:
    """Engines that all tests of this pytest worker share."""
    shared = harness.Engines()
    yield shared
    shared.close()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile kernels once, before every pytest worker compiles them."""
    if not hasattr(session.config, "workerinput") and session.config.getoption("numprocesses", None):
        subprocess.run([sys.executable, str(Path(harness.__file__).with_name("compile_kernels.py"))], check=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        session.config.workeroutput["engine_starts"] = harness.num_started


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the engines that a pytest worker started to the total."""
    harness.num_started += getattr(node, "workeroutput", {}).get("engine_starts", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print minutes and number of tests of every file that took a second or more, longest first."""
    seconds: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for report in (each for kind in terminalreporter.stats.values() for each in kind):
        if isinstance(report, pytest.TestReport):
            name = report.nodeid.partition("::")[0]
            seconds[name] += report.duration  # type: ignore[assignment]
            tests[name] += report.when == "call"
    if not seconds:
        return
    terminalreporter.section("minutes by file")
    for name, spent in seconds.most_common():
        if spent >= 1:
            terminalreporter.write_line(f"{spent / 60:6.2f}  {tests[name]:5d} tests  {name}")
    terminalreporter.write_line(f"{sum(seconds.values()) / 60:6.2f}  {sum(tests.values()):5d} tests  together")
    terminalreporter.write_line(
        f"{harness.num_started} engines started by the harness; commands that are tested start more"
    )
