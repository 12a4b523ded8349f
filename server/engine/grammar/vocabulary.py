"""The tokens of a model as llguidance needs them: as bytes, and those of a forced piece of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from llguidance import LLTokenizer, TokenizerWrapper

if TYPE_CHECKING:
    import tokenizers


class TokenTable(Protocol):
    """What is needed of ``model.tokenizer.Tokenizer``."""

    @property
    def backend(self) -> tokenizers.Tokenizer: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...


@dataclass(frozen=True)
class GrammarVocabulary:
    """Ids from 0, one for each row of the model's ``lm_head``.

    Ids without bytes (padding) are in no mask. Special tokens have no text: a grammar reaches them by name or number
    alone, never because a string happens to spell one. ``eos`` are in the masks where the output may end.
    """

    tokens: Sequence[bytes]
    special: Sequence[int]
    eos: Sequence[int]
    encode: Callable[[str], list[int]] | None = None
    """How the model writes a text; None: by the longest tokens that fit, from left to right."""

    @classmethod
    def of(cls, table: TokenTable, vocab_size: int) -> GrammarVocabulary:
        """ValueError if there is no end-of-sequence token, as no output of open length could end."""
        eos = sorted(token for token in table.eos_token_ids if 0 <= token < vocab_size)
        if not eos:
            raise ValueError("the model has no end-of-sequence token")
        known = min(vocab_size, table.vocab_size)
        tokens = [table.token_bytes(token) for token in range(known)] + [b""] * (vocab_size - known)
        backend: Any = table.backend
        return cls(
            tokens,
            sorted(token for token in table.special_ids if token < vocab_size),
            eos,
            lambda text: list(backend.encode(text, add_special_tokens=False).ids),
        )

    def trie(self) -> LLTokenizer:
        """llguidance's form of it; takes a microsecond or two for each token."""
        wrapper = _Wrapper(self)
        trie = LLTokenizer(wrapper, eos_token=list(self.eos))
        wrapper.greedy = trie.greedy_tokenize
        return trie


class _Wrapper(TokenizerWrapper):
    """It is called, by any thread, for text that a grammar forces: the mask
    then allows the first of its tokens alone."""

    is_tokenizer_wrapper = True  # by which llguidance knows it

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special
        self.eos_token_id = vocabulary.eos[0]
        self.bos_token_id = None
        self.greedy: Callable[[str], list[int]] | None = None
        self._encode = vocabulary.encode
        self._special = frozenset(vocabulary.special)

    def __call__(self, text: str) -> list[int]:
        ids = [] if self._encode is None else self._encode(text)
        # A tokeniser may return tokens of another text: SentencePiece puts a space before it, a normaliser changes
        # characters, and a special token that is spelled out is recognised.
        if self._encode is None or not self._is_text(ids, text):
            return [] if self.greedy is None else self.greedy(text)
        return ids

    def _is_text(self, ids: Sequence[int], text: str) -> bool:
        if any(token >= len(self.tokens) or token in self._special for token in ids):
            return False
        return b"".join([self.tokens[token] for token in ids]) == text.encode()
