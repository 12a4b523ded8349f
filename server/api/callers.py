"""Who sends a request, and what they may do with adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manylora.server.engine.tenant import EVERYBODY, Tenant


@dataclass(frozen=True)
class Caller:
    """The bearer of a key, or anybody where none is needed."""

    tenant: Tenant = EVERYBODY

    def may_use(self, names: Sequence[str]) -> bool:
        """Whether the adapter that any one of ``names`` means may be used, and seen."""
        return True

    @property
    def may_use_base(self) -> bool:
        """Whether the base alone may be used, and seen."""
        return True


ANYBODY = Caller()
