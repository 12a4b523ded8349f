"""What the log, the metrics and the trace tell of one request that is over. Never a key, never a prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from starlette.routing import BaseRoute, Route
from starlette.types import Scope

from manylora.server.api.context import RequestContext

OTHER: Final = "_other"
"""The route of every path that has none, and the method of every request with an unusual one: names that clients make
up must not make series."""

PROBES: Final = frozenset({"/health", "/ready", "/metrics"})
"""Routes that machines ask every few seconds."""

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@dataclass(frozen=True)
class Observed:
    """A request that is over."""

    scope: Scope
    context: RequestContext
    method: str
    route: str
    """The template that its path matched, such as ``/v1/models/{model}``, or ``OTHER``."""
    status: int
    ended: float
    """``time.monotonic()`` seconds."""

    @property
    def seconds(self) -> float:
        return self.ended - self.context.arrived

    @property
    def completion_tokens(self) -> int:
        return sum(finish.completion_tokens for finish in self.context.finished)

    @property
    def finish_reasons(self) -> list[str]:
        """By choice, in the order in which they ended."""
        return [finish.reason for finish in self.context.finished]

    @property
    def queue_seconds(self) -> float | None:
        """Of the choice that waited longest for its first step (or in vain); None if none was submitted."""
        times = [finish.times for finish in self.context.finished if finish.times is not None]
        waits = [(one.ended if one.scheduled is None else one.scheduled) - one.arrived for one in times]
        return max(waits, default=None)

    @property
    def first_token_seconds(self) -> float | None:
        """From the request's arrival to the first token of any choice; None if there was none."""
        times = [finish.times for finish in self.context.finished if finish.times is not None]
        firsts = [one.first_token - self.context.arrived for one in times if one.first_token is not None]
        return min(firsts, default=None)


class Observation:
    """``ContextMiddleware``'s observer: looks once at what happened and tells each of ``listeners``.

    ``routes``: those whose templates requests are known by that were answered before they were routed.
    """

    def __init__(self, routes: Iterable[BaseRoute], listeners: Sequence[Callable[[Observed], Any]]) -> None:
        self._listeners = tuple(listeners)
        self._patterns = [(route.path_regex, route.path) for route in routes if isinstance(route, Route)]

    def __call__(self, scope: Scope, context: RequestContext) -> None:
        method = scope["method"] if scope["method"] in _METHODS else OTHER
        # A response that was never begun: the application returned without one, as it may when its client has gone.
        status = 499 if context.status is None else context.status
        observed = Observed(scope, context, method, self._route(scope), status, time.monotonic())
        for listener in self._listeners:
            listener(observed)

    def _route(self, scope: Scope) -> str:
        route = scope.get("route")
        if route is not None:
            path: str = route.path
            return path
        return next((path for pattern, path in self._patterns if pattern.match(scope["path"])), OTHER)
