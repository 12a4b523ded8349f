"""Who a request is computed for, as far as the engine needs to know it: to share the device fairly, and to count."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tenant:
    """One of those who share the server. ``share`` is a weight: twice the share is twice the work when both wait.

    ``max_waiting``: its requests that the engine holds, besides ``max_rows``, before it refuses more of them; None for
    the engine's own limit.
    """

    name: str
    share: float = 1.0
    max_waiting: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < math.inf:
            raise ValueError(f"a tenant's share must be a positive number, got {self.share}")


EVERYBODY = Tenant("")
"""The one tenant of a server without tenants."""
