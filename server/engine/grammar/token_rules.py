"""Rules on single tokens, as a grammar: only these may be drawn, and these sequences never.

Torch-free. They may stand on top of another grammar, whose outputs they narrow down.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from manylora.server.engine.constraint import Constraint, ConstraintFailed, Grammar

_Mask = npt.NDArray[np.int32]


class TokenRules:
    """A ``constraint.Grammar``: outputs of ``allowed`` tokens alone (None: of any) in which none of ``banned``, each a
    sequence of tokens, occurs; and, if ``grammar`` is given, that match it.

    Tokens that the model has no logits for are none of the rules' (a tokenizer may know more than ``lm_head``).

    The end of the sequence is a token like any other: an output may end only where an end is allowed.
    """

    def __init__(
        self,
        *,
        allowed: Collection[int] | None = None,
        banned: Collection[Sequence[int]] = (),
        grammar: Grammar | None = None,
    ) -> None:
        self._allowed = None if allowed is None else np.fromiter(set(allowed), np.int64)
        self.banned = tuple(dict.fromkeys(tuple(sequence) for sequence in banned if sequence))
        self.longest = max(map(len, self.banned), default=0)
        self._grammar = grammar
        self._masks: dict[int, _Mask] = {}

    def start(self) -> Constraint:
        return _State(self, None if self._grammar is None else self._grammar.start())

    def mask(self, n_words: int) -> _Mask | None:
        """The allowed tokens as ``Constraint.allow`` writes them; None if all are."""
        if self._allowed is None:
            return None
        if n_words not in self._masks:
            bits = np.zeros(32 * n_words, np.uint8)
            bits[self._allowed[self._allowed < bits.size]] = 1
            self._masks[n_words] = np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
        return self._masks[n_words]


class _State:
    """The output's last tokens, as far as a banned sequence could have begun in them."""

    def __init__(self, rules: TokenRules, inner: Constraint | None) -> None:
        self._rules, self._inner = rules, inner
        self._last: tuple[int, ...] = ()

    def allow(self, mask: _Mask) -> None:
        if self._inner is None:
            mask.fill(-1)
        else:
            self._inner.allow(mask)
        allowed = self._rules.mask(len(mask))
        if allowed is not None:
            mask &= allowed
        for token in self._banned_now():
            word, bit = divmod(token, 32)
            if word < len(mask):
                mask[word] &= np.int32(~(1 << bit) if bit < 31 else 0x7FFFFFFF)
        if not mask.any():
            raise ConstraintFailed("allowed_token_ids, bad_words and the response's format together leave no token.")

    def _banned_now(self) -> list[int]:
        return [s[-1] for s in self._rules.banned if len(s) == 1 or self._last[-len(s) + 1 :] == s[:-1]]

    def accept(self, token: int) -> None:
        if self._inner is not None:
            self._inner.accept(token)
        if self._rules.longest > 1:
            self._last = (*self._last, token)[-self._rules.longest + 1 :]

    @property
    def is_complete(self) -> bool:
        return self._inner is not None and self._inner.is_complete
