"""The directory of uploaded adapters: what comes into it, and what nobody needs any more and goes."""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manylora.adapters.source import is_unfinished_upload, store_upload
from manylora.adapters.versions import AdapterInfo
from manylora.server.api.managing.uploads import Upload
from manylora.server.api.state import RegistryLike


class StoredUploads:
    """Uploads in ``root``, each in a directory named by its content, until no name, no running request and no
    remembered adapter has it as its source. Any thread; may wait for the disk and for another upload.

    Only what this process saw in use is ever deleted: what a state file that was moved aside speaks of is still there
    when it is put back.
    """

    def __init__(self, root: Path, registry: RegistryLike, limit_bytes: int) -> None:
        self._root = root
        self._registry = registry
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._loading: Counter[str] = Counter()
        self._known = self._in_use()
        if root.is_dir():
            for path in root.iterdir():
                if is_unfinished_upload(path.name):  # cut off by the end of a process
                    shutil.rmtree(path, ignore_errors=True)

    def load(self, name: str, upload: Upload) -> AdapterInfo:
        """Store the files and load them from there. Raises AdapterError, with nothing kept."""
        # Stored and marked in one step: equal content may be there already, and be about to go.
        with self._lock:
            directory = store_upload(name, upload.files, self._root, self._limit_bytes)
            path = os.path.realpath(directory)
            self._known.add(path)
            self._loading[path] += 1
        with self.sweeping():
            try:
                return self._registry.load(name, str(directory), replace=upload.replace, pinned=upload.pinned)
            finally:
                with self._lock:
                    self._loading[path] -= 1

    @contextmanager
    def sweeping(self) -> Iterator[None]:
        """After the block, which changes what is in use, and whether or not it fails: ``sweep``."""
        try:
            yield
        finally:
            self.sweep()

    def sweep(self) -> None:
        """Delete what is not in use any more."""
        with self._lock:
            self._loading = +self._loading
            needed = self._in_use() | self._loading.keys()
            for path in self._known - needed:
                shutil.rmtree(path, ignore_errors=True)
            self._known = needed

    def _in_use(self) -> set[str]:
        root = os.path.realpath(self._root)
        sources = (os.path.realpath(source) for source in self._registry.sources_in_use())
        return {source for source in sources if os.path.dirname(source) == root}
