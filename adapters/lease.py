"""Weights in host memory that stay there while somebody uses them. Torch-free."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any


class Lease:
    """A copy that stays in memory until ``release`` (which may be called again, to no effect). A context manager."""

    def __init__(self, weights: Any, release: Callable[[], None]) -> None:
        self.weights = weights
        self._release: Callable[[], None] | None = release
        self._lock = threading.Lock()

    def release(self) -> None:
        with self._lock:
            release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Any:
        return self.weights

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
