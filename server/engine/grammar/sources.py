"""What may be asked of an output: its translation into llguidance's grammars, and their compilation within limits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark", "ebnf"]

JSON_WHITESPACE: Final = r"[ ]|\n[ ]{0,64}"
"""Between two tokens of JSON, where there may be any: one space, or one line break and the indentation after it.

That is what ``json.dumps`` writes with and without ``indent``, 16 levels of 4 spaces deep, so it is what models have
learnt. More would be JSON too, but a model that has lost the thread repeats itself, whitespace most of all: bounded, it
must come to the next token instead of filling ``max_tokens`` with line breaks.
"""

_OPTIONS: Final = "x-guidance"
"""The key under which llguidance takes options of its own from a schema."""
_MAX_RULES: Final = 500
"""Of a GBNF grammar: its conversion looks at all of them once for each."""
_UNSERVED: Final = re.compile(r"^[ \t]*[?!]?[A-Za-z_][\w-]*[ \t]*\[[^\n]*?\b(temperature|stop)\s*=", re.MULTILINE)
"""Attributes of a rule that a token mask cannot keep: another temperature, and text that is taken back."""


class InvalidGrammar(ValueError):
    """A specification that is malformed, not supported or too costly; the message is fit for a client.

    ``is_costly``: it was given up because of the time or the memory that it takes.
    """

    def __init__(self, message: str, *, is_costly: bool = False) -> None:
        super().__init__(message)
        self.is_costly = is_costly


@dataclass(frozen=True)
class GrammarSpec:
    """What an output must match as a whole. ``text`` is, by ``kind``,

    - ``json_schema``: a JSON schema, as JSON;
    - ``json_object``: empty (any JSON object);
    - ``regex``: a regular expression in the syntax of Rust's ``regex`` crate;
    - ``choice``: a JSON array of strings, of which it must be one;
    - ``lark``: a grammar in llguidance's dialect of Lark;
    - ``ebnf``: that, or llama.cpp's GBNF.
    """

    kind: GrammarKind
    text: str = ""


def source_of(spec: GrammarSpec) -> str:
    """llguidance's form of it, checked only for what llguidance would accept and ignore. Raises InvalidGrammar."""
    match spec.kind:
        case "json_object":
            return _json_schema({"type": "object"})
        case "json_schema":
            return _json_schema(_schema(spec.text))
        case "regex":
            return LLMatcher.grammar_from_regex(spec.text)
        case "choice":
            return LLMatcher.grammar_from_regex("|".join(re.escape(choice) for choice in _choices(spec.text)))
        case "lark":
            return _lark(spec.text)
        case "ebnf":
            return _lark(spec.text if is_lark_syntax(spec.text) else _from_gbnf(spec.text))


def compile_source(trie: LLTokenizer, source: str) -> LLMatcher:
    """A matcher before its first token. Raises InvalidGrammar, also for what llguidance would only warn of."""
    matcher = LLMatcher(trie, source, log_level=0, limits=_limits())
    if matcher.is_error():
        raise InvalidGrammar(matcher.get_error().removesuffix("<non-verbose/>").strip())
    warnings = matcher.get_grammar_warnings()
    if warnings:
        raise InvalidGrammar("; ".join(warnings))
    # The first mask is computed here: what it takes to know is then in every copy of the matcher, and a grammar with no
    # way to begin is found out before anybody generates.
    mask = np.empty((trie.vocab_size + 31) // 32, np.int32)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    problem = problem_of(matcher)
    if problem is not None:
        raise InvalidGrammar(problem)
    return matcher


def problem_of(matcher: LLMatcher) -> str | None:
    """After a mask: why there is none, because of a limit or because nothing can follow; None if there is one."""
    if matcher.is_error():
        reason = matcher.get_error().partition("\n")[0]
        if reason.startswith("NoExtension"):
            return "no output can match the grammar"
        return f"the grammar cannot be followed: {reason}"
    if matcher.is_stopped() and not matcher.is_accepting():
        return f"the grammar cannot be followed: {matcher.stop_reason()}"
    return None


def _limits() -> LLParserLimits:
    """Tighter than llguidance's own by a factor of 2.5 to 12, and far above what usual grammars need: a step of the
    engine waits for each mask, and each state of a lexer is memory of a request."""
    return LLParserLimits(step_lexer_fuel=50_000, step_max_items=20_000, max_lexer_states=20_000, verbose_errors=False)


def inline_schema(schema: Mapping[str, Any]) -> str:
    """A JSON schema to follow ``%json`` in a Lark grammar, with whitespace bounded as in ``json_schema``. Raises
    InvalidGrammar."""
    _check_options(schema)
    return json.dumps({**schema, _OPTIONS: {"whitespace_flexible": True, "whitespace_pattern": JSON_WHITESPACE}})


def _schema(text: str) -> Mapping[str, Any]:
    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidGrammar(f"the schema is not valid JSON: {error}") from None
    if not isinstance(schema, dict):
        raise InvalidGrammar("the schema must be a JSON object")
    return schema


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _json_schema(schema: Mapping[str, Any]) -> str:
    _check_options(schema)
    try:
        return LLMatcher.grammar_from_json_schema(
            json.dumps(schema),
            # Set here, so that nothing but this decides: unknown keywords of JSON schema are refused, not ignored, and
            # oneOf is not taken for anyOf.
            overrides={
                "whitespace_flexible": True,
                "whitespace_pattern": JSON_WHITESPACE,
                "lenient": False,
                "coerce_one_of": False,
            },
        )
    except ValueError as error:  # nested more than 128 deep
        raise InvalidGrammar(f"the schema cannot be read: {error}") from None


def _check_options(schema: Mapping[str, Any]) -> None:
    if _OPTIONS in schema:
        raise InvalidGrammar(f"`{_OPTIONS}` is not taken in a schema here; leave it out")


def _choices(text: str) -> list[str]:
    choices = json.loads(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise InvalidGrammar("expected one or more strings to choose from")
    if "" in choices:
        raise InvalidGrammar("a choice must not be empty")
    return choices


def _lark(text: str) -> str:
    found = _UNSERVED.search(text)
    if found is not None:
        raise InvalidGrammar(f"the attribute `{found[1]}` of a rule is not served here")
    return LLMatcher.grammar_from_lark(text)


def _from_gbnf(text: str) -> str:
    if text.count("::=") > _MAX_RULES:
        raise InvalidGrammar(f"a GBNF grammar may have {_MAX_RULES} rules; write a larger one in Lark")
    try:
        return gbnf_to_lark(text)
    except Exception as error:  # noqa: BLE001 - the converter raises Exception itself for a grammar that is wrong
        raise InvalidGrammar(f"it is neither Lark (no `start:`) nor GBNF: {error}") from None
