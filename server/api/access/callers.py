"""Who sends a request, and what they may do with adapters."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from manylora.adapters.registry_names import MAX_NAME_LENGTH
from manylora.server.api.access.rate_limits import RateLimits
from manylora.server.engine.tenant import EVERYBODY, Tenant


class NamePatterns:
    """Names of adapters, with ``*`` and ``?`` for any characters. Upper and lower case differ, as they do in names."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._matches = re.compile("|".join(map(fnmatch.translate, patterns)) or r"(?!)").match

    def match(self, name: str) -> bool:
        # No adapter has a longer name, and a pattern with many stars takes long over long ones.
        return len(name) <= MAX_NAME_LENGTH and self._matches(name) is not None


@dataclass(frozen=True)
class Caller:
    """The bearer of a key, or anybody where none is needed."""

    tenant: Tenant = EVERYBODY
    adapters: NamePatterns | None = field(default=None, compare=False)
    """Of the adapters that may be used, and seen; None for all."""
    may_use_base: bool = True
    """Whether the base alone may be used, and seen."""
    limits: RateLimits | None = field(default=None, repr=False, compare=False)
    is_admin: bool = False
    """Whether adapters may be managed."""

    @property
    def may_use_all(self) -> bool:
        """Whether no name is kept from this caller."""
        return self.adapters is None

    def permitted(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of ``names`` that may be used, whether they exist or not."""
        patterns = self.adapters
        return tuple(names if patterns is None else (name for name in names if patterns.match(name)))

    def may_use(self, names: Sequence[str]) -> bool:
        """Whether any of ``names`` may be used, and seen."""
        return bool(self.permitted(names))


ANYBODY = Caller()
"""Where no key is needed."""
ADMIN = Caller(is_admin=True)
"""The bearer of the admin key."""
