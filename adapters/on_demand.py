"""Adapters that are loaded when a request names them: folders below the allowed roots, found by their name. Torch-free.

As many as ``limit`` at a time: to load one more, the least recently used idle one is unloaded, which a request for it
undoes. So the set of names that can be asked for is as large as the disk, and what is held for it is bounded.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from manylora.adapters.errors import (
    AdapterExists,
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterSourceForbidden,
    AdapterSourceNotFound,
)
from manylora.adapters.registry_names import check_name
from manylora.adapters.source import REQUIRED_FILES, resolve_source
from manylora.adapters.versions import AdapterInfo

_log = logging.getLogger(__name__)


class Registry(Protocol):
    """What is asked of ``adapters.registry.AdapterRegistry``."""

    def load(self, name: str, source: str, *, remember: bool = ...) -> AdapterInfo: ...
    def unload(self, name: str) -> None: ...
    def info(self, name: str) -> AdapterInfo: ...


class OnDemand:
    """Loads by name. Any thread; every call may wait for the disk.

    Args:
        registry: adapters are loaded into it without being remembered, as they will be asked for again.
        roots: searched in this order.
        limit: adapters loaded here at a time, as long as some of them are idle.
    """

    def __init__(self, registry: Registry, roots: Sequence[Path], limit: int) -> None:
        self._registry = registry
        self._roots = tuple(Path(os.path.abspath(root)) for root in roots)
        self._limit = limit
        self._lock = threading.Lock()
        self._loaded: dict[str, str] = {}
        """Sources by name: one that was since loaded from elsewhere is not ours to unload."""

    def load(self, name: str) -> bool:
        """Load ``name`` from the first root that has a folder of that name; whether there is one.

        Raises AdapterError if the folder is there and cannot be served.
        """
        path = self.find(name)
        if path is None:
            return False
        try:
            info = self._registry.load(name, str(path), remember=False)
        except AdapterExists:
            return True
        _log.info("adapter %s is loaded on demand from %s, version %s", name, path, info.version[:12])
        with self._lock:
            self._loaded[name] = info.source
        self._forget_idle(spared=name)
        return True

    def find(self, name: str) -> Path | None:
        """The folder that ``name`` means. None if there is none inside the roots, whatever there is outside them."""
        try:
            check_name(name)
        except AdapterNameInvalid:
            return None
        # No empty part and none that begins with a dot: neither ``..`` nor what is hidden.
        if any(not part or part.startswith(".") for part in name.split("/")):
            return None
        for root in self._roots:
            try:
                path = resolve_source(str(root / name), allowed_roots=[root], allow_hub=False)
            except (AdapterSourceForbidden, AdapterSourceNotFound):
                continue
            if os.path.isfile(path / REQUIRED_FILES[0]):  # False for one that may not be looked at
                return path
        return None

    def _forget_idle(self, *, spared: str) -> None:
        with self._lock:
            infos = []
            for name, source in tuple(self._loaded.items()):
                info = self._info(name)
                if info is None or info.source != source:
                    del self._loaded[name]
                else:
                    infos.append(info)
            idle = [info for info in infos if info.name != spared and not info.pinned and not info.requests_in_flight]
            idle.sort(key=lambda info: max(info.loaded_at, info.last_used or 0.0))
            forgotten = [info.name for info in idle[: max(0, len(infos) - self._limit)]]
            for name in forgotten:
                del self._loaded[name]
        for name in forgotten:
            try:
                self._registry.unload(name)  # a request that came in between finishes on it
            except AdapterNotFound:
                continue
            _log.info("adapter %s, loaded on demand, is forgotten", name)

    def _info(self, name: str) -> AdapterInfo | None:
        try:
            return self._registry.info(name)
        except AdapterNotFound:
            return None
