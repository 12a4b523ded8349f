"""The identity of a checkpoint: a sha256 over the content of its files.

Hashing 16 GB takes a while, so each file's hash is remembered beside the cache, keyed by path, size, mtime (ns) and
inode: whatever changes a file changes one of them. Names and order of the files count, their directory does not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from manylora.server.model.errors import BadCheckpoint
from manylora.server.model.progress import Progress

_READ: Final = 1 << 24
_SETTLED_NS: Final = 2_000_000_000
"""A file younger than this is not remembered: it could change again within its file system's timestamp granularity."""


def digest_files(files: Mapping[str, Path], *, remember: Path | None = None, progress: bool = False) -> str:
    """sha256 (hex) over ``files``: for each, in the order of their names, its name, size and content hash.

    ``remember`` is the JSON file of known hashes; without one, or where it cannot be written, every file is read.
    Raises BadCheckpoint when a file cannot be read.
    """
    known = _read_known(remember)
    hashes: dict[str, tuple[int, str]] = {}
    fresh: dict[str, str] = {}
    todo = []
    for name, path in sorted(files.items()):
        try:
            stat = path.stat()
        except OSError as error:
            raise BadCheckpoint(str(path), f"it cannot be read ({error.strerror or error})") from error
        key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
        if key in known:
            hashes[name] = (stat.st_size, known[key])
        else:
            todo.append((name, path, stat.st_size, key, stat.st_mtime_ns))
    if todo:
        with Progress("Hashing the checkpoint", sum(size for _, _, size, _, _ in todo), show=progress) as bar:
            for name, path, size, key, mtime_ns in todo:
                hashes[name] = (size, _hash(path, bar))
                if time.time_ns() - mtime_ns > _SETTLED_NS:
                    fresh[key] = hashes[name][1]
    if remember is not None and fresh:
        _write_known(remember, fresh)
    total = hashlib.sha256(b"manylora base 1\n")
    for name in sorted(hashes):
        size, content = hashes[name]
        total.update(f"{name}\0{size}\0{content}\n".encode())
    return total.hexdigest()


def _hash(path: Path, bar: Progress) -> str:
    content = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_READ):
                content.update(block)
                bar.advance(len(block))
    except OSError as error:
        raise BadCheckpoint(str(path), f"it cannot be read ({error.strerror or error})") from error
    return content.hexdigest()


def _read_known(path: Path | None) -> dict[str, str]:
    """What is remembered; an unreadable or odd file is the same as none."""
    if path is None:
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: value for key, value in known.items() if isinstance(value, str) and len(value) == 64}


def _write_known(path: Path, fresh: Mapping[str, str]) -> None:
    """Add ``fresh``, atomically. Of two processes at once one may lose its additions, which costs a re-read only."""
    paths: Sequence[str] = [key.rsplit(":", 3)[0] for key in fresh]
    # An older state of the same file is of no more use.
    kept = {key: value for key, value in _read_known(path).items() if key.rsplit(":", 3)[0] not in paths}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".hashes-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(kept | dict(fresh), file, indent=0)
            os.replace(temporary, path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
