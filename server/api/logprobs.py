"""Log-probabilities in OpenAI's two forms: parallel lists for completions, one object a token for chat."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Final

from manylora.server.api.state import TokenizerLike
from manylora.server.engine.request import TokenLogprob, TokenLogprobs

_FLOOR: Final = -9999.0
"""JSON has no minus infinity, which is what a token has that can never be drawn; vLLM writes this."""


class LogprobNames:
    """How tokens are spelled in a response; one for each request, since it remembers what it has spelled."""

    def __init__(self, tokenizer: TokenizerLike) -> None:
        self._tokenizer = tokenizer
        self._names: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
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


class CompletionLogprobs:
    """The ``logprobs`` of one choice of ``/v1/completions``, piece by piece. ``text_offset`` counts characters.

    A character that spans several tokens counts for the token that completes it, so that offsets are positions in the
    text that was sent.
    """

    def __init__(self, tokenizer: TokenizerLike, names: LogprobNames, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._names = names
        self._silent = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def piece(self, steps: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The next tokens'."""
        names = self._names
        return {
            "tokens": [names[step.sampled.token_id] for step in steps],
            "token_logprobs": [_finite(step.sampled) for step in steps],
            # The sampled token is always there, so up to `logprobs` + 1 of them.
            "top_logprobs": [
                {names[one.token_id]: _finite(one) for one in (*step.top, step.sampled)} for step in steps
            ],
            "text_offset": [self._advance(step.sampled.token_id) for step in steps],
        }

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


def _finite(one: TokenLogprob) -> float:
    return max(one.logprob, _FLOOR)
