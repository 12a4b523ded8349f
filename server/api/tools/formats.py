"""How models write tool calls: each format's marks, how a template gives it away, and the grammar of its calls.

Models are trained on one format each, and their chat template shows which: it writes the calls of a conversation's
past. So a format is recognised in what a template makes of a made-up call, and that works for an adapter's own
template as for the base's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

PROBE_TOOL: Final = "probe_of_tools"
"""The name of a made-up tool, and ``PROBE_CALL`` of a made-up call, in the conversation that is shown to templates."""
PROBE_CALL: Final = "probe_of_calls"

_STYLE: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""The spaces of JSON as ``tojson`` writes them in templates, which is what models were trained to write."""

_ANYTHING: Final = r"(.|\n)*"
_PYTHON_TAG: Final = "<|python_tag|>"


@dataclass(frozen=True)
class ToolFormat:
    """One way of writing calls."""

    name: str
    """As ``--tool-call-parser`` takes it."""
    mark: str
    """What begins a call, or a list of them; "" if only the whole output can be calls."""
    marks: tuple[str, ...]
    """All texts of calls that may be special tokens."""
    in_history: re.Pattern[str]
    """How a template writes the call of ``PROBE_CALL``."""
    in_instructions: re.Pattern[str] | None
    """How one does that tells the model about the format, or has its mark, but does not write the call."""
    arguments_key: str = "arguments"
    id_prefix: str = "call_"
    id_length: int = 24
    """Letters and digits of a call's id, after its prefix."""


HERMES: Final = ToolFormat(
    name="hermes",
    mark="<tool_call>",
    marks=("<tool_call>", "</tool_call>"),
    in_history=re.compile(r'<tool_call>\s*\{[^<]*"name": "' + PROBE_CALL + '"'),
    in_instructions=re.compile(r"""<tool_call>\s*\{['"]name['"]: .*['"]arguments['"]: """),
)
"""NousResearch's Hermes, and Qwen 2.5 and 3: ``<tool_call>\\n{"name": …, "arguments": …}\\n</tool_call>``."""

LLAMA3_JSON: Final = ToolFormat(
    name="llama3_json",
    mark="",
    marks=(_PYTHON_TAG,),
    in_history=re.compile(r'\{"name": "' + PROBE_CALL + '", "parameters": '),
    in_instructions=re.compile(r'\{"name": function name, "parameters": '),
    arguments_key="parameters",
)
"""Llama 3.1 to 3.3: the whole output is ``{"name": …, "parameters": …}``, several with ``; `` between them."""

MISTRAL: Final = ToolFormat(
    name="mistral",
    mark="[TOOL_CALLS]",
    marks=("[TOOL_CALLS]",),
    in_history=re.compile(r'\[TOOL_CALLS\]\s*\[\{"name": "' + PROBE_CALL + '", "arguments": '),
    in_instructions=re.compile(r"\[TOOL_CALLS\](?!" + PROBE_CALL + ")"),
    id_prefix="",
    id_length=9,  # its templates refuse a conversation with ids of any other length
)
"""Mistral up to Nemo and Small of 2024: ``[TOOL_CALLS] [{"name": …, "arguments": …}, …]``."""

MISTRAL_ARGS: Final = ToolFormat(
    name="mistral_args",
    mark="[TOOL_CALLS]",
    marks=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    in_history=re.compile(r"\[TOOL_CALLS\]" + PROBE_CALL + r"\[ARGS\]\{"),
    in_instructions=None,
    id_prefix="",
    id_length=9,
)
"""Mistral's of 2025: ``[TOOL_CALLS]name[ARGS]{…}`` for each call."""

FORMATS: Final[Mapping[str, ToolFormat]] = {one.name: one for one in (HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_ARGS)}


def recognise(conversation: str) -> ToolFormat | None:
    """The format in which a template wrote a conversation with the probe's tool and call; None for one not known."""
    for format in FORMATS.values():
        if format.in_history.search(conversation):
            return format
    for format in FORMATS.values():
        if format.in_instructions is not None and format.in_instructions.search(conversation):
            return format
    return None


@dataclass(frozen=True)
class Function:
    """A function with the JSON schema of its arguments."""

    name: str
    schema: Mapping[str, Any]


_NOTES: Final = frozenset({"title", "description", "default", "examples", "$comment", "deprecated"})
"""Keywords of JSON schema that constrain nothing."""
_SCHEMAS_BY_NAME: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_SCHEMA_LISTS: Final = frozenset({"anyOf", "allOf", "oneOf", "prefixItems"})
_SCHEMA: Final = frozenset({"items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"})


def arguments_schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object whatever it says or does not say.

    What it tells the model is left out: descriptions are most of a schema, and the size of a grammar is limited.
    """
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {**_without_notes(parameters), "type": "object"}


def _without_notes(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NOTES:
            continue
        if key in _SCHEMAS_BY_NAME and isinstance(value, dict):
            value = {name: _without_notes(one) for name, one in value.items()}
        elif key in _SCHEMA_LISTS and isinstance(value, list):
            value = [_without_notes(one) for one in value]
        elif key in _SCHEMA:
            value = _without_notes(value)
        kept[key] = value
    return kept


def call_grammar(
    format: ToolFormat,
    functions: Sequence[Function],
    special: Mapping[str, int],
    *,
    may_talk: bool,
    is_parallel: bool,
) -> str:
    """A grammar, in llguidance's Lark, of outputs that call these functions.

    Everything but the arguments is fixed to the character, as ``tool_parsers.GuidedParser`` expects it.

    Args:
        special: those of ``format.marks`` that are special tokens, with their ids. They are matched as tokens, since no
            text matches them.
        may_talk: whether there may be text before, between and instead of calls.
        is_parallel: whether there may be several calls.
    """

    def mark(text: str) -> str:
        return f"<[{special[text]}]>" if text in special else json.dumps(text)

    rules = _RULES[format.name](format, mark, may_talk=may_talk, is_parallel=is_parallel)
    names = [f"call_{i}" for i in range(len(functions))]
    rules.append(f"call: {' | '.join(names)}")
    for name, function in zip(names, functions, strict=True):
        schema = json.dumps({**function.schema, "x-guidance": _STYLE})
        if format is MISTRAL_ARGS:
            rules.append(f"{name}: {json.dumps(function.name)} {mark('[ARGS]')} %json {schema}")
        else:
            head = f'{{"name": "{function.name}", "{format.arguments_key}": '
            rules.append(f'{name}: {json.dumps(head)} %json {schema} "}}"')
    return "\n".join(rules) + "\n"


def _opening(format: ToolFormat, mark: Callable[[str], str], *, may_talk: bool) -> list[str]:
    """The rule ``opening``: the mark of a call, and any text before it if there may be some."""
    token = mark(format.mark)
    if not may_talk:
        return [f"opening: {token}"]
    # Lazy: the first mark in a text ends it. Also where the mark is a token of its own a model can spell it, and the
    # parser, which sees text, takes it for the same.
    spelled = json.dumps(format.mark)
    opening = "opening: spelled" if token == spelled else f"opening: TEXT {token} | spelled"
    return [f"TEXT: /{_ANYTHING}/", opening, f"spelled[lazy]: TEXT {spelled}"]


def _hermes(format: ToolFormat, mark: Callable[[str], str], *, may_talk: bool, is_parallel: bool) -> list[str]:
    block = f'block: opening "\\n" call "\\n" {mark("</tool_call>")}'
    if may_talk:
        start = "start: block* TEXT" if is_parallel else "start: block | TEXT"
    else:
        start = 'start: block ("\\n" block)*' if is_parallel else "start: block"
    return [start, block, *_opening(format, mark, may_talk=may_talk)]


def _llama3(_format: ToolFormat, mark: Callable[[str], str], *, may_talk: bool, is_parallel: bool) -> list[str]:
    calls = 'calls: call ("; " call)*' if is_parallel else "calls: call"
    if not may_talk:
        return ["start: calls", calls]
    tag = mark(_PYTHON_TAG)
    tags = "spelled" if tag == json.dumps(_PYTHON_TAG) else f"{tag} | spelled"
    # What begins like a call, after spaces perhaps, is no text; nor what begins with the tag, since that is lazy.
    text = r"TEXT: /\s*[^{\s]" + _ANYTHING + "/"
    return [f"start: TEXT? | ({tags})? calls", text, rf"spelled[lazy]: /\s*{re.escape(_PYTHON_TAG)}/", calls]


def _mistral(format: ToolFormat, mark: Callable[[str], str], *, may_talk: bool, is_parallel: bool) -> list[str]:
    calls = 'calls: opening " "? "[" call (", " call)* "]"' if is_parallel else 'calls: opening " "? "[" call "]"'
    start = "start: calls | TEXT" if may_talk else "start: calls"
    return [start, calls, *_opening(format, mark, may_talk=may_talk)]


def _mistral_args(format: ToolFormat, mark: Callable[[str], str], *, may_talk: bool, is_parallel: bool) -> list[str]:
    many = "*" if is_parallel else ""
    # Text comes before the first call only, which is how the model was trained.
    more = f"({mark(format.mark)} call){many}" if is_parallel else ""
    start = "start: calls | TEXT" if may_talk else "start: calls"
    return [start, f"calls: opening call {more}", *_opening(format, mark, may_talk=may_talk)]


_RULES: Final = {"hermes": _hermes, "llama3_json": _llama3, "mistral": _mistral, "mistral_args": _mistral_args}
