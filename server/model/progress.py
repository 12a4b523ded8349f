"""Progress of the slow parts of a start: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Final

from tqdm import tqdm

logger = logging.getLogger(__name__)

_LOG_EVERY: Final = 10.0
"""Seconds between log lines where there is no terminal."""


class Progress:
    """Counts the bytes of one task, or its ``unit``. A context manager; ``show=False`` keeps it silent."""

    def __init__(self, task: str, total: int, *, show: bool = True, unit: str = "B") -> None:
        self._task, self._total, self._done = task, total, 0
        self._bar = None
        self._lines = show and not sys.stderr.isatty()
        self._started = self._last = time.monotonic()
        if self._lines:
            logger.info("%s: %s", task, f"{total / 1e9:.2f} GB" if unit == "B" else f"{total} {unit}s")
        elif show:
            self._bar = tqdm(total=total, desc=task, unit=unit, unit_scale=unit == "B", file=sys.stderr)

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._bar is not None:
            self._bar.update(nbytes)
        elif self._lines and time.monotonic() - self._last >= _LOG_EVERY:
            self._last = time.monotonic()
            logger.info("%s: %.0f %%", self._task, 100 * self._done / max(self._total, 1))

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._lines and kind is None:
            logger.info("%s: done in %.1f s", self._task, time.monotonic() - self._started)
