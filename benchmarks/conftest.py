"""A report for each benchmark file: rows are written as they are measured, and need not be twice.

With RESUME=1 rows of this commit that a report holds already are skipped. After PART_SECONDS, then
450 if not given, no further row is begun: run the same again for those that are missing. ``python
-m benchmarks.missing`` says which these are.
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from benchmarks.harness import Report

_REPORTS: dict[str, Report] = {}
_START = time.monotonic()


def _report_of(item: pytest.Item) -> Report:
    name = item.path.stem.removeprefix("test_")
    return _REPORTS.setdefault(name, Report(name, resume=os.environ.get("RESUME") == "1"))


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        if "report" in getattr(item, "fixturenames", ()):
            _report_of(item).expected.append(item.name)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "report" not in getattr(item, "fixturenames", ()):
        return
    resume = os.environ.get("RESUME") == "1"
    if resume and item.name in _report_of(item).done:
        pytest.skip("measured before")
    limit = os.environ.get("PART_SECONDS") or (450 if resume else math.inf)
    if time.monotonic() - _START > float(limit):
        pytest.skip("out of time: run again")


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Iterator[Report]:
    """The report of the file, whose next rows are those of this test."""
    made = _report_of(request.node)
    made.begin(request.node.name)
    yield made


if importlib.util.find_spec("pytest_benchmark") is None:

    @pytest.fixture
    def benchmark() -> SimpleNamespace:
        """Nothing: the plugin only prints a second table, the rows of the reports do without."""
        return SimpleNamespace(extra_info={}, pedantic=lambda *args, **options: None)
