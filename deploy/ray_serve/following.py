"""A replica's registry and merge, read as a fleet's state, and made to be one. Torch-free."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Protocol

from manylora.adapters.errors import AdapterError, AdapterNotFound
from manylora.adapters.registry import AdapterRegistry
from manylora.deploy.ray_serve.fleet_state import FleetState, Merge
from manylora.server.engine.errors import EngineRefusal

_log = logging.getLogger(__name__)


class MergeLike(Protocol):
    """``engine.merges.MergeInfo``."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def mode(self) -> str: ...
    @property
    def automatic(self) -> bool: ...


class MergesLike(Protocol):
    """``engine.merges.MergeManager``."""

    @property
    def current(self) -> MergeLike | None: ...
    def merge(self, name: str, mode: str) -> object: ...
    def unmerge(self) -> object: ...


def state_of(registry: AdapterRegistry, merges: MergesLike) -> FleetState:
    """What comes back after a restart, be it loaded now or not, and the merge that was asked for."""
    current = merges.current
    merge = None
    if current is not None and not current.automatic:
        merge = Merge(current.name, current.version, current.mode)
    return FleetState.of(registry.remembered(), merge)


def follow(state: FleetState, registry: AdapterRegistry, merges: MergesLike) -> Mapping[str, str]:
    """Have ``state``; the names that could not be had, each with the reason. They are remembered, so that the replica's
    own state has them, too. What was loaded on demand stays."""
    names = {entry.name for entry in state.adapters}
    for entry in registry.remembered():
        if entry.name not in names:
            with contextlib.suppress(AdapterNotFound):
                registry.unload(entry.name)
    missing: dict[str, str] = {}
    # Aliases last, so that they load nothing.
    for entry in sorted(state.adapters, key=lambda entry: entry.alias_of is not None):
        try:
            registry.follow(entry)
        except (AdapterError, OSError) as error:
            missing[entry.name] = str(error)
    try:
        _follow_merge(state.merge, registry, merges)
    except (AdapterError, EngineRefusal) as error:
        # It is served all the same, and ``system_fingerprint`` says how.
        _log.error("the merge is not as it is elsewhere: %s", error)
    return missing


def _follow_merge(wanted: Merge | None, registry: AdapterRegistry, merges: MergesLike) -> None:
    """Raises MergeRefused, MergeBusy, EngineDraining or AdapterNotFound."""
    current = merges.current
    if wanted is None:
        if current is not None and not current.automatic:
            merges.unmerge()
        return
    if current is not None and (current.version, current.mode) == (wanted.version, wanted.mode):
        return
    # A merge of a version that its name no longer means serves nobody who comes from now on.
    if registry.info(wanted.name).version == wanted.version:
        merges.merge(wanted.name, wanted.mode)
