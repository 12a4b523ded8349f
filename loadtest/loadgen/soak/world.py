"""Which weights a name may mean, at each moment: what was loaded and acknowledged, and, while a change is under way,
both.

Requests note the moment at which they are sent; at their end, whatever was possible since then is what may have
answered. A request that ran between two changes so has exactly one right answer.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

ABSENT = "absent"
"""Stands for the version of a name that is not there."""
V = TypeVar("V", bound=Hashable)

Uses = tuple[tuple[str, float], ...]
"""Adapters by name, each with its scale; none for the base."""
Composition = tuple[tuple[str, float], ...]
"""The same by version, sorted."""


def short(version: str) -> str:
    """As much of a version as ``system_fingerprint`` has."""
    return version[:12]


class Possible(Generic[V]):
    """The values that one thing may have had since each moment. One thread changes it, any may look."""

    def __init__(self, value: V) -> None:
        self._moments: list[frozenset[V]] = [frozenset({value})]

    def moment(self) -> int:
        return len(self._moments) - 1

    def now(self) -> frozenset[V]:
        return self._moments[-1]

    def since(self, moment: int) -> frozenset[V]:
        return frozenset[V]().union(*self._moments[moment:])

    def changing(self, value: V) -> None:
        """A change to it was asked for: from now on it may be met, too."""
        self._moments.append(self._moments[-1] | {value})

    def changed(self, value: V) -> None:
        """It was acknowledged: from now on only this one may be met."""
        self._moments.append(frozenset({value}))


Merged = tuple[str, str] | None
"""A version (short) and the mode in which it is merged; None if nothing is."""


class World:
    """``fixed`` adapters by name, with their versions (short), and names that change, absent at first.

    ``compositions``: what the fingerprint says of each that is ever asked for, as seen when it was asked alone."""

    def __init__(self, fixed: Mapping[str, str], changing: Sequence[str], compositions: Mapping[Composition, str]):
        self.names = {name: Possible(short(version)) for name, version in fixed.items()}
        self.names |= {name: Possible(ABSENT) for name in changing}
        self.merge: Possible[Merged] = Possible(None)
        self.merging = threading.Event()
        """Set from before a copy of the weights is made until it is gone."""
        self._compositions = dict(compositions)

    def moments(self, uses: Uses) -> list[int]:
        """To be taken before a request is sent; ``allowed`` takes them back."""
        return [self.merge.moment(), *(self.names[name].moment() for name, _ in uses)]

    def allowed(self, uses: Uses, moments: Sequence[int]) -> frozenset[str]:
        """What the last part of an answer's fingerprint may be, or ABSENT for a 404."""
        if not uses:
            return frozenset({"base"})
        versions = [self.names[name].since(moment) for (name, _), moment in zip(uses, moments[1:], strict=True)]
        found: set[str] = set()
        for combination in itertools.product(*versions):
            if ABSENT in combination:
                found.add(ABSENT)
            elif len(uses) == 1 and uses[0][1] == 1.0:
                found |= {_suffix(combination[0], merged) for merged in self.merge.since(moments[0])}
            else:
                found.add(self._compositions[composition(combination, [scale for _, scale in uses])])
        return frozenset(found)


def _suffix(version: str, merged: Merged) -> str:
    return f"{version}-{merged[1]}" if merged is not None and merged[0] == version else version


def composition(versions: Sequence[str], scales: Sequence[float]) -> Composition:
    """In whatever order it was asked for."""
    return tuple(sorted(zip((short(version) for version in versions), scales, strict=True)))
