"""The frames of a streamed response, as text.

Every token of every stream passes here, on the interpreter that the step loop shares. So what a chunk repeats is
rendered once for each response, and what changes is spliced in: no model object and no dictionary for each token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from json.encoder import encode_basestring_ascii as quote
from typing import Final, Protocol

from manylora.server.api.generation import Envelope, usage
from manylora.server.api.tools.calls import CallReader, delta
from manylora.server.api.tools.parsers import Piece
from manylora.server.engine.request import FinishEvent, TokenEvent, TokenLogprobs

DONE: Final = "data: [DONE]\n\n"

LogprobsPiece = Callable[[Sequence[TokenLogprobs]], dict[str, object]]
CompletionPiece = Callable[[TokenEvent], dict[str, object]]


class Chunks(Protocol):
    """Renders the events of a response's choices, by index; "" for an event that shows nothing."""

    def tokens(self, index: int, event: TokenEvent) -> str: ...
    def finish(self, index: int, event: FinishEvent) -> str: ...
    def end(self) -> str:
        """After every choice has finished."""
        ...


class _Usage:
    """Counts tokens, and renders the end of a chunk: ``usage`` if it was asked for, and the closing brace."""

    def __init__(self, prompt_tokens: Sequence[int], n: int, *, include: bool, continuous: bool) -> None:
        self.include = include
        self._continuous = continuous
        self._prompt_tokens = prompt_tokens
        self._n = n
        self._completion_tokens = [0] * (len(prompt_tokens) * n)
        self._cached_tokens = 0

    def add(self, index: int, n_tokens: int) -> None:
        self._completion_tokens[index] += n_tokens

    def set(self, index: int, finish: FinishEvent) -> None:
        """A choice has ended."""
        self._completion_tokens[index] = finish.completion_tokens
        if index % self._n == 0:  # as in ``usage_of``
            self._cached_tokens += finish.cached_tokens

    def tail(self, index: int) -> str:
        if not self.include:
            return "}\n\n"
        if not self._continuous:
            return ',"usage":null}\n\n'
        so_far = usage(self._prompt_tokens[index // self._n], self._completion_tokens[index])
        return f',"usage":{json.dumps(so_far)}}}\n\n'

    def total(self) -> str:
        # A prompt is counted once, however many choices continue it.
        return json.dumps(usage(sum(self._prompt_tokens), sum(self._completion_tokens), self._cached_tokens))


class _ChunkBase:
    def __init__(
        self,
        envelope: Envelope,
        kind: str,
        prompt_tokens: Sequence[int],
        n: int,
        *,
        include_usage: bool,
        continuous_usage: bool,
    ) -> None:
        self._head = (
            f'data: {{"id":{quote(envelope.id)},"object":"{kind}","created":{envelope.created},'
            f'"model":{quote(envelope.model)},"system_fingerprint":{quote(envelope.fingerprint)},"choices":['
        )
        self._usage = _Usage(prompt_tokens, n, include=include_usage, continuous=continuous_usage)

    def end(self) -> str:
        if not self._usage.include:
            return DONE
        return f'{self._head}],"usage":{self._usage.total()}}}\n\n{DONE}'


class CompletionChunks(_ChunkBase):
    """``text_completion`` chunks. ``echo`` has a text for each choice that its first chunk begins with; with
    ``prompt_ids``, by choice, chunks carry their token ids, and the first of each choice its prompt's."""

    def __init__(
        self,
        envelope: Envelope,
        prompt_tokens: Sequence[int],
        n: int,
        *,
        include_usage: bool = False,
        continuous_usage: bool = False,
        echo: Sequence[str] = (),
        logprobs: Sequence[CompletionPiece] = (),
        prompt_ids: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__(
            envelope,
            "text_completion",
            prompt_tokens,
            n,
            include_usage=include_usage,
            continuous_usage=continuous_usage,
        )
        self._echo = dict(enumerate(echo))
        self._logprobs = logprobs
        self._with_ids = bool(prompt_ids)
        self._openings = [f'{self._head}{{"index":{index},"text":' for index in range(len(prompt_tokens) * n)]
        self._closing = f',"logprobs":null,"finish_reason":null,"stop_reason":null}}]{self._usage.tail(0)}'
        self._is_plain = not (echo or logprobs or prompt_ids or continuous_usage)
        """Whether a chunk is what it follows, its text and what follows it, the same for each token of a choice."""
        self._prompt_ids = dict(enumerate(prompt_ids))

    def tokens(self, index: int, event: TokenEvent) -> str:
        if self._is_plain:
            return f"{self._openings[index]}{quote(event.text)}{self._closing}" if event.text else ""
        self._usage.add(index, len(event.token_ids))
        text = self._echo.pop(index, "") + event.text
        logprobs = "null"
        if self._logprobs and (event.logprobs or event.prompt_logprobs):
            logprobs = json.dumps(self._logprobs[index](event))
        elif not text and not self._with_ids:
            return ""  # inside a character, or where a stop string may be beginning
        return (
            f'{self._openings[index]}{quote(text)},"logprobs":{logprobs},"finish_reason":null,'
            f'"stop_reason":null{self._ids(index, event.token_ids)}}}]{self._usage.tail(index)}'
        )

    def _ids(self, index: int, token_ids: Sequence[int]) -> str:
        if not self._with_ids:
            return ""
        prompt_ids = self._prompt_ids.pop(index, None)
        of_the_prompt = "" if prompt_ids is None else f',"prompt_token_ids":{json.dumps(prompt_ids)}'
        return f'{of_the_prompt},"token_ids":{json.dumps(token_ids)}'

    def finish(self, index: int, event: FinishEvent) -> str:
        self._usage.set(index, event)
        return (
            f'{self._openings[index]}{quote(self._echo.pop(index, ""))},"logprobs":null,'
            f'"finish_reason":"{event.reason}","stop_reason":{json.dumps(event.stop_reason)}'
            f"{self._ids(index, ())}}}]{self._usage.tail(index)}"
        )


class ChatChunks(_ChunkBase):
    """``chat.completion.chunk`` chunks: the role first, then content, then the reason of the end."""

    def __init__(
        self,
        envelope: Envelope,
        prompt_tokens: int,
        n: int,
        *,
        include_usage: bool = False,
        continuous_usage: bool = False,
        logprobs: LogprobsPiece | None = None,
    ) -> None:
        super().__init__(
            envelope,
            "chat.completion.chunk",
            [prompt_tokens],
            n,
            include_usage=include_usage,
            continuous_usage=continuous_usage,
        )
        self._unnamed = set(range(n))
        self._logprobs = logprobs
        self._openings = [f'{self._head}{{"index":{index},"delta":{{"content":' for index in range(n)]
        self._closing = f'}},"logprobs":null,"finish_reason":null}}]{self._usage.tail(0)}'
        self._is_plain = logprobs is None and not continuous_usage
        """Whether a chunk is what it follows, its text and what follows it, once the role is told."""

    def tokens(self, index: int, event: TokenEvent) -> str:
        if self._is_plain and index not in self._unnamed:
            return f"{self._openings[index]}{quote(event.text)}{self._closing}" if event.text else ""
        self._usage.add(index, len(event.token_ids))
        role = self._role(index)
        logprobs = "null"
        if self._logprobs is not None and event.logprobs:
            logprobs = json.dumps(self._logprobs(event.logprobs))
        elif not event.text:
            return role
        return (
            f'{role}{self._openings[index]}{quote(event.text)}}},"logprobs":{logprobs},'
            f'"finish_reason":null}}]{self._usage.tail(index)}'
        )

    def finish(self, index: int, event: FinishEvent) -> str:
        role = self._role(index)
        self._usage.set(index, event)
        return (
            f'{role}{self._head}{{"index":{index},"delta":{{}},"logprobs":null,"finish_reason":"{event.reason}",'
            f'"stop_reason":{json.dumps(event.stop_reason)}}}]{self._usage.tail(index)}'
        )

    def _role(self, index: int, content: str = '""') -> str:
        if index not in self._unnamed:
            return ""
        self._unnamed.remove(index)
        return (
            f'{self._head}{{"index":{index},"delta":{{"role":"assistant","content":{content}}},"logprobs":null,'
            f'"finish_reason":null}}]{self._usage.tail(index)}'
        )


class ToolChatChunks(ChatChunks):
    """Of a chat whose answers may be calls: content and calls as each choice's reader tells them apart.

    The role comes with what is first, since ``content`` beside it is null if that is a call. Log-probabilities come
    with the next piece, as a token may be held back until it is known what it is part of.
    """

    def __init__(
        self,
        envelope: Envelope,
        prompt_tokens: int,
        readers: Sequence[CallReader],
        *,
        include_usage: bool = False,
        continuous_usage: bool = False,
        logprobs: LogprobsPiece | None = None,
    ) -> None:
        super().__init__(
            envelope,
            prompt_tokens,
            len(readers),
            include_usage=include_usage,
            continuous_usage=continuous_usage,
            logprobs=logprobs,
        )
        self._readers = readers
        self._untold: list[list[TokenLogprobs]] = [[] for _ in readers]

    def tokens(self, index: int, event: TokenEvent) -> str:
        self._usage.add(index, len(event.token_ids))
        self._untold[index].extend(event.logprobs)
        return self._pieces(index, self._readers[index].feed(event.text))

    def finish(self, index: int, event: FinishEvent) -> str:
        reader = self._readers[index]
        last = self._pieces(index, reader.finish())
        role = self._role(index)
        self._usage.set(index, event)
        return (
            f'{last}{role}{self._head}{{"index":{index},"delta":{{}},"logprobs":{self._logprobs_so_far(index)},'
            f'"finish_reason":"{reader.finish_reason(event)}","stop_reason":{json.dumps(event.stop_reason)}}}]'
            f"{self._usage.tail(index)}"
        )

    def _pieces(self, index: int, pieces: Sequence[Piece]) -> str:
        frames: list[str] = []
        for piece in pieces:
            frames.append(self._role(index, '""' if isinstance(piece, str) else "null"))
            frames.append(
                f'{self._head}{{"index":{index},"delta":{json.dumps(delta(piece))},'
                f'"logprobs":{self._logprobs_so_far(index)},"finish_reason":null}}]{self._usage.tail(index)}'
            )
        return "".join(frames)

    def _logprobs_so_far(self, index: int) -> str:
        steps = self._untold[index]
        if self._logprobs is None or not steps:
            return "null"
        self._untold[index] = []
        return json.dumps(self._logprobs(steps))
