"""Requests as JSON lines, one each: what a profile writes, what --trace replays, and what bench/ can share.

    {"at_s": 0.25, "model": "sql", "kind": "chat", "prompt_tokens": 64, "prompt_seed": 7, "max_tokens": 32}
    {"at_s": 0.5, "model": "smollm2", "prompt": [1000, 1001, 1002], "max_tokens": 8}

loadtest/README.md has the fields. A field that is not known is an error, as is every value that would have to be
guessed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from loadgen.errors import TraceError
from loadgen.prompts import prompt_text

Kind = Literal["completion", "chat"]
PATHS: dict[str, str] = {"completion": "/v1/completions", "chat": "/v1/chat/completions"}

_RESERVED = frozenset({"model", "messages", "prompt", "max_tokens", "stream", "stream_options", "ignore_eos"})
"""What ``extra`` must not name: the trace's own fields say it."""
_MAX_TOKENS = 1_000_000
_MAX_SECONDS = 86_400
"""A trace ends within a day: a run is bounded."""


@dataclass(frozen=True)
class TracedRequest:
    """One request. Either ``prompt`` (text, or token ids of a completion) or about ``prompt_tokens`` tokens of random
    words. ``extra`` are further fields of its body, such as a grammar."""

    at_s: float
    model: str
    max_tokens: int
    kind: Kind = "completion"
    prompt: str | tuple[int, ...] | None = None
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    prompt_seed: int = 0
    ignore_eos: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The request's JSON, streamed and with the usage at its end; its path is ``PATHS[kind]``."""
        prompt: Any = self.prompt
        if prompt is None:
            prompt = prompt_text(
                self.prompt_tokens, prefix_tokens=self.prefix_tokens, model=self.model, seed=self.prompt_seed
            )
        content = {"messages": [{"role": "user", "content": prompt}]} if self.kind == "chat" else {"prompt": prompt}
        return {
            "model": self.model,
            **content,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.ignore_eos else {}),
            **self.extra,
        }

    def line(self) -> str:
        """Its JSON line, without fields at their defaults."""
        fields: dict[str, Any] = {"at_s": self.at_s, "model": self.model, "kind": self.kind}
        if self.prompt is None:
            fields |= {"prompt_tokens": self.prompt_tokens, "prompt_seed": self.prompt_seed}
            if self.prefix_tokens:
                fields["prefix_tokens"] = self.prefix_tokens
        else:
            fields["prompt"] = self.prompt
        fields["max_tokens"] = self.max_tokens
        if not self.ignore_eos:
            fields["ignore_eos"] = False
        if self.extra:
            fields["extra"] = self.extra
        return json.dumps(fields, ensure_ascii=False)


def parse_line(text: str) -> TracedRequest:
    """TraceError, naming the field, for anything that is not a request."""
    try:
        given = json.loads(text)
    except ValueError as error:
        raise TraceError(f"not JSON: {error}") from None
    if not isinstance(given, dict):
        raise TraceError(f"expected a JSON object, got {text[:40]!r}")
    fields = _Fields(given)
    at_s = fields.number("at_s", high=_MAX_SECONDS)
    model = fields.text("model")
    kind = fields.text("kind", "completion")
    if kind not in get_args(Kind):
        raise TraceError(f"kind: expected completion or chat, got {kind!r}")
    max_tokens = fields.integer("max_tokens", low=1)
    prompt = _prompt(fields, kind)
    if prompt is None and "prompt_tokens" not in given:
        raise TraceError("prompt: missing, and so is prompt_tokens")
    made = ("prompt_tokens", "prefix_tokens", "prompt_seed")
    if prompt is not None and any(name in given for name in made):
        raise TraceError("prompt: not together with prompt_tokens, prefix_tokens or prompt_seed")
    request = TracedRequest(
        at_s=at_s,
        model=model,
        max_tokens=max_tokens,
        kind="chat" if kind == "chat" else "completion",
        prompt=prompt,
        prompt_tokens=fields.integer("prompt_tokens", 0 if prompt is not None else None, low=0 if prompt else 1),
        prefix_tokens=fields.integer("prefix_tokens", 0),
        prompt_seed=fields.integer("prompt_seed", 0, high=2**63),
        ignore_eos=fields.boolean("ignore_eos", True),
        extra=_extra(fields),
    )
    if unknown := sorted(given.keys() - fields.read):
        raise TraceError(f"{unknown[0]}: no such field; there are {', '.join(sorted(fields.read))}")
    return request


def read_trace(path: Path) -> list[TracedRequest]:
    """Its requests in the order of their times (those of one time in the file's). TraceError, naming the line and the
    field, if anything is wrong with any line, or if there is none."""
    requests = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    try:
                        requests.append(parse_line(text))
                    except TraceError as error:
                        raise TraceError(f"{path}:{number}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {error}") from None
    if not requests:
        raise TraceError(f"{path}: no requests")
    return sorted(requests, key=lambda request: request.at_s)


def write_trace(path: Path, requests: Iterable[TracedRequest]) -> int:
    """How many were written."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for request in requests:
            file.write(request.line() + "\n")
            count += 1
    return count


class _Fields:
    """Typed access to a line's fields, which remembers the names that it was asked for."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.read: set[str] = set()

    def get(self, name: str, default: Any) -> Any:
        self.read.add(name)
        value = self.given.get(name, default)
        if value is None and name not in self.given:
            raise TraceError(f"{name}: missing")
        return value

    def number(self, name: str, *, high: int) -> float:
        value = self.get(name, None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
            raise TraceError(f"{name}: expected a number from 0 to {high}, got {value!r}")
        return float(value)

    def integer(self, name: str, default: int | None = None, *, low: int = 0, high: int = _MAX_TOKENS) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise TraceError(f"{name}: expected an integer from {low} to {high}, got {value!r}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self.get(name, default)
        if not isinstance(value, str) or not value:
            raise TraceError(f"{name}: expected a text, got {value!r}")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise TraceError(f"{name}: expected true or false, got {value!r}")
        return value


def _prompt(fields: _Fields, kind: str) -> str | tuple[int, ...] | None:
    fields.read.add("prompt")
    if "prompt" not in fields.given:
        return None
    value = fields.given["prompt"]
    if isinstance(value, str) and value:
        return value
    ids = isinstance(value, list) and value and all(type(token) is int and token >= 0 for token in value)
    if not ids:
        raise TraceError(f"prompt: expected a text or a list of token ids, got {str(value)[:40]!r}")
    if kind == "chat":
        raise TraceError("prompt: token ids are for completions; a chat takes a text")
    return tuple(value)


def _extra(fields: _Fields) -> dict[str, Any]:
    value = fields.get("extra", {})
    if not isinstance(value, dict):
        raise TraceError(f"extra: expected an object, got {value!r}")
    if taken := sorted(_RESERVED & value.keys()):
        raise TraceError(f"extra: {taken[0]} is said by the trace's own fields")
    return value
