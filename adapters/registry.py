"""Which adapters exist, under which names, and who is still using them. Torch-free and thread-safe.

A *version* is immutable and is its content: two names of equal content are two *uses* of one version, and share its
copy in host memory and its slot on the device. A *name* is a mutable alias of one version. A request resolves its name
once, at admission, and holds a reference to that version until it ends, whatever happens to the name meanwhile. A
version is freed when it has neither a name nor a reference.

The race that ``acquire`` prevents: were looking a name up and counting the request two steps, another thread could
unload or replace the name in between, see no request in flight and free the version; its device slot would go to
another adapter, and the request would be answered by weights it never asked for, without any error. So both are one
step under ``_lock``, and so are ``release``'s decrement and its decision to free.

What freeing sets off (``on_retired``, ``on_freed``, the host tier's ``drop``) comes after ``_lock`` was left, so the
same content may be loaded anew before it arrives. Then it takes away the new version's copy or slot, which costs a
read or an upload and nothing else: where weights are and which weights they are is never inferred from one another.

Locks, always taken in this order: a name's own load lock (two loads of one name never interleave; held through the
slow load), ``_changing`` (one change of the set of names at a time; held through the fsync of the state file) and
``_lock`` (the tables; only ever held for a few dictionary operations, so the step loop never waits for a disk).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Protocol

from manylora.adapters.errors import (
    AdapterError,
    AdapterExists,
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterSourceChanged,
)
from manylora.adapters.registry_names import NameLocks, check_name
from manylora.adapters.registry_state import StateEntry, read_state, write_state
from manylora.adapters.registry_tables import Retired, Tables, Version, info_of
from manylora.adapters.versions import AdapterInfo, AdapterRef, Loaded, RegistryCounts

_log = logging.getLogger(__name__)


class HostStore(Protocol):
    """What is asked of ``adapters.host_tier.HostTier``."""

    def put(self, version: str, weights: Any, nbytes: int) -> None: ...
    def drop(self, version: str) -> None: ...


def _nothing(_ref: AdapterRef) -> None:
    pass


class AdapterRegistry:
    """Names, versions and references of the loaded adapters.

    Args:
        load: reads a source (see adapters.source) into memory; slow, called outside every lock but the name's own.
            Raises ``AdapterError`` or ``OSError`` to refuse, which leaves what was serving as it was.
        host: takes over the weights that were loaded; ``None``: they are let go.
        state_path: JSON file that remembers names and sources across restarts; written before a change takes effect,
            so that a crash never loses an acknowledged one. ``None``: nothing is remembered.
        on_retired: called exactly once for each name and version that it meant, when the name no longer means it and
            no request that came by the name holds it.
        on_freed: called exactly once for each version, when it has neither name nor reference. Both are called outside
            the locks, on whichever thread did it.
        reserved: names that no adapter may take (the base model's).

    Raises:
        RegistryStateError: ``state_path`` exists and cannot be understood (it is left untouched), or, from a method
            that changes the set of names, cannot be written (the change is then not made).
    """

    def __init__(
        self,
        load: Callable[[str], Loaded],
        *,
        host: HostStore | None = None,
        state_path: Path | None = None,
        on_retired: Callable[[AdapterRef], None] = _nothing,
        on_freed: Callable[[AdapterRef], None] = _nothing,
        reserved: Collection[str] = (),
    ) -> None:
        self._load = load
        self._host = host
        self._state_path = state_path
        self._on_retired = on_retired
        self._on_freed = [on_freed]
        self._reserved = frozenset(reserved)
        self._lock = threading.Lock()
        self._changing = threading.Lock()
        self._name_locks = NameLocks()
        self._tables = Tables()
        # What the state file says; changed under ``_changing`` only. It also holds names that are not loaded: not
        # restored yet, or failed to. They stay in every later state file, so that a volume that was not mounted at one
        # start does not lose its adapters for good.
        self._entries = {entry.name: entry for entry in read_state(state_path)} if state_path else {}

    # --- changing the set of names -------------------------------------------------------------------------------

    def load(
        self, name: str, source: str, *, replace: bool = False, pinned: bool = False, remember: bool = True
    ) -> AdapterInfo:
        """Load ``source`` and give it ``name``. Blocks through the load; the name's old version serves until then.

        With ``replace``, requests admitted from now on get the new version; running ones finish on the old. Replacing
        by equal content changes no version (source and pin are still recorded). A pin survives being replaced.
        ``remember``: whether it comes back after a restart.

        Raises: AdapterNameInvalid, AdapterExists (without ``replace``), RegistryStateError, and whatever the ``load``
        callable raises.
        """
        check_name(name, self._reserved)
        source = absolute_source(source)
        with self._name_locks.holding(name):
            if not replace and self._is_taken(name):  # before the slow part: the answer cannot change meanwhile
                raise AdapterExists(name)
            return self._publish(name, source, self._load(source), pinned=pinned, remember=remember)

    def alias(self, name: str, other: str, *, replace: bool = False, pinned: bool = False) -> AdapterInfo:
        """Give ``name`` to the version that ``other`` means now. Nothing is loaded, and both share copy and slot.

        Replacing or unloading ``other`` later does not move the alias.

        Raises: AdapterNotFound for ``other``, AdapterNameInvalid, AdapterExists, RegistryStateError.
        """
        check_name(name, self._reserved)
        if name == other:
            raise AdapterNameInvalid(name, "an alias needs another name than the one it stands for.")
        with self._name_locks.holding(name):
            if not replace and self._is_taken(name):
                raise AdapterExists(name)
            with self._changing:  # so ``other`` keeps its version until the alias has it too
                with self._lock:
                    use = self._tables.named(other)
                info, retired = self._give(name, use.source, use.of, use.ref, pinned=pinned, alias_of=other)
        self._announce(retired)
        return info

    def unload(self, name: str) -> None:
        """Take the name away at once; running requests finish, then the version is freed. AdapterNotFound if unknown.

        A name that is only remembered (its restore failed) is forgotten.
        """
        with self._changing:
            if not self._is_taken(name) and name not in self._entries:
                raise AdapterNotFound(name)
            self._write({other: entry for other, entry in self._entries.items() if other != name})
            with self._lock:
                retired = self._tables.retire(self._tables.names.pop(name, None))
        self._announce(retired)

    def pin(self, name: str, pinned: bool) -> AdapterInfo:
        """Keep the adapter on its device slot and in host memory even when idle (or no longer). AdapterNotFound."""
        with self._changing:
            with self._lock:
                use = self._tables.named(name)
            entry = StateEntry(name, use.source, pinned, use.ref.version, use.alias_of)
            self._write(self._entries | {name: entry})
            with self._lock:
                use.pinned = pinned
            return info_of(use, ready=True)

    def restore(self) -> list[tuple[str, str]]:
        """Load what the state file remembers; returns ``(name, error)`` of those that failed, which stay remembered.

        Names loaded since the start (from the command line) win over remembered ones. A source whose content is not
        what it was is loaded all the same, because the path is what the operator asked for, and a warning names both
        versions. An alias was asked for as a version: it comes back as that version, or fails.
        """
        failures: list[tuple[str, str]] = []
        with self._changing:
            remembered = list(self._entries.values())
        for entry in sorted(remembered, key=lambda entry: entry.alias_of is not None):  # so that aliases load nothing
            try:
                self._restore_one(entry)
            except (AdapterError, OSError) as error:
                _log.error("adapter %s was not restored from %s: %s", entry.name, entry.source, error)
                failures.append((entry.name, str(error)))
        return failures

    def remember(self, entries: Iterable[StateEntry]) -> None:
        """As if the state file had held ``entries``: for ``restore``. RegistryStateError."""
        with self._changing:
            self._write({entry.name: entry for entry in entries} | self._entries)

    def remembered(self) -> list[StateEntry]:
        """What comes back after a restart, whether it is loaded now or not; what was loaded on demand is not in it."""
        with self._changing:
            return list(self._entries.values())

    def follow(self, entry: StateEntry) -> None:
        """Let a name mean exactly the version that it means in another process, loading it if it is not here.

        If that fails the name is only remembered, as after a restore that failed: what it meant is over.
        Raises AdapterSourceChanged if the source holds another version, and what ``load`` raises.
        """
        check_name(entry.name, self._reserved)
        with self._name_locks.holding(entry.name):
            with self._lock:
                use = self._tables.names.get(entry.name)
            if use is not None and use.ref.version == entry.version and self._entries.get(entry.name) == entry:
                return
            try:
                if not self._restore_alias(entry, entry.alias_of):
                    loaded = self._load(entry.source)
                    if loaded.version != entry.version:
                        raise AdapterSourceChanged(entry.name, entry.source, entry.version, loaded.version)
                    self._publish(entry.name, entry.source, loaded, pinned=entry.pinned, alias_of=entry.alias_of)
            except BaseException:
                with self._changing:
                    self._write(self._entries | {entry.name: entry})
                    with self._lock:
                        retired = self._tables.retire(self._tables.names.pop(entry.name, None))
                self._announce(retired)
                raise
            if not entry.pinned:  # a pin survives being replaced
                self.pin(entry.name, False)

    # --- requests ------------------------------------------------------------------------------------------------

    def acquire(self, name: str) -> AdapterRef:
        """The version that ``name`` means now, with one reference taken; give it back with ``release``.

        Raises AdapterNotFound.
        """
        with self._lock:
            use = self._tables.named(name)
            use.references += 1
            use.last_used = time.time()
            return use.ref

    def release(self, ref: AdapterRef) -> None:
        """Give back one reference; the last one of a version that has lost its names frees it."""
        with self._lock:
            use = self._tables.held(ref)
            if use is None:
                raise RuntimeError(f"adapter {ref.name} version {ref.version[:12]} was released more than acquired")
            use.references -= 1
            retired = self._tables.retire(use)
        self._announce(retired)

    # --- looking -------------------------------------------------------------------------------------------------

    def info(self, name: str) -> AdapterInfo:
        """The version that ``name`` means now. Raises AdapterNotFound."""
        with self._lock:
            return info_of(self._tables.named(name), ready=True)

    def is_live(self, version: str) -> bool:
        """Whether the version has a name or a reference."""
        with self._lock:
            return version in self._tables.versions

    def is_pinned(self, version: str) -> bool:
        """Whether it is the current version of a pinned name (an old version is not worth keeping)."""
        with self._lock:
            return any(use.pinned and self._tables.is_named(use) for use in self._tables.uses_of(version))

    def must_keep(self, version: str) -> bool:
        """Whether its weights must stay in host memory: it is pinned, or it has lost its names and requests still run
        on it. The files of such a version may be gone, or replaced by those of the next, so it could not be read again
        although its requests were promised that they finish on it."""
        with self._lock:
            named = [use for use in self._tables.uses_of(version) if self._tables.is_named(use)]
            return any(use.pinned for use in named) or (not named and version in self._tables.versions)

    def sources(self, version: str) -> tuple[str, ...]:
        """Where the version's weights may be read again: the sources of its names, then of those that it has lost."""
        with self._lock:
            uses = sorted(self._tables.uses_of(version), key=lambda use: not self._tables.is_named(use))
            return tuple(dict.fromkeys(use.source for use in uses))

    def sources_in_use(self) -> set[str]:
        """Every source that a name, a running request or the state file may still need."""
        with self._changing, self._lock:
            loaded = {use.source for version in self._tables.versions.values() for use in version.uses.values()}
            return loaded | {entry.source for entry in self._entries.values()}

    def when_freed(self, callback: Callable[[AdapterRef], None]) -> None:
        """Call ``callback`` too when a version is freed, like ``on_freed``."""
        self._on_freed.append(callback)

    def counts(self) -> RegistryCounts:
        with self._lock:
            return self._tables.counts()

    def check_integrity(self) -> None:
        """Raise RuntimeError, with the numbers, if the tables disagree with each other."""
        with self._lock:
            self._tables.check_integrity()

    # --- inside --------------------------------------------------------------------------------------------------

    def _is_taken(self, name: str) -> bool:
        with self._lock:
            return name in self._tables.names

    def _publish(
        self,
        name: str,
        source: str,
        loaded: Loaded,
        *,
        pinned: bool = False,
        remember: bool = True,
        alias_of: str | None = None,
    ) -> AdapterInfo:
        """Give ``name`` to what was loaded; its weights go to the host tier."""
        ref = AdapterRef(
            name,
            loaded.version,
            source,
            footprint=dict(loaded.footprint),
            nbytes=loaded.nbytes,
            not_composable=loaded.not_composable,
            chat_template=loaded.chat_template,
        )
        # Before the name is there, so that its first request finds them.
        if self._host is not None:
            self._host.put(loaded.version, loaded.weights, loaded.nbytes)
        try:
            with self._changing:
                version = Version(loaded.version, loaded.nbytes, loaded.report)
                info, retired = self._give(
                    name, source, version, ref, pinned=pinned, alias_of=alias_of, remember=remember
                )
        finally:
            if self._host is not None and not self.is_live(loaded.version):  # it could not be recorded
                self._host.drop(loaded.version)
        self._announce(retired)
        return info

    def _give(
        self,
        name: str,
        source: str,
        version: Version,
        ref: AdapterRef,
        *,
        pinned: bool,
        alias_of: str | None,
        remember: bool = True,
    ) -> tuple[AdapterInfo, Retired | None]:
        """Let ``name`` mean ``version`` from now on: state file first, then the tables. Caller holds ``_changing``, and
        announces what became of the name's old version."""
        with self._lock:
            old = self._tables.names.get(name)
            pinned = pinned or (old is not None and old.pinned)
        entries = {other: entry for other, entry in self._entries.items() if other != name}
        if remember:
            entries[name] = StateEntry(name, source, pinned, version.digest, alias_of)
        self._write(entries)
        with self._lock:
            use, retired = self._tables.give(name, version, ref, source, pinned=pinned, alias_of=alias_of)
        return info_of(use, ready=True), retired

    def _restore_one(self, entry: StateEntry) -> None:
        check_name(entry.name, self._reserved)
        with self._name_locks.holding(entry.name):
            if self._is_taken(entry.name):
                return
            if entry.alias_of is not None and self._restore_alias(entry, entry.alias_of):
                return
            loaded = self._load(entry.source)
            if entry.alias_of is not None and loaded.version != entry.version:
                raise AdapterSourceChanged(entry.name, entry.source, entry.version, loaded.version)
            self._publish(entry.name, entry.source, loaded, pinned=entry.pinned, alias_of=entry.alias_of)
        if loaded.version != entry.version:
            _log.warning(
                "adapter %s: the content of %s has changed since it was last loaded: version was %s, is now %s",
                entry.name,
                entry.source,
                entry.version,
                loaded.version,
            )

    def _restore_alias(self, entry: StateEntry, alias_of: str | None) -> bool:
        """Whether the name could be given a version that is there already."""
        with self._changing:
            with self._lock:
                uses = [use for use in self._tables.uses_of(entry.version) if self._tables.is_named(use)]
            if not uses:
                return False
            _, retired = self._give(
                entry.name, entry.source, uses[0].of, uses[0].ref, pinned=entry.pinned, alias_of=alias_of
            )
        self._announce(retired)
        return True

    def _announce(self, retired: Retired | None) -> None:
        """Tell of what was retired; outside ``_lock``."""
        if retired is None:
            return
        self._on_retired(retired.ref)
        if retired.freed:
            if self._host is not None:
                self._host.drop(retired.ref.version)
            for callback in self._on_freed:
                callback(retired.ref)

    def _write(self, entries: dict[str, StateEntry]) -> None:
        """Write the state file, if it says anything new; caller holds ``_changing``."""
        if self._state_path is not None and entries != self._entries:
            write_state(self._state_path, entries.values())
        self._entries = entries

    # Last, because its name hides the built-in ``list`` from the annotations after it.
    def list(self, *, draining: bool = False) -> list[AdapterInfo]:
        """Adapters by name; with ``draining`` also the versions that only finish their requests."""
        tables = self._tables
        with self._lock:
            uses = [
                (use, tables.is_named(use)) for version in tables.versions.values() for use in version.uses.values()
            ]
        infos = [info_of(use, ready=ready) for use, ready in uses if ready or draining]
        return sorted(infos, key=lambda info: (info.name, info.state != "ready", info.loaded_at))


def absolute_source(source: str) -> str:
    """``source`` as it will still mean the same from another working directory; hub ids are left as they are.

    Symbolic links are kept: ``current -> v3`` is how some people deploy.
    """
    expanded = os.path.expanduser(source)
    return os.path.abspath(expanded) if os.path.exists(expanded) else source
