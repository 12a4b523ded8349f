"""A vocabulary of bytes for the tests of grammars, and what a grammar says of a text."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from llguidance import LLTokenizer

from manylora.server.engine.constraint import Constraint, Grammar
from manylora.server.engine.grammar.grammars import GrammarCompiler
from manylora.server.engine.grammar.sources import GrammarSpec
from manylora.server.engine.grammar.vocabulary import GrammarVocabulary

EOS, END, CALL, WORD = 256, 257, 258, 259
VOCAB = 270
BYTES = GrammarVocabulary(
    [bytes([byte]) for byte in range(256)] + [b"<eos>", b"<end>", b"<call>", b"true"] + [b""] * (VOCAB - 260),
    special=[EOS, END, CALL],
    eos=[EOS, END],
)
"""Every byte is a token; ``EOS`` and ``END`` end a sequence, ``CALL`` is special, ``WORD`` is "true"; padding."""


@functools.cache
def trie() -> LLTokenizer:
    return BYTES.trie()


@functools.cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(trie())


def compiled(kind: str, text: str = "") -> Grammar:
    return compiler().compile(GrammarSpec(kind, text))  # type: ignore[arg-type]


def allowed(state: Constraint, vocab: int = VOCAB) -> set[int]:
    mask = np.full((vocab + 31) // 32, -1, np.int32)
    state.allow(mask)
    assert not np.unpackbits(mask.view(np.uint8), bitorder="little")[vocab:].any(), "bits beyond the vocabulary"
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def after(grammar: Grammar, tokens: Sequence[int]) -> Constraint | None:
    """The state after these tokens; None if one of them is not allowed."""
    state = grammar.start()
    for token in tokens:
        if state.is_complete or token not in allowed(state):
            return None
        state.accept(token)
    return state


def matches(grammar: Grammar, text: str) -> bool:
    """Whether the output may be ``text`` and end there."""
    state = after(grammar, text.encode())
    return state is not None and (state.is_complete or {EOS, END} <= allowed(state))
