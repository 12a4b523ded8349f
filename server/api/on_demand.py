"""Requests that name adapters which are not loaded yet: load them first, without holding up anybody else.

Only the event loop's thread comes here; the disk is read on threads of its own. Requests for one name share its load.
What was not found, or could not be served, is not looked for again for a few seconds, so that a flood of unknown names
costs a look-up in a table each.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

from manylora.adapters.errors import AdapterError, AdapterNotFound, without_frames
from manylora.adapters.on_demand import OnDemand
from manylora.server.api.access.callers import Caller
from manylora.server.api.access.rate_limits import RateLimited, RateLimits
from manylora.server.api.errors import ApiError, as_api_error, bad_request, too_many_requests
from manylora.server.api.state import AppState
from manylora.server.api.targets import Lease, Target

_log = logging.getLogger(__name__)

REMEMBERED_FOR_S: Final = 3.0
"""Seconds during which a name that could not be loaded is not tried again."""
MAX_REMEMBERED: Final = 4096
"""Such names that are remembered; beyond, the oldest are tried again."""
MAX_LOADING: Final = 64
"""Names looked for at a time; a request for one more is told to come again."""

_ATTEMPTS: Final = 3
"""To take hold of what was loaded, before others' loads make the server forget it."""


class OnDemandLoads:
    """``ensure`` a name is loaded. ``executor`` runs ``source.load``."""

    def __init__(self, source: OnDemand, executor: Executor, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._executor = executor
        self._clock = clock
        self._loading: dict[str, asyncio.Task[AdapterError | bool]] = {}
        self._failed: OrderedDict[str, tuple[float, AdapterError | bool]] = OrderedDict()

    async def ensure(self, name: str) -> bool:
        """Load ``name``; whether there is such a folder. Raises AdapterError if it cannot be served, ApiError 503 if
        too many are being loaded."""
        until, outcome = self._failed.get(name, (0.0, False))
        if self._clock() >= until:
            task = self._loading.get(name)
            if task is None:
                if len(self._loading) >= MAX_LOADING:
                    raise ApiError(
                        503,
                        f"{MAX_LOADING} adapters are being looked for already; try again.",
                        headers={"Retry-After": "1"},
                    )
                task = self._loading[name] = asyncio.create_task(self._load(name))
            # Shielded: a client that goes away does not end what others wait for.
            outcome = await asyncio.shield(task)
        if isinstance(outcome, AdapterError):
            raise outcome
        return outcome

    async def _load(self, name: str) -> AdapterError | bool:
        outcome: AdapterError | bool
        try:
            outcome = await asyncio.get_running_loop().run_in_executor(self._executor, self._source.load, name)
        except AdapterError as error:
            without_frames(error)
            outcome = error
        finally:
            del self._loading[name]
        if outcome is not True:
            self._failed.pop(name, None)
            self._failed[name] = (self._clock() + REMEMBERED_FOR_S, outcome)
            if len(self._failed) > MAX_REMEMBERED:
                self._failed.popitem(last=False)
        return outcome


async def admit(state: AppState, target: Target, n_choices: int, caller: Caller) -> Target:
    """See that the target exists and the caller may use it, and have the caller pay for the choices; before any work is
    done for it, during which nothing is held. Raises ApiError, AdapterError.

    Returns the target by the names that the caller may use.
    """
    target = target.permitted(caller)
    if caller.limits is not None:
        _pay(caller.limits, n_choices)
    (await lease(state, target, 1, caller)).close()
    return target


async def lease(state: AppState, target: Target, count: int, caller: Caller) -> Lease:
    """``target.lease``, after loading what is named and not there, if that is on. Raises ApiError, AdapterError."""
    target = target.permitted(caller)  # before anything is loaded for it
    loads = state.on_demand
    if loads is not None and not state.serving.engine.is_draining:
        for _ in range(_ATTEMPTS):
            loaded = await _ensure_all(state, loads, target, caller)
            if not any(loaded):
                break
            try:
                return target.lease(state.serving, count, caller)
            except ApiError as error:
                if error.status != 404:
                    raise
        else:
            raise ApiError(
                503,
                "The adapters asked for were loaded, and forgotten again before the request could begin: more names "
                "are asked for at once than --adapters-on-demand allows.",
                param=target.param,
                headers={"Retry-After": "1"},
            )
    return target.lease(state.serving, count, caller)


def _pay(limits: RateLimits, n_choices: int) -> None:
    """For the choices besides the first, which the request itself was paid for with. Raises ApiError."""
    if limits.max_choices is not None and n_choices > limits.max_choices:
        raise bad_request(
            f"The request has {n_choices} choices (`n` for each prompt), and this key may have {limits.max_choices} "
            "at once.",
            "n",
        )
    if n_choices > 1:
        try:
            limits.take_requests(n_choices - 1)
        except RateLimited as error:
            raise too_many_requests(str(error), error.retry_after) from None


async def _ensure_all(state: AppState, loads: OnDemandLoads, target: Target, caller: Caller) -> list[bool]:
    """For each adapter of the target, whether it had to be loaded, and could be. Raises ApiError, AdapterError."""
    try:
        return [await _ensure_one(state, loads, wanted.names) for wanted in target.adapters]
    except AdapterError as error:
        if caller.may_use_all:
            raise
        # What is wrong with it names files of this machine.
        _log.warning("an adapter that a tenant asked for cannot be served: %s", error)
        known = as_api_error(error)
        raise ApiError(known.status, "The adapter cannot be served.", param=target.param) from None


async def _ensure_one(state: AppState, loads: OnDemandLoads, names: tuple[str, ...]) -> bool:
    """Whether one of ``names`` had to be loaded, and could be."""
    for name in names:
        try:
            state.serving.registry.info(name)
        except AdapterNotFound:
            continue
        return False
    for name in names:
        if await loads.ensure(name):
            return True
    return False
