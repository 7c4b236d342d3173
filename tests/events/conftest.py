"""Says at the end what the backends could not be asked for."""

from __future__ import annotations

from typing import Any

import pytest

LEFT_OUT = pytest.StashKey[dict[str, list[str]]]()


@pytest.fixture
def left_out(request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """backend -> promises that were not checked; listed after the tests."""
    return request.config.stash.setdefault(LEFT_OUT, {})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for backend, promises in config.stash.get(LEFT_OUT, {}).items():
        terminalreporter.write_line(f"not checked of {backend}, which lacks it: {'; '.join(promises)}")
