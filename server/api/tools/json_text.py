"""JSON inside a growing text: where it ends, and the calls that it holds."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, Final, NoReturn

_STRUCTURE: Final = re.compile(r'[{}\[\]"]')
_IN_STRING: Final = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_NOT_SPACE: Final = re.compile(r"\S")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER: Final = json.JSONDecoder(parse_constant=_no_constant)


class JsonEnd:
    """Finds the end of a JSON object or array in a growing text, looking at each character once."""

    def __init__(self, start: int) -> None:
        self._at = start
        self._depth = 0
        self._in_string = False
        self._end: int | None = None

    def forget(self) -> int:
        """How much of the text has been looked at: the caller drops it, and goes on with what follows."""
        read, self._at = self._at, 0
        return read

    def find(self, text: str) -> int | None:
        """The index behind its last bracket; None if that has not come yet. Brackets are counted, not matched."""
        while self._end is None and self._at < len(text):
            if self._in_string:
                match = _IN_STRING.match(text, self._at)
                assert match is not None
                self._at = match.end()
                if self._at == len(text) or text[self._at] == "\\":
                    return None  # a backslash at the very end: what it escapes is still to come
                self._at += 1
                self._in_string = False
                continue
            match = _STRUCTURE.search(text, self._at)
            if match is None:
                self._at = len(text)
                return None
            self._at = match.end()
            if match[0] == '"':
                self._in_string = True
                continue
            self._depth += 1 if match[0] in "{[" else -1
            if self._depth == 0:
                self._end = self._at
        return self._end


def skip_space(text: str, at: int) -> int:
    match = _NOT_SPACE.search(text, at)
    return len(text) if match is None else match.start()


def object_of(text: str) -> dict[str, Any] | None:
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def calls_in(text: str, names: Collection[str]) -> list[tuple[str, str]]:
    """The calls of a JSON array, as names and arguments; none if anything else is in it."""
    calls: list[tuple[str, str]] = []
    at = 1
    while True:
        found = call_in(text, skip_space(text, at), names)
        if found is None:
            return []
        calls.append(found[0])
        at = skip_space(text, found[1])
        if text[at : at + 1] == "]" and at + 1 == len(text):
            return calls
        if text[at : at + 1] != ",":
            return []
        at += 1


def call_in(text: str, at: int, names: Collection[str]) -> tuple[tuple[str, str], int] | None:
    """The call that the JSON object at ``at`` is, as its name and the text of its arguments, and where it ends."""
    fields: dict[str, tuple[Any, str]] = {}
    if text[at : at + 1] != "{":
        return None
    try:
        while text[at] != "}" or not fields:
            at = skip_space(text, at + 1)
            key, at = _DECODER.raw_decode(text, at)
            at = skip_space(text, at)
            if not isinstance(key, str) or key in fields or text[at] != ":":
                return None
            start = skip_space(text, at + 1)
            value, end = _DECODER.raw_decode(text, start)
            fields[key] = value, text[start:end]
            at = skip_space(text, end)
            if text[at] not in ",}":
                return None
    except (ValueError, RecursionError, IndexError):
        return None
    name, _ = fields.get("name", (None, ""))
    # Models confuse the two words, and either says the same.
    given = [fields[key] for key in ("arguments", "parameters") if key in fields]
    if len(given) != 1 or not isinstance(given[0][0], dict) or not isinstance(name, str) or name not in names:
        return None
    return (name, given[0][1]), at + 1
