"""From a key that was sent to who sent it: the keys of the command line, and those of the key file.

A key is looked up by a digest that depends on a secret of this process. So how long a look-up takes, which digests it
is compared with included, tells nothing about any key to those who do not know the secret; and it takes no longer with
ten thousand keys than with one.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from manylora.server.api.access.callers import ADMIN, ANYBODY, Caller, NamePatterns
from manylora.server.api.access.rate_limits import Clock, RateLimits
from manylora.server.config import ApiConfig
from manylora.server.tenants_file import MAX_KEY_LENGTH, TenantRules, hashed


class KeyRing:
    """Who bears which key. On the event loop's thread alone.

    Raises ConfigError if the key file is wrong.
    """

    def __init__(self, config: ApiConfig, clock: Clock = time.monotonic) -> None:
        self.needs_key = bool(config.api_keys) or config.keys_file is not None
        """Whether requests need a key at all."""
        self._config = config
        self._clock = clock
        self._secret = os.urandom(32)
        self._callers: dict[bytes, Caller] = {}
        self._limits: dict[str, RateLimits] = {}
        self._when_changed: list[Callable[[Collection[str]], None]] = []
        self.replace(config.read_tenants())

    @property
    def path(self) -> Path | None:
        """The key file."""
        return self._config.keys_file

    def find(self, key: str) -> Caller | None:
        """Who bears ``key``; None if nobody does."""
        return self._callers.get(self._blinded(hashed(key))) if len(key) <= MAX_KEY_LENGTH else None

    @property
    def tenants(self) -> frozenset[str]:
        """The names of those in the key file."""
        return frozenset(self._limits)

    def when_changed(self, callback: Callable[[Collection[str]], None]) -> None:
        """Have ``callback`` told the names of all tenants whenever there are others."""
        self._when_changed.append(callback)

    async def reload(self) -> None:
        """Read the key file again, on another thread: a large one takes its time. Raises ConfigError, and then
        everything stays as it was."""
        self.replace(await asyncio.to_thread(self._config.read_tenants))

    def replace(self, tenants: tuple[TenantRules, ...]) -> None:
        """These tenants from now on. What one has used of its limits it has still used; requests that run finish."""
        limits = {}
        callers = dict(self._own_keys())
        for rules in tenants:
            name = rules.tenant.name
            known = self._limits.get(name)
            if known is None:
                known = RateLimits(rules, self._clock)
            else:
                known.change(rules)
            limits[name] = known
            caller = Caller(rules.tenant, NamePatterns(rules.adapters), rules.base, known)
            callers.update((self._blinded(key), caller) for key in rules.keys)
        self._callers, self._limits = callers, limits
        for callback in self._when_changed:
            callback(self.tenants)

    def _own_keys(self) -> Iterator[tuple[bytes, Caller]]:
        for key in self._config.api_keys:
            yield self._blinded(hashed(key)), ANYBODY
        if self._config.admin_key is not None:
            yield self._blinded(hashed(self._config.admin_key)), ADMIN

    def _blinded(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._secret, digest_size=32).digest()
