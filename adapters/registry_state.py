"""The file that remembers the adapters across restarts: names, sources, pins and the versions they had. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from manylora.adapters.durable import replace_text
from manylora.adapters.errors import RegistryStateError

_FORMAT: Final = 1


@dataclass(frozen=True)
class StateEntry:
    name: str
    source: str
    """Absolute path or hub id."""
    pinned: bool
    version: str
    """What the source contained when it was last loaded."""
    alias_of: str | None = None
    """The name whose version this one was given, if it is an alias: then ``version`` is what was asked for, not
    whatever ``source`` holds."""


def read_state(path: Path) -> list[StateEntry]:
    """The remembered adapters in the order of the file; none if it does not exist.

    Raises RegistryStateError for anything but a well-formed file: starting without the adapters that clients expect,
    and then overwriting the only record of them, would be a guess.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(path, f"it cannot be read: {error}") from error
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise _unusable(path, f"it is not valid JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise _unusable(path, f"its format is {found!r}, and this version of manylora reads format {_FORMAT}")
    adapters = document.get("adapters")
    if not isinstance(adapters, list):
        raise _unusable(path, "it has no list `adapters`")
    entries = [_entry(path, i, value) for i, value in enumerate(adapters)]
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        raise _unusable(path, f"a name occurs twice in `adapters`: {names}")
    return entries


def write_state(path: Path, entries: Iterable[StateEntry]) -> None:
    """Replace the file in one step: after a crash it holds either the old or the new adapters, never half of each.

    Raises RegistryStateError if it cannot be written; the old file is then still there.
    """
    document = {"format": _FORMAT, "adapters": [_as_json(entry) for entry in entries]}
    try:
        replace_text(path, json.dumps(document, indent=2) + "\n")
    except OSError as error:
        raise RegistryStateError(
            f"The list of adapters could not be written to {path}: {error}. Nothing was changed; make room or fix the "
            "permissions, or start without a state file."
        ) from error


def _as_json(entry: StateEntry) -> dict[str, Any]:
    """Without ``alias_of`` where there is none, so that a list without aliases can be read by versions before them."""
    return {key: value for key, value in vars(entry).items() if value is not None}


def _entry(path: Path, index: int, value: Any) -> StateEntry:
    kinds = {"name": str, "source": str, "pinned": bool, "version": str}
    if not isinstance(value, dict) or set(value) - {"alias_of"} != set(kinds):
        raise _unusable(
            path,
            f"adapters[{index}] must have exactly the keys {sorted(kinds)}, and may have alias_of, got {value!r:.200}",
        )
    for key, kind in (kinds | {"alias_of": str}).items():
        if key in value and not isinstance(value[key], kind):
            raise _unusable(path, f"adapters[{index}].{key} must be a {kind.__name__}, got {value[key]!r:.200}")
    return StateEntry(**value)


def _unusable(path: Path, why: str) -> RegistryStateError:
    return RegistryStateError(
        f"The state file {path} is unusable: {why}. It was left as it is. To keep the adapters it names, repair it; to "
        "start without them, move it aside and load them again."
    )
