"""Log-probabilities in responses: OpenAI's two forms (parallel lists for completions, one object a token for chat) and
vLLM's ``prompt_logprobs``."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from manylora.server.api.state import TokenizerLike
from manylora.server.engine.request import TokenEvent, TokenLogprob, TokenLogprobs

_FLOOR: Final = -9999.0
"""JSON has no minus infinity, which is what a token has that can never be drawn; vLLM writes this."""


class LogprobNames:
    """How tokens are spelled in a response; one for each request, since it remembers what it has spelled.

    ``as_ids``: ``token_id:123`` instead of the text (vLLM's ``return_tokens_as_token_ids``).
    """

    def __init__(self, tokenizer: TokenizerLike, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._names: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if self._as_ids:
            return f"token_id:{token}"
        name = self._names.get(token)
        if name is None:
            name = self._names[token] = _spelling(self._tokenizer.token_bytes(token))
        return name

    def bytes_of(self, token: int) -> list[int]:
        return list(self._tokenizer.token_bytes(token))


def _spelling(raw: bytes) -> str:
    """A token's text. Part of a character is written as OpenAI writes it, ``bytes:\\xe2\\x80``: the replacement
    character would make one name of many tokens, and the names are keys."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@dataclass(frozen=True)
class Echo:
    """A prompt that a choice's text begins with."""

    text: str
    ids: Sequence[int]


class CompletionLogprobs:
    """The ``logprobs`` of one choice of ``/v1/completions``, piece by piece. ``text_offset`` counts characters.

    A character that spans several tokens counts for the token that completes it, so that offsets are positions in the
    text that was sent. ``top``: how many tokens are listed beside the one that is there. With ``echo`` the prompt's
    tokens come first; the first of them has no log-probability, since nothing comes before it.
    """

    def __init__(
        self,
        tokenizer: TokenizerLike,
        names: LogprobNames,
        *,
        top: int,
        skip_special_tokens: bool,
        echo: Echo | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._names = names
        self._top = top
        self._special = tokenizer.special_ids
        self._silent = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._new_decoder = codecs.getincrementaldecoder("utf-8")
        self._decoder = self._new_decoder("replace")
        self._echo = echo
        self._offset = 0

    def piece(self, event: TokenEvent) -> dict[str, Any]:
        """The next tokens'; the prompt's with the first event."""
        names, steps = self._names, event.logprobs
        prompt, offsets = self._of_the_prompt(event)
        return {
            "tokens": [names[token] for token, _ in prompt] + [names[step.sampled.token_id] for step in steps],
            "token_logprobs": [None if step is None else _finite(step.sampled) for _, step in prompt]
            + [_finite(step.sampled) for step in steps],
            "top_logprobs": [None if step is None else self._most_likely(step) for _, step in prompt]
            + [self._most_likely(step) for step in steps],
            "text_offset": offsets + [self._advance(step.sampled.token_id) for step in steps],
        }

    def _most_likely(self, step: TokenLogprobs) -> dict[str, float]:
        # The token that is there is always among them, so up to `logprobs` + 1 of them.
        return {self._names[one.token_id]: _finite(one) for one in (*step.top[: self._top], step.sampled)}

    def _of_the_prompt(self, event: TokenEvent) -> tuple[list[tuple[int, TokenLogprobs | None]], list[int]]:
        """The prompt's tokens and their offsets, once."""
        echo, self._echo = self._echo, None
        if echo is None:
            return [], []
        offsets = [self._advance_within(echo.text, token) for token in echo.ids]
        # The completion is text of its own: half a character at the prompt's end stays one.
        self._offset, self._decoder = len(echo.text), self._new_decoder("replace")
        return list(zip(echo.ids, event.prompt_logprobs, strict=True)), offsets

    def _advance_within(self, text: str, token: int) -> int:
        """As ``_advance``, in a text that need not be what the tokens spell: a special token may have been added or
        been written out, and SentencePiece begins a text with a space that was not there."""
        start = self._offset
        piece = self._decoder.decode(self._tokenizer.token_bytes(token))
        if not text.startswith(piece, start):
            if token in self._special:
                piece = ""
            elif piece.startswith(" ") and text.startswith(piece[1:], start):
                piece = piece[1:]
        self._offset = min(start + len(piece), len(text))
        return start

    def _advance(self, token: int) -> int:
        start = self._offset
        if token not in self._silent:
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token)))
        return start


def chat_logprobs(names: LogprobNames, steps: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The ``logprobs`` of a chat choice or chunk."""

    def entry(one: TokenLogprob) -> dict[str, Any]:
        token = one.token_id
        return {"token": names[token], "logprob": _finite(one), "bytes": names.bytes_of(token)}

    content = [{**entry(step.sampled), "top_logprobs": [entry(one) for one in step.top]} for step in steps]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    tokenizer: TokenizerLike, steps: Sequence[TokenLogprobs | None], top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's ``prompt_logprobs``: for each prompt token, its own and the ``top`` most likely ones by token id; null for
    the first. Ranks count from 1."""
    texts: dict[int, str] = {}

    def text(token: int) -> str:
        found = texts.get(token)
        if found is None:
            found = texts[token] = tokenizer.token_text(token)
        return found

    def entry(one: TokenLogprob) -> dict[str, Any]:
        return {"logprob": _finite(one), "rank": one.rank + 1, "decoded_token": text(one.token_id)}

    return [
        None if step is None else {str(one.token_id): entry(one) for one in (step.sampled, *step.top[:top])}
        for step in steps
    ]


def _finite(one: TokenLogprob) -> float:
    return max(one.logprob, _FLOOR)
