"""With PLEXRANK_REQUIRE_ALL=1, as in continuous integration, a test that skips for want of a tool fails.

Only tests of data that may not be redistributed, which say PLEXRANK_DATA in their reason, may skip.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

pytest_plugins = ["tests.brokers", "tests.triton_server"]


def _forbid_skip(report: Any) -> None:
    if os.environ.get("PLEXRANK_REQUIRE_ALL") and report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if "PLEXRANK_DATA" not in reason:
            report.outcome = "failed"
            report.longrepr = f"{report.nodeid}: would skip, and PLEXRANK_REQUIRE_ALL is set: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    report = yield
    _forbid_skip(report)
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that of the two workers of `make test` none is left alone with it."""
    items.sort(key=lambda item: not any(part in item.nodeid for part in ("tests/faults/", "test_triton")))
