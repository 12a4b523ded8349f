from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import checkpoints
from tests.e2e import server_process

__all__ = ["checkpoints"]  # a fixture

_SHOWN = 20_000
"""Characters of a server's log that a failing test shows."""


@pytest.fixture(scope="session")
def base_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo base is quantised to, once for all tests."""
    return tmp_path_factory.mktemp("base-cache")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        for server in server_process.started:
            report.sections.append((f"log of the server on {server.url or 'its way'}", server.log_text()[-_SHOWN:]))
    if call.when == "teardown":
        server_process.started[:] = [one for one in server_process.started if one.process.poll() is None]
    return report
