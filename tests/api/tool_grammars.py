"""Outputs drawn at random from a grammar, over a vocabulary of bytes: a model that knows nothing but the grammar."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from manylora.server.engine.constraint import Constraint
from manylora.server.engine.grammar.vocabulary import GrammarVocabulary

BOS, EOS = 256, 257
SPECIAL = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<tool_call>", "</tool_call>")
"""Special tokens, from 258."""
N_TOKENS = 258 + len(SPECIAL)

_WEIGHT = dict.fromkeys(b'"}]', 60) | dict.fromkeys([*b",;\n[", EOS, *range(258, N_TOKENS)], 20)


def vocabulary() -> GrammarVocabulary:
    """Bytes, BOS and EOS, and ``SPECIAL``."""
    texts = [b"<s>", b"</s>", *(text.encode() for text in SPECIAL)]
    return GrammarVocabulary([bytes([b]) for b in range(256)] + texts, list(range(256, N_TOKENS)), [EOS])


def spelled(tokens: Sequence[int]) -> list[str]:
    """The text of each token but EOS; of the bytes of a longer character, the last one has it."""
    texts: list[str] = []
    waiting = b""
    for token in tokens:
        if token >= 258:
            texts.append(SPECIAL[token - 258])
        elif token < 256:
            waiting += bytes([token])
            try:
                text = waiting.decode()
            except UnicodeDecodeError:
                continue
            waiting = b""
            texts.append(text)
    assert not waiting, "an output ends inside a character"
    return texts


def drawn(constraint: Constraint, rng: random.Random, *, hints: Sequence[str] = (), limit: int = 4000) -> list[int]:
    """Tokens to the end of an output, EOS excluded. Texts, strings and lists end soon; and ``hints``, which are not
    likely to be drawn character by character, are tried wherever there may be anything."""
    tokens: list[int] = []
    hint = b""
    mask = np.zeros((N_TOKENS + 31) // 32, np.int32)
    while not constraint.is_complete and len(tokens) < limit:
        constraint.allow(mask)
        allowed = [t for t in range(N_TOKENS) if mask[t // 32] >> (t % 32) & 1]
        assert allowed, "nothing can follow"
        if len(allowed) > 100 and not hint and hints and rng.random() < 0.3:
            hint = rng.choice(hints).encode()
        if hint and hint[0] in allowed:
            token, hint = hint[0], hint[1:]
        else:
            hint = b""
            weights = [_WEIGHT.get(t, 1) for t in allowed]
            [token] = rng.choices(allowed, weights)
        if token == EOS:
            return tokens
        constraint.accept(token)
        tokens.append(token)
    assert len(tokens) < limit, "the grammar has no end"
    return tokens
