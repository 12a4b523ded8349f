"""Tokens to text, one token at a time: text never ends inside a character, and stop strings are found and cut off.

A ``Vocabulary`` (one per tokenizer, shared) makes a ``TextStream`` per request, which turns tokens into text; a
``Detokenizer`` adds the stop strings. The cost of a token does not depend on how many came before it.

Property, tested: the texts that a stream returns, joined, are what the tokenizer decodes the whole sequence to.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final, Protocol

_REPLACEMENT: Final = "\ufffd"
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextStream(Protocol):
    """The text of one growing sequence of tokens."""

    def feed(self, token_id: int) -> str:
        """The characters that this token completes; an id outside the vocabulary has no text."""

    def flush(self) -> str:
        """At the end: what was held back; an incomplete character comes as U+FFFD."""


class Vocabulary(Protocol):
    def stream(self, *, skip_special_tokens: bool, shown: AbstractSet[int] = frozenset()) -> TextStream:
        """``shown``: special tokens that have their text all the same."""
        ...


def vocabulary_for(tokenizer: Any) -> Vocabulary:
    """The vocabulary of a transformers tokenizer, the fast way if its decoder is one of the two common kinds.

    Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2) and SentencePiece with byte fallback (Llama 2, Mistral, Gemma) have
    a table of pieces. SentencePiece's decoder also drops the space that begins a text; a completion continues its
    prompt, so here that space stays. Any other tokenizer is asked to decode a short window of tokens each time.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    special: frozenset[int] = frozenset()
    if backend is not None:
        state = json.loads(backend.to_str())
        special = frozenset(token["id"] for token in state["added_tokens"] if token["special"])
        decoder = state["decoder"] or {}
        if decoder.get("type") == "ByteLevel":
            return ByteLevelVocabulary(backend.id_to_token, special)
        if _is_byte_fallback(decoder):
            return ByteFallbackVocabulary(backend.id_to_token, special)

    def decode(token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        # No cleaning up: it would change text that has already been sent.
        text = tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)

    return WindowVocabulary(decode, special)


def _is_byte_fallback(decoder: dict[str, Any]) -> bool:
    """Whether the decoder does what ByteFallbackVocabulary does, apart from the leading space."""
    if decoder.get("type") != "Sequence":
        return False
    kinds = [part["type"] for part in decoder["decoders"]]
    if kinds[:2] != ["Replace", "ByteFallback"] or not set(kinds[2:]) <= {"Fuse", "Strip"}:
        return False
    for part in decoder["decoders"]:
        if part["type"] == "Replace" and (part["pattern"], part["content"]) != ({"String": "▁"}, " "):
            return False
        if part["type"] == "Strip" and (part["content"], part["stop"]) != (" ", 0):
            return False
    return True


class Detokenizer:
    """The text of one request, cut off at the first stop string.

    Only as much text is held back as could be the beginning of a stop string. ``stop`` is the one that was found.
    """

    def __init__(self, stream: TextStream, stop: Sequence[str] = (), *, include_stop: bool = False) -> None:
        self.stop: str | None = None
        self._stream = stream
        self._stops = tuple(stop)
        self._longest = max(map(len, self._stops), default=0)
        self._include_stop = include_stop
        self._held = ""

    def feed(self, token_id: int, *, check_stop: bool = True) -> str:
        """New text that is certain to stand. With ``check_stop=False`` (min_tokens) no stop string can begin in it."""
        text = self._stream.feed(token_id)
        if not self._stops or not text:
            return text
        if not check_stop:
            held, self._held = self._held, ""
            return held + text
        text = self._cut(self._held + text)
        if self.stop is None:
            n_held = self._possible_stop(text)
            self._held = text[len(text) - n_held :]
            text = text[: len(text) - n_held]
        return text

    def finish(self) -> str:
        """The rest, at the end of the request; it may still hold a stop string (look at ``stop``)."""
        if self.stop is not None:
            return ""
        text, self._held = self._held + self._stream.flush(), ""
        return self._cut(text) if self._stops else text

    def _cut(self, text: str) -> str:
        """``text`` up to the stop string that begins first, if there is one (then ``self.stop`` is set)."""
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if not found:
            return text
        at, self.stop = min(found, key=lambda one: one[0])  # the first listed of those that begin there
        self._held = ""
        return text[: at + len(self.stop) if self._include_stop else at]

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


# --- byte-level BPE --------------------------------------------------------------------------------------------------


class ByteLevelVocabulary:
    """Tokens are strings over 256 printable characters that stand for bytes (GPT-2's encoder; Radford et al. 2019)."""

    def __init__(self, token_of: Callable[[int], str | None], special_ids: Collection[int]) -> None:
        self.special_ids = frozenset(special_ids)
        self._token_of = token_of
        self._pieces: dict[int, bytes] = {}

    def piece(self, token_id: int) -> bytes:
        """The token's bytes; asked for once, as the tokenizer's own look-up is slow."""
        piece = self._pieces.get(token_id)
        if piece is None:
            token = (self._token_of(token_id) if token_id >= 0 else None) or ""
            try:
                piece = bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an added token, which is kept as plain text
                piece = token.encode()
            self._pieces[token_id] = piece
        return piece

    def stream(self, *, skip_special_tokens: bool, shown: AbstractSet[int] = frozenset()) -> TextStream:
        return _ByteLevelStream(self, self.special_ids - shown if skip_special_tokens else frozenset())


class _ByteLevelStream:
    def __init__(self, vocabulary: ByteLevelVocabulary, skipped: frozenset[int]) -> None:
        self._piece = vocabulary.piece
        self._skipped = skipped
        # Holds back at most three bytes, and replaces what is not UTF-8 as the tokenizer does.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._decoder.decode(self._piece(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER: Final = _byte_of_character()


# --- SentencePiece with byte fallback --------------------------------------------------------------------------------


class ByteFallbackVocabulary:
    """Tokens are text with ``▁`` for a space, or ``<0xNN>`` for a byte of a character that has no token."""

    def __init__(self, token_of: Callable[[int], str | None], special_ids: Collection[int]) -> None:
        self.special_ids = frozenset(special_ids)
        self._token_of = token_of
        self._pieces: dict[int, str | int] = {}

    def piece(self, token_id: int) -> str | int:
        """The token's text, or the value of the byte that it is."""
        piece = self._pieces.get(token_id)
        if piece is None:
            token = (self._token_of(token_id) if token_id >= 0 else None) or ""
            byte = _BYTE_TOKEN.fullmatch(token)
            piece = int(byte[1], 16) if byte else token.replace("▁", " ")
            self._pieces[token_id] = piece
        return piece

    def stream(self, *, skip_special_tokens: bool, shown: AbstractSet[int] = frozenset()) -> TextStream:
        return _ByteFallbackStream(self, self.special_ids - shown if skip_special_tokens else frozenset())


class _ByteFallbackStream:
    """A run of byte tokens is held back until it ends: the tokenizer decodes it as a whole, and if any of it is not
    UTF-8, replaces every byte of it."""

    def __init__(self, vocabulary: ByteFallbackVocabulary, skipped: frozenset[int]) -> None:
        self._piece = vocabulary.piece
        self._skipped = skipped
        self._run = bytearray()

    def feed(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._piece(token_id)
        if isinstance(piece, int):
            self._run.append(piece)
            return ""
        return self.flush() + piece if self._run else piece

    def flush(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)


# --- any other tokenizer ---------------------------------------------------------------------------------------------


class WindowVocabulary:
    """Asks the tokenizer to decode the last few tokens each time: correct for any whose text depends on no more than
    the piece before, and slower. Undecodable bytes are held back until something decodable follows."""

    def __init__(self, decode: Callable[[Sequence[int], bool], str], special_ids: Collection[int] = ()) -> None:
        self.special_ids = frozenset(special_ids)
        self._decode = decode

    def stream(self, *, skip_special_tokens: bool, shown: AbstractSet[int] = frozenset()) -> TextStream:
        if not (skip_special_tokens and shown):
            return _WindowStream(lambda token_ids: self._decode(token_ids, skip_special_tokens))
        hidden = self.special_ids - shown  # the tokenizer itself skips all of them or none
        return _WindowStream(lambda ids: self._decode([token for token in ids if token not in hidden], False))


class _WindowStream:
    """``_window`` = tokens already told (context for what follows) + tokens whose text is not told yet."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._n_told = 0

    def feed(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._untold()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._window = self._window[self._n_told :]
        self._n_told = len(self._window)
        return text

    def flush(self) -> str:
        text = self._untold()
        self._n_told = len(self._window)
        return text

    def _untold(self) -> str:
        told = self._decode(self._window[: self._n_told])
        return self._decode(self._window)[len(told) :]
