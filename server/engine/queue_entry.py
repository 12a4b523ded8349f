"""What the scheduler keeps of a request besides the request itself: its place among the others, and its share of the
step in the making."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from manylora.adapters.versions import AdapterRef
from manylora.server.engine.request import Request, ScheduledRow

Flow = tuple[str, ...]
"""The versions that a request names, sorted; empty for the base. Their scales are no part of it: a client that varies
them would get a turn for each."""


@dataclass(frozen=True, order=True)
class Rank:
    """A request's place in the queue; the smallest goes first."""

    priority: int
    is_new: bool
    """False for a preempted request: those come first."""
    tag: int
    number: int
    """Order of submission; unique."""


class Entry:
    """A request and what only the scheduler knows about it. ``needed``: the adapters whose slots it takes."""

    __slots__ = ("flow", "missed_slot", "needed", "rank", "request")

    def __init__(self, request: Request, rank: Rank, flow: Flow) -> None:
        self.request = request
        self.rank = rank
        self.flow = flow
        self.needed = needed_adapters(request)
        self.missed_slot = False

    def __lt__(self, other: Entry) -> bool:
        return self.rank < other.rank

    @property
    def importance(self) -> tuple[int, int]:
        """Sort key among running requests: the largest is preempted first."""
        return self.rank.priority, self.rank.number


@dataclass
class Step:
    """The rows of a step in the making, and the tokens it may still take."""

    budget: int
    rows: dict[Request, ScheduledRow] = field(default_factory=dict)

    def add(self, request: Request, count: int) -> None:
        self.rows[request] = ScheduledRow(request, request.num_computed, count)
        self.budget -= count

    def drop(self, request: Request) -> None:
        row = self.rows.pop(request, None)
        self.budget += row.count if row else 0


def needed_adapters(request: Request) -> Sequence[AdapterRef]:
    """The adapters whose slots it takes; none for the base, and for what merged weights compute."""
    return tuple(use.ref for use in request.adapters) if request.merged is None else ()
