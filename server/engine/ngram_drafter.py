"""Speculation without a draft model: what followed the last tokens when they were there before (prompt look-up).

Saxena 2023 ("prompt lookup decoding"); also vLLM's ``method="ngram"``. Texts that are copied, summarised, edited or
extracted from the prompt repeat it; others do not, and must not pay for the attempt. So a drafter learns from what
became of its drafts:

- Each draft of which nothing was accepted raises by one the number of tokens that must match, and the number of tokens
  before the next try doubles. In free text pairs of words recur by chance, five tokens in a row seldom do.
- Drafts begin short, double while all of them is accepted, and fall back to one more than was accepted.

The index is deflate's (RFC 1951, section 4: hash chains): the places at which the last ``shortest`` tokens hash to the
same bucket, the newest first. Adding a token and looking one up take some microseconds however long the text is, and
memory is 64 KiB and 8 bytes a token.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain, islice
from typing import Final

_BUCKETS: Final = 1 << 14
_CANDIDATES: Final = 16
"""Earlier places that are compared."""
_INDEXED_AT_ONCE: Final = 2048
"""Tokens taken in at each call, about a millisecond: a long prompt must not hold up the step of everybody."""
_MAX_MISSES: Final = 6
"""The longest pause is then 62 tokens."""
_FIRST_LENGTH: Final = 2


class NgramDrafter:
    """A ``drafter.Drafter`` that proposes at most ``max_tokens`` tokens: those after the newest of the places where
    the most of the last tokens were there before, ``shortest`` of them at least; no more than ``longest`` are compared.

    ValueError unless ``1 <= shortest <= longest`` and ``max_tokens >= 1``.
    """

    def __init__(self, max_tokens: int, *, shortest: int = 2, longest: int = 8) -> None:
        if max_tokens < 1 or not 1 <= shortest <= longest:
            raise ValueError(
                f"drafts need at least one token and 1 <= shortest <= longest, got {max_tokens} tokens, "
                f"{shortest} and {longest}"
            )
        self._max_tokens, self._shortest, self._longest = max_tokens, shortest, longest
        self._tokens = array("i")
        self._newest: array[int] = array("i")
        """By bucket, the newest place that is indexed; 0: none. A place is the number of tokens before it."""
        self._before: array[int] = array("i", [0])
        """By place, the one before it in the same bucket; as long as the places that are indexed."""
        self._length = min(_FIRST_LENGTH, max_tokens)
        self._misses = 0
        self._resumes_at = 0

    def propose(self, prompt: Sequence[int], output: Sequence[int], limit: int) -> Sequence[int]:
        n = len(prompt) + len(output)
        self._follow(prompt, output)
        if len(self._tokens) < n or n < self._resumes_at:
            return ()
        place = self._match()
        if not place:
            return ()
        tokens = self._tokens
        draft: list[int] = []
        for at in range(place, place + min(limit, self._length)):
            # Of a text that repeats itself, the draft goes on with its own beginning.
            draft.append(tokens[at] if at < n else draft[at - n])
        return draft

    def judge(self, drafted: int, accepted: int) -> None:
        if accepted == 0:
            self._misses = min(self._misses + 1, _MAX_MISSES)
            self._resumes_at = len(self._tokens) + 2**self._misses - 1  # one token was drawn all the same
            self._length = 1
        elif accepted < drafted:
            self._misses = max(self._misses - 1, 0)
            self._length = min(accepted + 1, self._max_tokens)
        else:
            self._misses = 0
            self._length = min(2 * self._length, self._max_tokens)

    def _follow(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Take in what is new of ``prompt + output``, and index all places but the last, which is looked up."""
        if not self._newest:
            self._newest = array("i", bytes(4 * _BUCKETS))
        tokens, before, newest = self._tokens, self._before, self._newest
        known = len(tokens)
        if known >= len(prompt):
            first = known - len(prompt)
            tokens.extend(output[first : first + _INDEXED_AT_ONCE])
        else:
            tokens.extend(islice(chain(prompt[known : known + _INDEXED_AT_ONCE], output), _INDEXED_AT_ONCE))
        for place in range(len(before), len(tokens)):
            if place < self._shortest:
                before.append(0)
                continue
            bucket = self._bucket(place)
            before.append(newest[bucket])
            newest[bucket] = place

    def _bucket(self, place: int) -> int:
        """Of the ``shortest`` tokens that end at a place (FNV-1a over whole tokens, folded)."""
        key = 0x811C9DC5
        for token in self._tokens[place - self._shortest : place]:
            key = (key ^ token) * 0x01000193 & 0xFFFFFFFF
        return (key ^ key >> 15) & (_BUCKETS - 1)

    def _match(self) -> int:
        """The place before which the most of the last tokens are; 0 if not enough are."""
        tokens, before = self._tokens, self._before
        n = len(tokens)
        if n < self._shortest:
            return 0
        # At least one less than are required: only more than that counts.
        most, found = min(self._shortest + self._misses, self._longest) - 1, 0
        place = self._newest[self._bucket(n)]
        for _ in range(_CANDIDATES):
            if not place:
                break
            length = 0
            while length < min(self._longest, place) and tokens[place - 1 - length] == tokens[n - 1 - length]:
                length += 1
            if length > most:
                most, found = length, place
                if length == self._longest:
                    break
            place = before[place]
        return found
