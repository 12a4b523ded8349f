"""What a fleet's names mean, and the files that remember it.

The adapters are in ``adapters.json``, the very file a single server keeps, so that a server can become a fleet and go
back. ``fleet.json`` beside it has what a single server does not remember: the merge, and which flags have been
followed already.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from manylora.adapters.durable import replace_text
from manylora.adapters.errors import RegistryStateError
from manylora.adapters.registry_state import StateEntry, read_state, write_state

_FORMAT: Final = 1
_MAX_SEEDS: Final = 64
"""Sets of flags that are remembered to have been followed; the oldest are forgotten."""


@dataclass(frozen=True)
class Merge:
    """An adapter version that somebody asked to have merged (automatic merges are each replica's own affair)."""

    name: str
    version: str
    mode: str


@dataclass(frozen=True)
class FleetState:
    """What every replica is to have. Equal states mean the same; see ``of``."""

    adapters: tuple[StateEntry, ...] = ()
    """By name."""
    merge: Merge | None = None

    @classmethod
    def of(cls, adapters: Iterable[StateEntry], merge: Merge | None = None) -> FleetState:
        return cls(tuple(sorted(adapters, key=lambda entry: entry.name)), merge)

    @property
    def sources(self) -> frozenset[str]:
        """Where the adapters' files are."""
        return frozenset(os.path.realpath(entry.source) for entry in self.adapters)


class FleetFiles:
    """The two files in ``directory``. Methods raise RegistryStateError, and then nothing was changed."""

    def __init__(self, directory: Path) -> None:
        self._adapters = directory / "adapters.json"
        self._rest = directory / "fleet.json"
        self.uploads: Final = directory / "uploads"

    def read(self) -> tuple[FleetState, tuple[str, ...]]:
        """The state, and the seeds (see ``Fleet``) that were followed to come to it."""
        merge, seeds = _read_rest(self._rest)
        return FleetState.of(read_state(self._adapters), merge), seeds

    def write(self, state: FleetState, seeds: Iterable[str]) -> None:
        """Remember both. The adapters last: were only the first of two writes to reach the disk, then a merge would be
        remembered of a version that its name does not mean, which is passed over."""
        kept = list(dict.fromkeys(seeds))[-_MAX_SEEDS:]
        merge = None if state.merge is None else vars(state.merge)
        _replace(self._rest, json.dumps({"format": _FORMAT, "merge": merge, "seeds": kept}, indent=2) + "\n")
        write_state(self._adapters, state.adapters)


def _read_rest(path: Path) -> tuple[Merge | None, tuple[str, ...]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None, ()
    except (OSError, UnicodeDecodeError) as error:
        raise RegistryStateError(f"The file {path} cannot be read: {error}.") from error
    try:
        return _parsed(json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        raise RegistryStateError(
            f"The file {path} is unusable ({error!r}). It was left as it is; move it aside to start without the merge "
            "that it may remember."
        ) from error


def _parsed(document: Any) -> tuple[Merge | None, tuple[str, ...]]:
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ValueError(f"not format {_FORMAT}")
    merge, seeds = document["merge"], document["seeds"]
    if not isinstance(seeds, list) or not all(isinstance(seed, str) for seed in seeds):
        raise ValueError("`seeds` is not a list of strings")
    if merge is None:
        return None, tuple(seeds)
    if not isinstance(merge, dict) or not all(isinstance(value, str) for value in merge.values()):
        raise ValueError("`merge` is not an object of strings")
    return Merge(**merge), tuple(seeds)


def _replace(path: Path, text: str) -> None:
    """Write ``path`` in one step."""
    try:
        replace_text(path, text)
    except OSError as error:
        raise RegistryStateError(f"{path} could not be written: {error}. Nothing was changed.") from error
