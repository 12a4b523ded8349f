"""Which adapters exist, under which names, and who is still using them. Torch-free and thread-safe.

A *version* is immutable and content-addressed. A *name* is a mutable alias of one version. A request resolves its name
once, at admission, and holds a reference to that version until it ends, whatever happens to the name meanwhile.

The race that ``acquire`` prevents: were looking a name up and counting the request two steps, another thread could
unload or replace the name in between, see no request in flight and free the version; its device slot would go to
another adapter, and the request would be answered by weights it never asked for, without any error. So both are one
step under ``_lock``, and so are ``release``'s decrement and its decision to free.

Locks, always taken in this order: a name's own load lock (two loads of one name never interleave; held through the
slow load), ``_changing`` (one change of the set of names at a time; held through the fsync of the state file) and
``_lock`` (the tables; only ever held for a few dictionary operations, so the step loop never waits for a disk).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from manylora.adapters.errors import AdapterError, AdapterExists, AdapterNameInvalid, AdapterNotFound
from manylora.adapters.registry_state import StateEntry, read_state, write_state
from manylora.adapters.versions import AdapterInfo, AdapterRef, Loaded, RegistryCounts

_log = logging.getLogger(__name__)

MAX_NAME_LENGTH: Final = 128
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]*")


@dataclass(eq=False)
class _Version:
    ref: AdapterRef
    nbytes: int
    report: Any
    loaded_at: float
    source: str
    pinned: bool = False
    references: int = 0
    last_used: float | None = None


class _NameLock:
    """A lock that is forgotten when its last user leaves, so that names tried once do not accumulate."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0


def _nothing(_ref: AdapterRef) -> None:
    pass


class AdapterRegistry:
    """Names, versions and references of the loaded adapters.

    Args:
        load: reads a source (see adapters.source) into memory; slow, called outside every lock but the name's own.
            Raises ``AdapterError`` or ``OSError`` to refuse, which leaves what was serving as it was.
        state_path: JSON file that remembers names and sources across restarts; written before a change takes effect,
            so that a crash never loses an acknowledged one. ``None``: nothing is remembered.
        on_freed: called exactly once for each version, when it has neither name nor reference; outside the locks, on
            whichever thread freed it.
        reserved: names that no adapter may take (the base model's).

    Raises:
        RegistryStateError: ``state_path`` exists and cannot be understood (it is left untouched), or, from a method
            that changes the set of names, cannot be written (the change is then not made).
    """

    def __init__(
        self,
        load: Callable[[str], Loaded],
        *,
        state_path: Path | None = None,
        on_freed: Callable[[AdapterRef], None] = _nothing,
        reserved: Collection[str] = (),
    ) -> None:
        self._load = load
        self._state_path = state_path
        self._on_freed = on_freed
        self._reserved = frozenset(reserved)
        self._lock = threading.Lock()
        self._changing = threading.Lock()
        self._name_locks: dict[str, _NameLock] = {}
        self._names: dict[str, _Version] = {}
        self._versions: dict[tuple[str, str], _Version] = {}
        # Remembered by the state file but not loaded: not restored yet, or failed to. Kept in every later state file,
        # so that a volume that was not mounted at one start does not lose its adapters for good.
        self._remembered = {entry.name: entry for entry in read_state(state_path)} if state_path else {}

    # --- changing the set of names -------------------------------------------------------------------------------

    def load(self, name: str, source: str, *, replace: bool = False, pinned: bool = False) -> AdapterInfo:
        """Load ``source`` and give it ``name``. Blocks through the load; the name's old version serves until then.

        With ``replace``, requests admitted from now on get the new version; running ones finish on the old. Replacing
        by equal content changes no version (source and pin are still recorded). A pin survives being replaced.

        Raises: AdapterNameInvalid, AdapterExists (without ``replace``), RegistryStateError, and whatever the ``load``
        callable raises.
        """
        self._check_name(name)
        source = absolute_source(source)
        with self._loading(name):
            if not replace and self._is_taken(name):  # before the slow part: the answer cannot change meanwhile
                raise AdapterExists(name)
            return self._publish(name, source, self._load(source), pinned)

    def unload(self, name: str) -> None:
        """Take the name away at once; running requests finish, then the version is freed. AdapterNotFound if unknown.

        A name that is only remembered (its restore failed) is forgotten.
        """
        with self._changing:
            with self._lock:
                if name not in self._names and name not in self._remembered:
                    raise AdapterNotFound(name)
                entries = self._state_entries()
            entries.pop(name)
            self._write(entries)
            with self._lock:
                self._remembered.pop(name, None)
                freed = self._retire(self._names.pop(name, None))
        self._announce(freed)

    def pin(self, name: str, pinned: bool) -> AdapterInfo:
        """Keep the adapter on its device slot even when idle (or no longer). AdapterNotFound if unknown."""
        with self._changing:
            with self._lock:
                version = self._named(name)
                entries = self._state_entries()
            entries[name] = StateEntry(name, version.source, pinned, version.ref.version)
            self._write(entries)
            with self._lock:
                version.pinned = pinned
                return self._info(version)

    def restore(self) -> list[tuple[str, str]]:
        """Load what the state file remembers; returns ``(name, error)`` of those that failed, which stay remembered.

        Names loaded since the start (from the command line) win over remembered ones. A source whose content is not
        what it was is loaded all the same, because the path is what the operator asked for, and a warning names both
        versions.
        """
        failures: list[tuple[str, str]] = []
        with self._lock:
            remembered = list(self._remembered.values())
        for entry in remembered:
            try:
                self._restore_one(entry)
            except (AdapterError, OSError) as error:
                _log.error("adapter %s was not restored from %s: %s", entry.name, entry.source, error)
                failures.append((entry.name, str(error)))
        return failures

    # --- requests ------------------------------------------------------------------------------------------------

    def acquire(self, name: str) -> AdapterRef:
        """The version that ``name`` means now, with one reference taken; give it back with ``release``.

        Raises AdapterNotFound.
        """
        with self._lock:
            version = self._named(name)
            version.references += 1
            version.last_used = time.time()
            return version.ref

    def release(self, ref: AdapterRef) -> None:
        """Give back one reference; the last one of a version that has lost its name frees it."""
        with self._lock:
            version = self._versions.get((ref.name, ref.version))
            if version is None or version.references == 0:
                raise RuntimeError(f"adapter {ref.name} version {ref.version[:12]} was released more than acquired")
            version.references -= 1
            freed = None if self._names.get(ref.name) is version else self._retire(version)
        self._announce(freed)

    # --- looking -------------------------------------------------------------------------------------------------

    def info(self, name: str) -> AdapterInfo:
        """The version that ``name`` means now. Raises AdapterNotFound."""
        with self._lock:
            return self._info(self._named(name))

    def is_pinned(self, ref: AdapterRef) -> bool:
        """Whether ``ref`` is the current version of a pinned name (an old version is not worth keeping)."""
        with self._lock:
            version = self._names.get(ref.name)
            return version is not None and version.pinned and version.ref == ref

    def counts(self) -> RegistryCounts:
        with self._lock:
            return RegistryCounts(
                ready=len(self._names),
                draining=len(self._versions) - len(self._names),
                requests_in_flight=sum(version.references for version in self._versions.values()),
                nbytes=sum(version.nbytes for version in self._versions.values()),
            )

    def check_integrity(self) -> None:
        """Raise RuntimeError, with the numbers, if the tables disagree with each other."""
        with self._lock:
            for name, named in self._names.items():
                if name != named.ref.name or self._versions.get((name, named.ref.version)) is not named:
                    raise RuntimeError(f"registry: name {name} points to a version that is not in the table")
            for (name, digest), version in self._versions.items():
                is_named = self._names.get(name) is version
                if version.references < 0 or (version.references == 0 and not is_named):
                    raise RuntimeError(
                        f"registry: {name} version {digest[:12]} has {version.references} references and "
                        f"{'a' if is_named else 'no'} name, and was not freed"
                    )

    # --- inside --------------------------------------------------------------------------------------------------

    def _check_name(self, name: str) -> None:
        if not name or len(name) > MAX_NAME_LENGTH:
            raise AdapterNameInvalid(name[:MAX_NAME_LENGTH], f"it must have 1 to {MAX_NAME_LENGTH} characters.")
        if not _NAME.fullmatch(name):
            raise AdapterNameInvalid(
                name, "it must begin with a letter or digit and consist of letters, digits and the characters . _ : / -"
            )
        if name in self._reserved:
            raise AdapterNameInvalid(name, "it is a name of the base model.")

    @contextlib.contextmanager
    def _loading(self, name: str) -> Iterator[None]:
        with self._lock:
            name_lock = self._name_locks.setdefault(name, _NameLock())
            name_lock.users += 1
        try:
            with name_lock.lock:
                yield
        finally:
            with self._lock:
                name_lock.users -= 1
                if name_lock.users == 0:
                    del self._name_locks[name]

    def _is_taken(self, name: str) -> bool:
        with self._lock:
            return name in self._names

    def _publish(self, name: str, source: str, loaded: Loaded, pinned: bool) -> AdapterInfo:
        """Give ``name`` to what was loaded: state file first, then the tables."""
        ref = AdapterRef(name, loaded.version, loaded.weights, source)
        freed: AdapterRef | None = None
        with self._changing:
            with self._lock:
                old = self._names.get(name)
                pinned = pinned or (old is not None and old.pinned)
                entries = self._state_entries()
            entries[name] = StateEntry(name, source, pinned, loaded.version)
            self._write(entries)
            with self._lock:
                # Equal content may still be there, as this name's current version or finishing its last requests:
                # then that one is the version, and the copy just loaded is let go.
                new = self._versions.get((name, loaded.version))
                if new is None:
                    new = _Version(ref, loaded.nbytes, loaded.report, time.time(), source)
                    self._versions[name, loaded.version] = new
                new.source, new.pinned = source, pinned
                self._names[name] = new
                self._remembered.pop(name, None)
                if old is not None and old is not new:
                    freed = self._retire(old)
                info = self._info(new)
        self._announce(freed)
        return info

    def _restore_one(self, entry: StateEntry) -> None:
        self._check_name(entry.name)
        with self._loading(entry.name):
            if self._is_taken(entry.name):
                return
            info = self._publish(entry.name, entry.source, self._load(entry.source), entry.pinned)
        if info.version != entry.version:
            _log.warning(
                "adapter %s: the content of %s has changed since it was last loaded: version was %s, is now %s",
                entry.name,
                entry.source,
                entry.version,
                info.version,
            )

    def _named(self, name: str) -> _Version:
        """Caller holds ``_lock``."""
        try:
            return self._names[name]
        except KeyError:
            raise AdapterNotFound(name) from None

    def _retire(self, version: _Version | None) -> AdapterRef | None:
        """Forget a version that has lost its name, if no request holds it; caller holds ``_lock`` and announces."""
        if version is None or version.references > 0:
            return None
        del self._versions[version.ref.name, version.ref.version]
        return version.ref

    def _announce(self, freed: AdapterRef | None) -> None:
        if freed is not None:
            self._on_freed(freed)

    def _state_entries(self) -> dict[str, StateEntry]:
        """What the state file should say; caller holds ``_lock``."""
        entries = dict(self._remembered)
        for name, version in self._names.items():
            entries[name] = StateEntry(name, version.source, version.pinned, version.ref.version)
        return entries

    def _write(self, entries: dict[str, StateEntry]) -> None:
        if self._state_path is not None:
            write_state(self._state_path, entries.values())

    def _info(self, version: _Version) -> AdapterInfo:
        ready = self._names.get(version.ref.name) is version
        return AdapterInfo(
            name=version.ref.name,
            version=version.ref.version,
            source=version.source,
            pinned=version.pinned and ready,
            state="ready" if ready else "draining",
            requests_in_flight=version.references,
            nbytes=version.nbytes,
            loaded_at=version.loaded_at,
            last_used=version.last_used,
            report=version.report,
        )

    # Last, because its name hides the built-in ``list`` from the annotations after it.
    def list(self, *, draining: bool = False) -> list[AdapterInfo]:
        """Adapters by name; with ``draining`` also the versions that only finish their requests."""
        with self._lock:
            infos = [self._info(v) for v in self._versions.values() if draining or self._names.get(v.ref.name) is v]
        return sorted(infos, key=lambda info: (info.name, info.state != "ready", info.loaded_at))


def absolute_source(source: str) -> str:
    """``source`` as it will still mean the same from another working directory; hub ids are left as they are.

    Symbolic links are kept: ``current -> v3`` is how some people deploy.
    """
    expanded = os.path.expanduser(source)
    return os.path.abspath(expanded) if os.path.exists(expanded) else source
