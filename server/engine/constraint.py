"""What the engine needs of a grammar: which tokens may come next in one request's output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # `manylora --help` comes here, and is to be there at once
    import numpy as np
    import numpy.typing as npt


class ConstraintFailed(ValueError):
    """An output cannot go on within its grammar; the message is fit for a client."""


class Constraint(Protocol):
    """The state of one request's output within its grammar. For one thread, the step loop's."""

    def allow(self, mask: npt.NDArray[np.int32]) -> None:
        """Write which tokens may come next: int32 ``[ceil(vocab_size / 32)]``, bit ``t % 32`` of word ``t // 32`` for
        token ``t``. Tokens that end the sequence are among them where the output may end. Raises ConstraintFailed if
        what is allowed cannot be computed within the limits, or is nothing; the state is then of no more use."""
        ...

    def accept(self, token: int) -> None:
        """``token`` was drawn. Raises ConstraintFailed if it was not allowed."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether the output matches and nothing but its end may follow."""
        ...


class Grammar(Protocol):
    """A compiled grammar, shared by any number of requests and threads."""

    def start(self) -> Constraint:
        """The state before the first token, for one request."""
        ...
