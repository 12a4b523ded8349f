"""What the scheduler keeps of a request besides the request itself: its place among the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manylora.adapters.versions import AdapterRef
from manylora.server.engine.request import Request
from manylora.server.engine.scheduling.prefix_cache import PageKeys

if TYPE_CHECKING:
    from manylora.server.engine.scheduling.accounts import Account

Flow = tuple[str, ...]
"""The versions that a request names, sorted; empty for the base. Their scales are no part of it: a client that varies
them would get a turn for each."""


@dataclass(frozen=True, order=True)
class Rank:
    """A request's place in its tenant's queue; the smallest goes first."""

    priority: int
    is_new: bool
    """False for a preempted request: those come first."""
    tag: int
    number: int
    """Order of submission; unique."""


class Entry:
    """A request and what only the scheduler knows about it. ``needed``: the adapters whose slots it takes.

    ``is_light``: it may go before other tenants' requests (rule 7 in scheduler.py), once. ``charged``: how many of its
    tokens its tenant's clock has counted; a preemption makes no token count twice. ``last_turn``: when it had
    its last turn to decode, in turns of all requests.

    ``keys``: of its pages, None without a prefix cache; ``takes_cached``: it may start with cached ones. Of its pages,
    the first ``num_shown`` are cached; ``is_second``: the next one is not, as another with its key was there before.
    ``queued_tokens``: how many it had to compute when it was queued.
    """

    __slots__ = (
        "account", "charged", "flow", "is_light", "is_second", "keys", "last_turn", "missed_slot", "needed",
        "num_shown", "queued_tokens", "rank", "request", "takes_cached",
    )  # fmt: skip

    def __init__(self, request: Request, rank: Rank, flow: Flow, account: Account, keys: PageKeys | None) -> None:
        self.request = request
        self.rank = rank
        self.flow = flow
        self.account = account
        self.is_light = False
        self.needed = needed_adapters(request)
        self.missed_slot = False
        self.charged = 0
        self.last_turn = 0
        self.keys = keys
        # Whose prompt is scored computes all of it: no cached page has its tokens' log-probabilities.
        self.takes_cached = request.params.prompt_logprobs is None
        self.num_shown = 0
        self.is_second = False
        self.queued_tokens = request.num_tokens

    def __lt__(self, other: Entry) -> bool:
        return self.rank < other.rank

    @property
    def importance(self) -> tuple[int, int]:
        """Sort key among running requests of a tenant: the largest is preempted first."""
        return self.rank.priority, self.rank.number

    @property
    def num_left(self) -> int:
        """Known tokens that are still to be computed: 1 for a running request that decodes."""
        return self.request.num_tokens - self.request.num_computed


def needed_adapters(request: Request) -> Sequence[AdapterRef]:
    """The adapters whose slots it takes; none for the base, and for what merged weights compute."""
    return tuple(use.ref for use in request.adapters) if request.merged is None else ()
