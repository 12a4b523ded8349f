"""What the scheduler needs of speculation: guesses at the next tokens of one request, which the model then checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Drafter(Protocol):
    """Guesses for one request; its own, not shared. For one thread, the step loop's."""

    def propose(self, prompt: Sequence[int], output: Sequence[int], limit: int) -> Sequence[int]:
        """At most ``limit`` tokens that may follow ``prompt + output``, which only ever grows by tokens at its end.
        Asking again without ``judge`` in between gives the same."""
        ...

    def judge(self, drafted: int, accepted: int) -> None:
        """Of what was proposed last, the first ``drafted`` tokens (at least 1) were checked, and the first ``accepted``
        of them were drawn."""
        ...
