"""A headless Chromium for tests, driven by the chromedriver beside it; tests are skipped where there is none."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1360,1300",
)  # fmt: skip
BROWSER, DRIVER = "chromium", "chromedriver"
WAIT_S = 60


def missing() -> str | None:
    """What a browser's test lacks here; None if nothing."""
    if importlib.util.find_spec("selenium") is None:
        return "selenium is not installed (pip install -e '.[dev]')"
    for program in (BROWSER, DRIVER):
        if shutil.which(program) is None:
            return f"{program} is not installed (apt-get install chromium chromium-driver)"
    return None


needs_browser = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A browser with a fresh profile and nothing to fetch: driver and browser are those that are installed."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which(BROWSER))
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


def wait(driver: Any, condition: Callable[[], Any], what: str) -> Any:
    """What ``condition`` returns once it is true; AssertionError, with the page's text, after a while."""
    from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
    from selenium.webdriver.support.ui import WebDriverWait

    try:
        # What a look found may be gone by the time it is asked for its text: then it is looked for again.
        waiting = WebDriverWait(driver, WAIT_S, 0.05, ignored_exceptions=[StaleElementReferenceException])
        return waiting.until(lambda _: condition())
    except TimeoutException:
        raise AssertionError(f"waited {WAIT_S} s for {what}; the page says:\n{driver.page_source[:20_000]}") from None
