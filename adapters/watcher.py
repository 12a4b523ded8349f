"""A directory that is watched: each of its folders is an adapter, loaded as it comes, changes and goes. Torch-free.

It is looked at every so often. That works where notifications do not: on NFS, and on Kubernetes volumes, whose content
changes by a symbolic link that is swapped. A folder is acted upon when two looks in a row found the same files, so that
it is not read while it is being copied. What it holds is told apart by its files' sizes, times and inodes, links
followed; the registry then compares content, so that touching a file replaces nothing.

Names that came from elsewhere are left alone, in whatever state their folder is. A folder whose name was unloaded by
hand stays so until its files change. Nothing here ends the server: what is wrong with a folder is logged once, and
again after the folder has changed.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from manylora.adapters.errors import AdapterError, AdapterNotFound
from manylora.adapters.source import OPTIONAL_FILES, REQUIRED_FILES, resolve_source
from manylora.adapters.versions import AdapterInfo

_log = logging.getLogger(__name__)

Signature = tuple[tuple[str, int, int, int, int, int], ...]
"""Of each file that is there: name, device, inode, size, and the times of its content and of its inode."""

_CONFIG: Final = REQUIRED_FILES[0]


class Registry(Protocol):
    """What is asked of ``adapters.registry.AdapterRegistry``."""

    def load(self, name: str, source: str, *, replace: bool = ..., remember: bool = ...) -> AdapterInfo: ...
    def unload(self, name: str) -> None: ...
    def info(self, name: str) -> AdapterInfo: ...


@dataclass
class _Folder:
    seen: Signature | None = None
    """What the last look found; None: it is gone, or is no adapter."""
    done: Signature | None = None
    """What was last acted upon, well or badly."""
    told: str = ""
    """The last complaint about it, so that it is not repeated."""


class FolderWatcher:
    """Keeps the registry in step with the folders of ``root``.

    Args:
        registry: adapters are loaded into it without being remembered: the directory is what remembers them.
        interval: seconds between two looks.
    """

    def __init__(self, root: Path, registry: Registry, *, interval: float = 5.0) -> None:
        self._root = Path(os.path.abspath(root))
        self._registry = registry
        self._interval = interval
        self._folders: dict[str, _Folder] = {}
        self._device: int | None = None
        self._told = ""
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look every ``interval`` seconds from now on, on a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="manylora-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more; returns when a load that is under way has ended."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def poll(self, *, settled: bool = False) -> None:
        """One look. ``settled``: take the files as complete although they were not seen before, as at the start."""
        try:
            present = self._list()
        except OSError as error:
            # Not "everything was removed": a volume that cannot be read now will be back.
            self._complain(f"{self._root} cannot be read, nothing is changed: {error}")
            return
        if present is None:
            self._complain(f"{self._root} is empty and another volume than before: taken as not mounted")
            return
        self._told = ""
        for name in sorted(present | self._folders.keys()):
            if self._stopped.is_set():
                return
            folder = self._folders.setdefault(name, _Folder())
            try:
                self._look(name, folder, settled)
            except (AdapterError, OSError) as error:
                self._report(name, folder, str(error))
            except Exception:  # noqa: BLE001 - the boundary: a bug must not end the watching of the other folders
                _log.exception("watched folder %s", self._root / name)
            if name not in present and folder.seen is None and folder.done is None:
                del self._folders[name]

    # --- inside --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            self.poll()

    def _list(self) -> set[str] | None:
        """Names of what may be adapters; None if the volume seems to be gone. Raises OSError."""
        device = os.stat(self._root).st_dev
        with os.scandir(self._root) as entries:
            # Hidden ones are others' business, such as the dated folders of a Kubernetes volume.
            names = {entry.name for entry in entries if not entry.name.startswith(".")}
        if not names and self._device not in (None, device):
            return None
        self._device = device
        return names

    def _look(self, name: str, folder: _Folder, settled: bool) -> None:
        seen = self._signature(name)
        is_stable = settled or seen == folder.seen
        folder.seen = seen
        if not is_stable or seen == folder.done:
            return
        path = self._root / name
        source = self._source_of(name)
        if source not in (None, str(path)):
            if seen is None:
                folder.done = None
            else:
                self._report(name, folder, f"it is not loaded, as its name belongs to an adapter from {source}")
            return
        if seen is None:
            if source is not None:
                self._registry.unload(name)
                _log.info("watched folder %s is gone: adapter %s is unloaded", path, name)
            folder.done = None
            return
        folder.done, folder.told = seen, ""  # before trying: what fails is tried again when it changes
        resolve_source(str(path), allowed_roots=[self._root], allow_hub=False)
        before = self._version_of(name)
        after = self._registry.load(name, str(path), replace=True, remember=False).version
        if before is None:
            _log.info("watched folder %s: adapter %s is loaded, version %s", path, name, after[:12])
        elif before != after:
            _log.info("watched folder %s: adapter %s is replaced, %s by %s", path, name, before[:12], after[:12])

    def _signature(self, name: str) -> Signature | None:
        """Of a folder's files; None if it holds no adapter. Raises OSError for what cannot be told."""
        found = []
        for file in (*REQUIRED_FILES, *OPTIONAL_FILES):
            try:
                stat = os.stat(self._root / name / file)
            except (FileNotFoundError, NotADirectoryError):
                if file == _CONFIG:
                    return None
                continue
            found.append((file, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
        return tuple(found)

    def _source_of(self, name: str) -> str | None:
        return self._of(name, lambda info: info.source)

    def _version_of(self, name: str) -> str | None:
        return self._of(name, lambda info: info.version)

    def _of(self, name: str, get: Callable[[AdapterInfo], str]) -> str | None:
        try:
            return get(self._registry.info(name))
        except AdapterNotFound:
            return None

    def _report(self, name: str, folder: _Folder, problem: str) -> None:
        if problem != folder.told:
            folder.told = problem
            _log.warning("watched folder %s: %s", self._root / name, problem)

    def _complain(self, problem: str) -> None:
        if problem != self._told:
            self._told = problem
            _log.warning("watching: %s", problem)
