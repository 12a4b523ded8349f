"""Prompts that take long are made on threads of their own, a few at a time for each tenant.

A conversation is written by a template, which is code that somebody brought, and a long text is tokenised for a good
part of a second. No tenant can take all the threads, and what else is done on threads (looking after files, above all)
waits for none of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, ParamSpec, TypeVar

THREADS: Final = 8
JOBS_PER_TENANT: Final = 2
"""At once; more of them wait."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class _Turns:
    free: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(JOBS_PER_TENANT))
    n_users: int = 0
    """Jobs that run or wait."""


class PromptWork:
    """Only the event loop's thread comes here."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="manylora-prompt")
        self._turns: dict[str, _Turns] = {}

    @property
    def n_tenants(self) -> int:
        """Those that have jobs."""
        return len(self._turns)

    async def run(self, tenant: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What ``function`` returns or raises, on another thread."""
        turns = self._turns.setdefault(tenant, _Turns())
        turns.n_users += 1
        try:
            async with turns.free:
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))
        finally:
            turns.n_users -= 1
            if not turns.n_users:
                del self._turns[tenant]
