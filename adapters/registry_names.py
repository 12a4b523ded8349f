"""Names of adapters: which are allowed, and one change of a name at a time. Torch-free."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Collection, Iterator
from typing import Final

from manylora.adapters.errors import AdapterNameInvalid

MAX_NAME_LENGTH: Final = 128
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]*")


def check_name(name: str, reserved: Collection[str] = ()) -> None:
    """Raise AdapterNameInvalid unless an adapter may be called so; ``reserved`` are the base model's names."""
    if not name or len(name) > MAX_NAME_LENGTH:
        raise AdapterNameInvalid(name[:MAX_NAME_LENGTH], f"it must have 1 to {MAX_NAME_LENGTH} characters.")
    if not _NAME.fullmatch(name):
        raise AdapterNameInvalid(
            name, "it must begin with a letter or digit and consist of letters, digits and the characters . _ : / -"
        )
    if name in reserved:
        raise AdapterNameInvalid(name, "it is a name of the base model.")


class _NameLock:
    """A lock that is forgotten when its last user leaves, so that names tried once do not accumulate."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0


class NameLocks:
    """A lock for each name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[str, _NameLock] = {}

    def __len__(self) -> int:
        return len(self._locks)

    @contextlib.contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Wait for ``name``'s lock and hold it to the end of the block."""
        with self._lock:
            name_lock = self._locks.setdefault(name, _NameLock())
            name_lock.users += 1
        try:
            with name_lock.lock:
                yield
        finally:
            with self._lock:
                name_lock.users -= 1
                if name_lock.users == 0:
                    del self._locks[name]
