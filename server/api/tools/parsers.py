"""Tool calls found in an output's text as it comes: pieces of content, and calls.

Two parsers, for two kinds of promise. ``FreeParser`` reads an output that nothing forced into the format: what begins
like a call is held back until it is a whole one, and stays text if it does not become one. ``GuidedParser`` reads an
output that a grammar (``tool_formats.call_grammar``) keeps in the format once a call has begun: the arguments are
passed on as they come, since nothing can turn out wrong with them any more; they end early only where the output does.

Neither gives a piece of a call's mark as content. Properties, tested: how the text is divided into feeds makes no
difference, and each character is looked at a bounded number of times.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from manylora.server.api.tools.formats import HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_ARGS, ToolFormat
from manylora.server.api.tools.json_text import JsonEnd, call_in, calls_in, object_of, skip_space

_MAX_MALFORMED: Final = 16
"""Calls of one output that may turn out to be text; each of them may have to be read again to its end."""

_NAME: Final = re.compile(r"([A-Za-z0-9_.-]{1,128})(?:\[CALL_ID\]\w{1,64})?\[ARGS\]\s*")
_LONGEST_NAME: Final = 256
_PYTHON_TAG: Final = "<|python_tag|>"
_HERMES_END: Final = "</tool_call>"
_ALPHANUMERIC: Final = string.ascii_letters + string.digits

# What `tool_formats.call_grammar` fixes before and after a call's arguments.
_HEADS: Final = {
    "hermes": re.compile(r'\s*<tool_call>\n\{"name": "([^"]+)", "arguments": (?=\{)'),
    "llama3_json": re.compile(r'(?:; |\s*<\|python_tag\|>)?\{"name": "([^"]+)", "parameters": (?=\{)'),
    "mistral": re.compile(r'(?:\s*\[TOOL_CALLS\] ?\[|, )\{"name": "([^"]+)", "arguments": (?=\{)'),
    "mistral_args": re.compile(r"\s*\[TOOL_CALLS\]([^\[]+)\[ARGS\](?=\{)"),
}
_TAILS: Final = {
    "hermes": re.compile(r"\}\n</tool_call>"),
    "llama3_json": re.compile(r"\}"),
    "mistral": re.compile(r"\}(?:\]|(?=,))"),
    "mistral_args": re.compile(r""),
}


@dataclass(frozen=True)
class CallStart:
    """A call begins; its arguments follow as ``Arguments``."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """The next characters of a call's arguments, JSON text."""

    index: int
    text: str


Piece = str | CallStart | Arguments
"""A ``str`` is content."""


class ToolParser(Protocol):
    """Reads one output."""

    def feed(self, text: str) -> list[Piece]: ...
    def finish(self) -> list[Piece]:
        """At the end of the output: what was held back."""
        ...

    @property
    def is_cut(self) -> bool:
        """Whether the output ended inside a call that has been given away."""
        ...


class _Parser:
    """What both parsers share: text up to a call, without the spaces that border on calls."""

    def __init__(self, format: ToolFormat) -> None:
        self._format = format
        self._held = ""
        """Not given away yet: spaces, and what is or may become a mark and its call."""
        self._n_calls = 0
        self._is_plain = False
        """Of a format without a mark: the output is text, since it did not begin like a call."""

    @property
    def is_cut(self) -> bool:
        return False

    def _new_call(self, name: str) -> CallStart:
        text = "".join(secrets.choice(_ALPHANUMERIC) for _ in range(self._format.id_length))
        call = CallStart(self._n_calls, self._format.id_prefix + text, name)
        self._n_calls += 1
        return call

    def _text_before_call(self, out: list[Piece]) -> bool:
        """Give away what is certain to be content; whether ``_held`` is now spaces and the beginning of a call."""
        held, mark = self._held, self._format.mark
        if not mark:
            return self._begins_with_call(out)
        at = held.find(mark)
        if at < 0:
            # What may be the beginning of a mark, and the spaces before it.
            at = len(held) - next((n for n in range(len(mark) - 1, 0, -1) if held.endswith(mark[:n])), 0)
            is_call = False
        else:
            is_call = True
        end = len(held[:at].rstrip())
        if end:
            out.append(held[:end])
            self._held = held[end:]
        return is_call

    def _begins_with_call(self, out: list[Piece]) -> bool:
        if not self._is_plain:
            begun = self._held.lstrip()
            if self._n_calls:  # another call may follow
                begun = begun.removeprefix(";").lstrip()
            elif begun.startswith(_PYTHON_TAG):
                begun = begun[len(_PYTHON_TAG) :].lstrip()
            elif _PYTHON_TAG.startswith(begun):
                return False  # perhaps nothing yet
            if not begun:
                return False
            if begun.startswith("{"):
                return True
            self._is_plain = True
        if self._held:
            out.append(self._held)
        self._held = ""
        return False

    def _rest(self) -> list[Piece]:
        """What is left at the end, as content; spaces after a call are none."""
        rest, self._held = self._held, ""
        return [rest] if rest and not (self._n_calls and rest.isspace()) else []


class FreeParser(_Parser):
    """Reads what a model wrote freely.

    A call must name one of ``names``, with an object of arguments, in the format's own form; otherwise it is text.
    Unless ``is_parallel``, calls after the first are dropped.
    """

    def __init__(self, format: ToolFormat, names: Collection[str], *, is_parallel: bool = True) -> None:
        super().__init__(format)
        self._names = frozenset(names)
        self._is_parallel = is_parallel
        self._in_call = False
        self._json: JsonEnd | None = None
        self._n_malformed = 0

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        return list(self._read(is_end=False))

    def finish(self) -> list[Piece]:
        return [*self._read(is_end=True), *self._rest()]

    def _read(self, *, is_end: bool) -> Iterator[Piece]:
        while self._n_malformed < _MAX_MALFORMED:
            if not self._in_call:
                out: list[Piece] = []
                self._in_call = self._text_before_call(out)
                yield from out
                if not self._in_call:
                    return
            calls, end = self._calls(is_end)
            if calls is None:
                if not is_end:
                    return
                yield self._give_up()
            elif not calls:
                yield self._give_up()
            else:
                self._held, self._in_call, self._json = self._held[end:], False, None
                for name, arguments in calls:
                    if self._is_parallel or not self._n_calls:
                        call = self._new_call(name)
                        yield call
                        yield Arguments(call.index, arguments)
        if self._held:  # it has lost the format
            text, self._held = self._held, ""
            yield text

    def _give_up(self) -> str:
        """What looked like a call is text: its mark, and the rest is looked at again."""
        self._in_call, self._json = False, None
        self._n_malformed += 1
        mark = self._format.mark
        end = self._held.index(mark) + len(mark) if mark else len(self._held)
        self._is_plain = not mark
        text, self._held = self._held[:end], self._held[end:]
        return text

    def _calls(self, is_end: bool) -> tuple[list[tuple[str, str]] | None, int]:
        """The calls (name, arguments) that ``_held`` begins with, and where they end; none if they are malformed, None
        if they are not whole yet."""
        start, name = self._value_start()
        if start is None or start == len(self._held):
            return None, 0
        if self._held[start] != ("[" if self._format is MISTRAL else "{"):
            return [], 0
        self._json = self._json or JsonEnd(start)
        end = self._json.find(self._held)
        if end is None:
            return None, 0
        value = self._held[start:end]
        if name is not None:
            return ([(name, value)] if name in self._names and object_of(value) is not None else []), end
        if self._format is MISTRAL:
            calls = calls_in(value, self._names)
        else:
            call = call_in(value, 0, self._names)
            calls = [call[0]] if call is not None and call[1] == len(value) else []
        if self._format is not HERMES or not calls:
            return calls, end
        closing = skip_space(self._held, end)
        if self._held.startswith(_HERMES_END, closing):
            return calls, closing + len(_HERMES_END)
        if _HERMES_END.startswith(self._held[closing:]):
            # Cut off in its closing mark, or without one, the call is whole all the same.
            return (calls, len(self._held)) if is_end else (None, 0)
        return [], 0

    def _value_start(self) -> tuple[int | None, str | None]:
        """Where the JSON of a call begins, None if that is not known yet; and the name, if the format has it before."""
        held = self._held
        at = skip_space(held, 0)
        if self._format is LLAMA3_JSON:
            return held.index("{"), None
        at += len(self._format.mark)
        if self._format is not MISTRAL_ARGS:
            return skip_space(held, at), None
        match = _NAME.match(held, at)
        if match is not None:
            return match.end(), match[1]
        is_possible = len(held) - at < _LONGEST_NAME and "[ARGS]" not in held[at:]
        return (None, None) if is_possible else (0, None)  # 0: the mark is there, and no JSON


class GuidedParser(_Parser):
    """Reads what ``tool_formats.call_grammar`` forced; there is text in it only if ``may_talk``."""

    def __init__(self, format: ToolFormat, *, may_talk: bool) -> None:
        super().__init__(format)
        self._may_talk = may_talk
        self._head = _HEADS[format.name]
        self._tail = _TAILS[format.name]
        self._state: Literal["text", "head", "arguments", "tail"] = "text"
        self._json = JsonEnd(0)

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        out: list[Piece] = []
        while self._step(out):
            pass
        return out

    def finish(self) -> list[Piece]:
        if self._state == "arguments":  # cut off at a length or a stop string
            return [Arguments(self._n_calls - 1, self._held)] if self._held else []
        # The beginning of a call whose name never came is no content.
        return self._rest() if self._state == "text" and self._may_talk else []

    @property
    def is_cut(self) -> bool:
        return self._state == "arguments"

    def _step(self, out: list[Piece]) -> bool:
        """Read on in ``_held``; whether there may be more to read."""
        match self._state:
            case "text":
                if not self._text_before_call(out):
                    return False
                self._state = "head"
            case "head":
                match = self._head.match(self._held)
                if match is None:
                    return False
                out.append(self._new_call(match[1]))
                self._held, self._json, self._state = self._held[match.end() :], JsonEnd(0), "arguments"
            case "arguments":
                end = self._json.find(self._held)
                n_read = self._json.forget() if end is None else end
                if n_read:
                    out.append(Arguments(self._n_calls - 1, self._held[:n_read]))
                    self._held = self._held[n_read:]
                if end is None:
                    return False
                self._state = "tail"
            case "tail":
                match = self._tail.match(self._held)
                if match is None:
                    return False
                self._held = self._held[match.end() :]
                self._state = "head" if self._held.startswith(",") and self._format is MISTRAL else "text"
        return True
