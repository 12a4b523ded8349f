"""Quantised checkpoints kept on disk, so that the second start takes seconds.

An entry is a directory named by the source's digest that holds an NF4 checkpoint as `quantize.write_checkpoint` writes
it, and ``manylora.json``, written last, with the size of every file. It appears by one rename, so a reader sees a whole
entry or none; of two processes that make the same entry at once, the later one finds it there and drops its own copy.
Entries are never pruned: delete a directory to drop one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from manylora.server.model.errors import NotEnoughDisk
from manylora.server.model.writer import write_json

logger = logging.getLogger(__name__)

_MARKER: Final = "manylora.json"
_FORMAT: Final = 1
"""Part of an entry's name: raised whenever quantising or the layout changes, so that older entries are not used."""
_STALE: Final = 24 * 3600
"""Seconds after which an unfinished entry cannot belong to a running process."""


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/manylora``, or ``~/.cache/manylora``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "manylora"


class BaseCache:
    """The entries below ``root``. A cache that cannot be written costs a warning and the time it would have saved."""

    def __init__(self, root: Path) -> None:
        self._bases = root / "bases"
        self.hashes = root / "hashes.json"

    def entry(self, digest: str) -> Path:
        return self._bases / f"{digest[:40]}-nf4-v{_FORMAT}"

    def find(self, digest: str) -> Path | None:
        """The entry of ``digest`` if it is there and whole by its marker and file sizes; a broken one is dropped."""
        entry = self.entry(digest)
        if not entry.is_dir():
            return None
        fault = _fault(entry)
        if fault is None:
            return entry
        self.discard(digest, fault)
        return None

    def discard(self, digest: str, fault: str) -> None:
        """Drop a broken entry, saying why; it is moved aside first, so that nobody finds half of it."""
        entry = self.entry(digest)
        logger.warning("The cached base %s is broken (%s): quantising it again.", entry, fault)
        aside = entry.with_name(f".broken-{os.getpid()}-{entry.name}")
        with contextlib.suppress(OSError):
            os.replace(entry, aside)
            shutil.rmtree(aside, ignore_errors=True)

    def fill(self, digest: str, write: Callable[[Path], None]) -> Path | None:
        """Make the entry of ``digest`` with ``write(directory)``; None (and a warning) if the disk does not let us."""
        entry = self.entry(digest)
        temporary = None
        try:
            self._bases.mkdir(parents=True, exist_ok=True)
            self._sweep()
            temporary = Path(tempfile.mkdtemp(dir=self._bases, prefix=".new-"))
            write(temporary)
            sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
            write_json(temporary / _MARKER, {"format": _FORMAT, "digest": digest, "files": sizes})
            self._publish(temporary, entry)
        except (OSError, NotEnoughDisk) as error:
            logger.warning("The quantised base is not cached: %s. The next start quantises it again.", error)
            return None
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        logger.info("The quantised base is cached in %s (%.2f GB).", entry, sum(sizes.values()) / 1e9)
        return entry

    def _publish(self, temporary: Path, entry: Path) -> None:
        try:
            os.replace(temporary, entry)
        except OSError:
            # Renaming onto a directory that is not empty fails: another process was first.
            if not entry.is_dir() or _fault(entry) is not None:
                raise

    def _sweep(self) -> None:
        """Remove what crashed processes left behind."""
        for path in (*self._bases.glob(".new-*"), *self._bases.glob(".broken-*")):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE:
                    shutil.rmtree(path, ignore_errors=True)


def _fault(entry: Path) -> str | None:
    """Why ``entry`` is not whole; None if it is, as far as names and sizes tell."""
    try:
        marker = json.loads((entry / _MARKER).read_text(encoding="utf-8"))
        files = dict(marker["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_MARKER}: {error}"
    for name, size in files.items():
        try:
            found = (entry / name).stat().st_size
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        if found != size:
            return f"{name} has {found} bytes, not {size}"
    return None
