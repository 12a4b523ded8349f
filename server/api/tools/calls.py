"""Tools of a chat: what a request asks for, how its output is kept to it, and what of the output is calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from manylora.server.api.access.callers import Caller
from manylora.server.api.chat_schemas import ChatRequest, NamedTool, Tool
from manylora.server.api.errors import ApiError, bad_request
from manylora.server.api.state import AppState, TokenizerLike
from manylora.server.api.structured import GrammarRefused, check_ends, compile_grammar
from manylora.server.api.tools.formats import FORMATS, Function, ToolFormat, arguments_schema, call_grammar
from manylora.server.api.tools.parsers import Arguments, CallStart, FreeParser, GuidedParser, Piece, ToolParser
from manylora.server.api.tools.templates import TemplateTools
from manylora.server.engine.constraint import Grammar
from manylora.server.engine.errors import GrammarQueueFull
from manylora.server.engine.grammar.sources import GrammarSpec
from manylora.server.engine.request import FinishEvent

_ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}
_BLAME_S: Final = 2.0
"""That finding the function at fault may take."""


@dataclass(frozen=True)
class ToolCalling:
    """How one request's outputs are read. ``grammar`` keeps them in the format; None if nothing does."""

    format: ToolFormat
    names: tuple[str, ...]
    may_talk: bool
    is_parallel: bool
    is_named: bool
    grammar: Grammar | None
    shown_special_ids: frozenset[int]
    """The format's marks among the special tokens, whose text the parser needs to see."""

    def reader(self) -> CallReader:
        """For one choice."""
        if self.grammar is not None:
            return CallReader(GuidedParser(self.format, may_talk=self.may_talk), self)
        return CallReader(FreeParser(self.format, self.names, is_parallel=self.is_parallel), self)


class CallReader:
    """Reads one choice's output."""

    def __init__(self, parser: ToolParser, calling: ToolCalling) -> None:
        self._parser = parser
        self._calling = calling
        self._has_calls = False

    def feed(self, text: str) -> list[Piece]:
        return self._seen(self._parser.feed(text))

    def finish(self) -> list[Piece]:
        return self._seen(self._parser.finish())

    def finish_reason(self, finish: FinishEvent) -> str:
        """``tool_calls`` if the model chose to call, and was not cut off in a call. After all pieces."""
        if finish.reason != "stop" or not self._has_calls or self._calling.is_named or self._parser.is_cut:
            return finish.reason
        return "tool_calls"

    def message(self, text: str) -> dict[str, Any]:
        """The message that a whole output is."""
        content: list[str] = []
        calls: list[dict[str, Any]] = []
        arguments: list[list[str]] = []
        for piece in [*self.feed(text), *self.finish()]:
            if isinstance(piece, str):
                content.append(piece)
            elif isinstance(piece, CallStart):
                calls.append({"id": piece.id, "type": "function", "function": {"name": piece.name}})
                arguments.append([])
            else:
                arguments[piece.index].append(piece.text)
        for call, pieces in zip(calls, arguments, strict=True):
            call["function"]["arguments"] = "".join(pieces)
        said = "".join(content)
        message: dict[str, Any] = {"role": "assistant", "content": said if said or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        return message

    def _seen(self, pieces: list[Piece]) -> list[Piece]:
        self._has_calls = self._has_calls or any(not isinstance(piece, str) for piece in pieces)
        return pieces


def delta(piece: Piece) -> dict[str, Any]:
    """The ``delta`` of a streamed chunk, as OpenAI frames it: a call's id and name first, then its arguments."""
    if isinstance(piece, str):
        return {"content": piece}
    if isinstance(piece, Arguments):
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
    function = {"name": piece.name, "arguments": ""}
    return {"tool_calls": [{"index": piece.index, "id": piece.id, "type": "function", "function": function}]}


async def tool_calling(state: AppState, body: ChatRequest, template: str | None, caller: Caller) -> ToolCalling | None:
    """How calls are found in the answers to ``body``; None if there are none to find.

    Raises ApiError 400: the template takes no tools or writes calls in no known format, a function's schema cannot be
    kept, or another field contradicts. And as ``compile_grammar``.
    """
    if not body.tools or body.tool_choice == "none":
        return None
    format = await _format(state, template)
    if body.grammar is not None:
        param = body.grammar[0]
        raise bad_request(
            f'`{param}` and `tools` cannot both shape the answer: leave one out, or set `tool_choice` to "none".', param
        )
    tokenizer = state.serving.tokenizer
    special = _special_marks(tokenizer, format)
    is_named = isinstance(body.tool_choice, NamedTool)
    may_talk = body.tool_choice == "auto"
    is_parallel = body.parallel_tool_calls and not is_named
    tools = list(enumerate(body.tools))
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        tools = [(i, tool) for i, tool in tools if tool.function.name == name]
    grammar = None
    if not may_talk or any(tool.function.strict for tool in body.tools):
        param = "tools" if may_talk else "tool_choice"
        check_ends(body, param)
        try:
            functions = [_function(tool, i, is_free=may_talk and not tool.function.strict) for i, tool in tools]
            text = call_grammar(format, functions, special, may_talk=may_talk, is_parallel=is_parallel)
        except RecursionError:
            raise bad_request("`tools`: the schema of a function is nested too deeply.", "tools") from None
        try:
            grammar = await compile_grammar(state, GrammarSpec("lark", text), param, caller)
        except GrammarRefused as error:
            raise await _at_fault(state, tools, functions, caller, error) from None
    return ToolCalling(
        format,
        tuple(tool.function.name for _, tool in tools),
        may_talk,
        is_parallel,
        is_named,
        grammar,
        frozenset(special.values()),
    )


async def _format(state: AppState, template: str | None) -> ToolFormat:
    asked = state.config.tool_call_parser
    if asked == "none":
        raise bad_request("`tools` are off on this server (--tool-call-parser none).", "tools")
    found = await tools_shown(state, template)
    format = found.format if asked == "auto" else FORMATS[asked]
    if format is None:
        raise bad_request(
            "`tools`: the chat template of this model writes calls in a format that is not known here "
            f"({', '.join(FORMATS)} are; --tool-call-parser sets one).",
            "tools",
        )
    return format


async def tools_shown(state: AppState, template: str | None) -> TemplateTools:
    """What the template does with tools. Raises ApiError 400 if it does not show them to the model."""
    found = await state.templates.tools_of(state.serving.tokenizer, template)
    if not found.takes_tools:
        raise bad_request(
            "`tools`: the chat template of this model does not show tools to it, so it cannot call any; leave the "
            "field out.",
            "tools",
        )
    return found


def _special_marks(tokenizer: TokenizerLike, format: ToolFormat) -> dict[str, int]:
    found: dict[str, int] = {}
    for mark in format.marks:
        ids = tokenizer.encode(mark, add_special_tokens=False)
        if len(ids) == 1 and ids[0] in tokenizer.special_ids:
            found[mark] = ids[0]
    return found


def _function(tool: Tool, index: int, *, is_free: bool) -> Function:
    """``is_free``: its arguments may be any object, as nobody asked for them to be kept to the schema."""
    function, param = tool.function, f"tools.{index}.function.parameters"
    given = function.parameters
    if is_free and given is not None:
        return Function(function.name, _ANY_OBJECT)
    if given is not None and given.get("type", "object") != "object":
        raise bad_request(f'`{param}.type` must be "object", since arguments have names.', f"{param}.type")
    if given is not None and "x-guidance" in given:
        raise bad_request(f"`{param}.x-guidance` is not taken in a schema here; leave it out.", param)
    return Function(function.name, arguments_schema(given))


async def _at_fault(
    state: AppState,
    tools: Sequence[tuple[int, Tool]],
    functions: Sequence[Function],
    caller: Caller,
    refusal: GrammarRefused,
) -> ApiError:
    """The error of the first function whose schema alone cannot be kept; ``refusal``, that of all together, if it is
    none of theirs or takes too long to tell."""
    if state.serving.grammars is None or refusal.is_costly:
        return refusal
    try:
        async with asyncio.timeout(_BLAME_S):
            for (i, _), function in zip(tools, functions, strict=True):
                spec = GrammarSpec("json_schema", json.dumps(function.schema))
                await compile_grammar(state, spec, f"tools.{i}.function.parameters", caller)
    except GrammarRefused as error:
        return error
    except (TimeoutError, GrammarQueueFull):
        pass
    return refusal
