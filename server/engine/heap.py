"""Freed memory, given back to the system.

A C library keeps what is freed for the next who asks. Of a merged copy of the weights that is hundreds of megabytes in
thousands of pieces, which lie between pieces that are in use: nothing of it goes back by itself, and each merge finds
the gaps of the last too small for some of its own. glibc gives it back when it is told to.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from functools import cache
from typing import Any

_log = logging.getLogger(__name__)


@cache
def _malloc_trim() -> Any | None:
    """glibc's; None where the C library is another."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def give_back() -> bool:
    """Give every whole page of freed memory back to the system, and wait for that; whether this C library can."""
    trim = _malloc_trim()
    if trim is None:
        return False
    began = time.monotonic()
    trim(ctypes.c_size_t(0))  # without Python's lock: a foreign function
    _log.debug("freed memory given back in %.0f ms", (time.monotonic() - began) * 1e3)
    return True


def give_back_soon() -> None:
    """The same on a thread of its own: nobody waits."""
    threading.Thread(target=give_back, name="manylora-give-back", daemon=True).start()
