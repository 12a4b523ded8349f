"""Making a rename survive a power cut. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path


def sync_directory(path: Path) -> None:
    """Write a directory's entries to the disk: a rename in it is only durable after that.

    Nothing happens on platforms that cannot open a directory. Raises OSError.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
