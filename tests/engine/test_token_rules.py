"""Allowed tokens and banned sequences, against a slow way to say the same."""

from __future__ import annotations

import random

import numpy as np
import pytest

from manylora.server.engine.constraint import Constraint, ConstraintFailed
from manylora.server.engine.grammar.token_rules import TokenRules

VOCAB = 70
N_WORDS = -(-VOCAB // 32)


def allowed_by(state: Constraint) -> set[int]:
    mask = np.full(N_WORDS, 0x5A5A5A5A, np.int32)
    state.allow(mask)
    return {t for t in range(VOCAB) if mask[t // 32] >> (t % 32) & 1}


class Even:
    """A grammar and its only state: even tokens, until three have been drawn."""

    def __init__(self) -> None:
        self.n = 0

    def start(self) -> Even:
        return Even()

    def allow(self, mask: np.ndarray) -> None:
        mask.fill(0x55555555)

    def accept(self, token: int) -> None:
        if token % 2:
            raise ConstraintFailed("odd")
        self.n += 1

    @property
    def is_complete(self) -> bool:
        return self.n == 3


@pytest.mark.parametrize("with_grammar", [False, True])
def test_random_rules_against_the_definition(with_grammar: bool) -> None:
    rng = random.Random(with_grammar)
    for _ in range(60):
        allowed = None if rng.random() < 0.5 else {*rng.sample(range(VOCAB), rng.randint(12, VOCAB)), 0, 2, 4, 31, 63}
        banned = [
            [rng.choice([0, 2, 4, 31, 63, 64]) for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(0, 5))
        ]
        rules = TokenRules(allowed=allowed, banned=banned, grammar=Even() if with_grammar else None)
        states = [rules.start(), rules.start()]
        outputs: list[list[int]] = [[], []]
        for _ in range(30):
            which = rng.randrange(2)  # two requests of one grammar have nothing to do with each other
            output = outputs[which]
            expected = {
                t
                for t in (range(VOCAB) if allowed is None else allowed)
                if not any([*output, t][-len(word) :] == word for word in banned)
            }
            if with_grammar:
                expected = {t for t in expected if t % 2 == 0}
            if not expected:
                with pytest.raises(ConstraintFailed, match="leave no token"):
                    allowed_by(states[which])
                break
            assert allowed_by(states[which]) == expected
            output.append(rng.choice([t for t in (0, 2, 4, 31, 63, 64) if t in expected] or sorted(expected)))
            states[which].accept(output[-1])


def test_the_grammar_below_is_asked() -> None:
    state = TokenRules(banned=[[2]], grammar=Even()).start()
    with pytest.raises(ConstraintFailed, match="odd"):
        state.accept(1)
    for _ in range(3):
        assert not state.is_complete
        state.accept(0)
    assert state.is_complete
    assert not TokenRules(allowed=[1]).start().is_complete


def test_tokens_that_the_model_has_no_logits_for_are_left_out() -> None:
    beyond = 32 * N_WORDS + 5
    state = TokenRules(allowed=[3, beyond], banned=[[beyond], [3, beyond], [3, 4]]).start()
    assert allowed_by(state) == {3}
    state.accept(3)
    assert allowed_by(state) == {3}
    with pytest.raises(ConstraintFailed, match="leave no token"):
        allowed_by(TokenRules(allowed=[beyond]).start())
