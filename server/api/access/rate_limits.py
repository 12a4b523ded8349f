"""How much of the server a tenant may use over time: token buckets, on the event loop's thread alone.

Requests are paid for when they come, each choice as one. Tokens are paid for when they are known, a prompt's once for
each choice: a request is taken while the tenant owes nothing, so what comes at once can overdraw the budget, and then
the tenant waits until the debt is paid off. So its tokens per minute hold on average, without anybody guessing how long
an output will be.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from manylora.server.tenants_file import TenantRules

Clock = Callable[[], float]


class RateLimited(Exception):
    """The message has the limit and is fit for a client."""

    def __init__(self, limit: str, wait: float) -> None:
        self.retry_after = max(1, math.ceil(wait))
        """Whole seconds: the value of the ``Retry-After`` header."""
        super().__init__(f"This key may use {limit}. Try again in {self.retry_after} s.")


class Bucket:
    """Holds up to ``capacity`` and is filled at ``rate`` a second; full at first. May be overdrawn."""

    def __init__(self, rate: float, capacity: float, clock: Clock) -> None:
        self.rate = rate
        self.capacity = capacity
        self._clock = clock
        self._level = capacity
        self._at = clock()

    def level(self) -> float:
        now = self._clock()
        self._level = min(self.capacity, self._level + (now - self._at) * self.rate)
        self._at = now
        return self._level

    def take(self, amount: float) -> None:
        self._level = self.level() - amount

    def seconds_until(self, amount: float) -> float:
        """Until it holds ``amount``; 0 if it does now."""
        return max(0.0, (amount - self.level()) / self.rate)

    def change(self, rate: float, capacity: float) -> None:
        """Other numbers from now on. What was used stays used, but is no debt under the new ones if it was none under
        the old."""
        level = self.level()
        used = self.capacity - level
        self.rate, self.capacity = rate, capacity
        self._level = max(capacity - used, min(level, 0.0))


class RateLimits:
    """The limits of one tenant, over all of its keys and connections."""

    def __init__(self, rules: TenantRules, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self.change(rules)

    def change(self, rules: TenantRules) -> None:
        """Other limits from now on; what was used of those that stay is not given back."""
        rate, tokens = rules.requests_per_second, rules.tokens_per_minute
        self._requests = self._changed(self._requests, rate, rules.burst)
        self._tokens = self._changed(self._tokens, None if tokens is None else tokens / 60, float(tokens or 0))

    def _changed(self, bucket: Bucket | None, rate: float | None, capacity: float) -> Bucket | None:
        if rate is None:
            return None
        if bucket is None:
            return Bucket(rate, capacity, self._clock)
        bucket.change(rate, capacity)
        return bucket

    @property
    def max_choices(self) -> int | None:
        """Choices that can ever be paid for at once; None for any number."""
        return None if self._requests is None else int(self._requests.capacity)

    def take_requests(self, n_requests: int) -> None:
        """Pay for requests, or for further choices of one. Raises RateLimited if they come too soon; then none is
        paid for."""
        # What overdraws the tokens is a debt: a tenant without one may begin.
        if self._tokens is not None and (wait := self._tokens.seconds_until(0.0)) > 0.0:
            raise RateLimited(f"{self._tokens.rate * 60:.0f} tokens a minute, of prompts and outputs", wait)
        if self._requests is None:
            return
        if (wait := self._requests.seconds_until(n_requests)) > 0.0:
            shown = f"{self._requests.rate:g} requests a second and {self._requests.capacity:.0f} at once"
            raise RateLimited(f"{shown}, each choice counted as one", wait)
        self._requests.take(n_requests)

    def spend_tokens(self, n_tokens: int) -> None:
        """Pay for tokens that were computed, be there so many or not."""
        if self._tokens is not None:
            self._tokens.take(n_tokens)
