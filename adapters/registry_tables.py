"""The registry's tables: names, versions, and which name's requests hold which version. Torch-free.

Plain data without locks: adapters.registry guards every call with its own.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from manylora.adapters.errors import AdapterNotFound
from manylora.adapters.versions import AdapterInfo, AdapterRef, RegistryCounts


@dataclass(eq=False)
class Version:
    """One content, whatever names it has."""

    digest: str
    nbytes: int
    report: Any
    uses: dict[str, Use] = field(default_factory=dict)
    """By name; never empty while the version is in the tables."""


@dataclass(eq=False)
class Use:
    """One name of one version: the name means it now, or requests that came by the name still run on it."""

    ref: AdapterRef
    of: Version
    source: str
    loaded_at: float
    pinned: bool = False
    alias_of: str | None = None
    references: int = 0
    last_used: float | None = None


@dataclass(frozen=True)
class Retired:
    """A use that is gone; ``freed``: and its version with it, as it was the last."""

    ref: AdapterRef
    freed: bool


class Tables:
    """``names``: what each name means. A use is kept while its name means it or references are held; a version, while
    it has uses."""

    def __init__(self) -> None:
        self.names: dict[str, Use] = {}
        self.versions: dict[str, Version] = {}

    def named(self, name: str) -> Use:
        """Raises AdapterNotFound."""
        try:
            return self.names[name]
        except KeyError:
            raise AdapterNotFound(name) from None

    def is_named(self, use: Use) -> bool:
        """Whether its name still means it."""
        return self.names.get(use.ref.name) is use

    def uses_of(self, version: str) -> Collection[Use]:
        found = self.versions.get(version)
        return () if found is None else found.uses.values()

    def held(self, ref: AdapterRef) -> Use | None:
        """The use that ``ref`` was acquired from, if it has references."""
        version = self.versions.get(ref.version)
        use = version.uses.get(ref.name) if version is not None else None
        return use if use is not None and use.references > 0 else None

    def give(
        self, name: str, version: Version, ref: AdapterRef, source: str, *, pinned: bool, alias_of: str | None
    ) -> tuple[Use, Retired | None]:
        """Let ``name`` mean ``version``: the use, and what the name's old one became."""
        # Equal content may be there already, by another name, as this name's current version or finishing its last
        # requests: then that one is the version, and what was just made is let go.
        version = self.versions.setdefault(version.digest, version)
        use = version.uses.get(name)
        if use is None:
            use = Use(replace(ref, name=name, source=source), version, source, time.time())
            version.uses[name] = use
        use.source, use.pinned, use.alias_of = source, pinned, alias_of
        old = self.names.get(name)
        self.names[name] = use
        return use, self.retire(old)

    def retire(self, use: Use | None) -> Retired | None:
        """Forget a use that has neither its name nor a reference; None if it still has one of them."""
        if use is None or use.references > 0 or self.is_named(use):
            return None
        del use.of.uses[use.ref.name]
        if use.of.uses:
            return Retired(use.ref, freed=False)
        del self.versions[use.of.digest]
        return Retired(use.ref, freed=True)

    def counts(self) -> RegistryCounts:
        uses = [use for version in self.versions.values() for use in version.uses.values()]
        return RegistryCounts(
            ready=len(self.names),
            draining=len(uses) - len(self.names),
            requests_in_flight=sum(use.references for use in uses),
            nbytes=sum(version.nbytes for version in self.versions.values()),
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError, with the numbers, if the tables disagree with each other."""
        for name, use in self.names.items():
            found = self.versions.get(use.ref.version)
            if name != use.ref.name or found is not use.of or found.uses.get(name) is not use:
                raise RuntimeError(f"registry: name {name} points to a version that is not in the table")
        for digest, version in self.versions.items():
            if digest != version.digest or not version.uses:
                raise RuntimeError(f"registry: version {digest[:12]} has no use, and was not freed")
            for name, use in version.uses.items():
                is_named = self.names.get(name) is use
                if use.references < 0 or (use.references == 0 and not is_named):
                    raise RuntimeError(
                        f"registry: {name} version {digest[:12]} has {use.references} references and "
                        f"{'a' if is_named else 'no'} name, and was not freed"
                    )


def info_of(use: Use, *, ready: bool) -> AdapterInfo:
    """What is shown of a use; ``ready``: whether its name means it."""
    return AdapterInfo(
        name=use.ref.name,
        version=use.ref.version,
        source=use.source,
        pinned=use.pinned and ready,
        state="ready" if ready else "draining",
        requests_in_flight=use.references,
        nbytes=use.of.nbytes,
        loaded_at=use.loaded_at,
        last_used=use.last_used,
        alias_of=use.alias_of,
        report=use.of.report,
    )
