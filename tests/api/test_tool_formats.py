"""Formats recognised in templates, and grammars that only let through what the parsers understand."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from manylora.server.api.tools.formats import (
    FORMATS,
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    MISTRAL_ARGS,
    Function,
    ToolFormat,
    arguments_schema,
    call_grammar,
)
from manylora.server.api.tools.parsers import FreeParser, GuidedParser
from manylora.server.api.tools.templates import KnownTemplates, TemplateTools
from manylora.server.engine.grammar.grammars import GrammarCompiler
from manylora.server.engine.grammar.sources import GrammarSpec
from manylora.server.model.tokenizer import Tokenizer
from tests.api.test_tool_parsers import parse
from tests.api.tool_grammars import SPECIAL, drawn, spelled, vocabulary

# What matters of the templates of well-known models: where the tools go, how a call is written, what is refused.
_TURNS = "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}</user>{% endif %}"
_TOOLS = "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
_QWEN = (
    _TOOLS + "{% if tools %}<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>{% endif %}'
    + _TURNS
    + """{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": """
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}{% endfor %}"
)
_HERMES = (
    _TOOLS + _TURNS + """{% for c in m.tool_calls or [] %}\n<tool_call>\n{ "arguments": """
    """{{ c.function.arguments | tojson }}, "name": "{{ c.function.name }}"}\n</tool_call> {% endfor %}{% endfor %}"""
)
_HERMES_TOLD = (
    _TOOLS
    + "As: <tool_call>\n{'name': <function-name>, 'arguments': <args-dict>}\n</tool_call>"
    + _TURNS
    + "{% endfor %}"
)
_LLAMA = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. '
    + _TOOLS
    + _TURNS
    + "{% if 'tool_calls' in m %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one at once') }}{% endif %}"
    """{% set f = m.tool_calls[0].function %}{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}"""
    "{% endif %}{% endfor %}"
)
_MISTRAL_IDS = "{% if c.id | length != 9 %}{{ raise_exception('ids must have length 9') }}{% endif %}"
_MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}{% if loop.last or tools %}[AVAILABLE_TOOLS]"
    "{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]{% endif %}"
    "{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    + _MISTRAL_IDS
    + """{{ (c.function | tojson)[:-1] }}, "id": "{{ c.id }}"}{% endfor %}]{% endif %}{% endfor %}"""
)
_MISTRAL_V11 = (
    _TOOLS + _TURNS + "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]"
    "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
_XML = (
    _TOOLS + _TURNS + "{% for c in m.tool_calls or [] %}<tool_call>\n<function={{ c.function.name }}>\n</function>\n"
    "</tool_call>{% endfor %}{% endfor %}"
)
_NO_CALLS = (
    _TOOLS + "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
)
_NO_TOOLS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    backend = Backend(models.BPE(vocab={"a": 0}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    hf.chat_template = _QWEN
    return Tokenizer(hf)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, TemplateTools(True, HERMES)),
        (_HERMES, TemplateTools(True, HERMES)),
        (_HERMES_TOLD, TemplateTools(True, HERMES)),
        (_LLAMA, TemplateTools(True, LLAMA3_JSON)),
        (_MISTRAL, TemplateTools(True, MISTRAL)),
        (_MISTRAL_V11, TemplateTools(True, MISTRAL_ARGS)),
        (_XML, TemplateTools(True, None)),
        (_NO_CALLS, TemplateTools(True, None)),
        (_NO_TOOLS, TemplateTools(False, None)),
        ("{{ raise_exception('never') }}", TemplateTools(False, None)),
        ("{{ messages[9].content }}{% for %}", TemplateTools(False, None)),
    ],
)
def test_templates_show_their_format(tokenizer: Tokenizer, template: str | None, expected: TemplateTools) -> None:
    assert asyncio.run(KnownTemplates().tools_of(tokenizer, template)) == expected


def test_a_template_is_tried_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[str | None] = []
    render = tokenizer.render_chat_template

    def counting(*args: Any, **kwargs: Any) -> str:
        rendered.append(kwargs["chat_template"])
        return render(*args, **kwargs)

    monkeypatch.setattr(tokenizer, "render_chat_template", counting)
    known = KnownTemplates()
    for _ in range(3):
        for template in (None, _MISTRAL):
            asyncio.run(known.tools_of(tokenizer, template))
    assert rendered == [None, _MISTRAL]


# --- grammars ---------------------------------------------------------------------------------------------------------

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 5},
        "unit": {"enum": ["C", "F", "</tool_call>"]},
        "days": {"type": "array", "items": {"$ref": "#/$defs/day"}, "maxItems": 2},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"day": {"type": "integer", "minimum": 1, "maximum": 31}},
}
FUNCTIONS = {"get_weather": arguments_schema(WEATHER), "get": {"type": "object"}, "now": arguments_schema(None)}


def test_what_constrains_nothing_is_left_out() -> None:
    """Where it is a keyword, not where it is a property's name or a value."""
    note = {"title": "T", "description": "D", "default": 1, "examples": [2]}
    text = {"type": "string", **note}
    schema = {
        **note,
        "properties": {
            "description": text,
            "title": {"const": note},
            "many": {"items": {"anyOf": [text, {"enum": [note]}]}},
        },
        "additionalProperties": text,
        "$defs": {"default": text},
        "required": ["title"],
    }
    assert arguments_schema(schema) == {
        "type": "object",
        "properties": {
            "description": {"type": "string"},
            "title": {"const": note},
            "many": {"items": {"anyOf": [{"type": "string"}, {"enum": [note]}]}},
        },
        "additionalProperties": {"type": "string"},
        "$defs": {"default": {"type": "string"}},
        "required": ["title"],
    }


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(vocabulary().trie())
    yield compiler
    compiler.close()


@pytest.mark.parametrize("has_special", [False, True])
@pytest.mark.parametrize("may_talk", [False, True])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_whatever_a_grammar_lets_through_is_understood(
    compiler: GrammarCompiler, format: ToolFormat, may_talk: bool, has_special: bool
) -> None:
    special = {mark: 258 + SPECIAL.index(mark) for mark in format.marks if mark in SPECIAL} if has_special else {}
    functions = [Function(name, schema) for name, schema in FUNCTIONS.items()]
    hints = (*format.marks, "{", " \n", " <|python_tag|>{", '{"name": ')
    n_calls: list[int] = []
    for is_parallel in (False, True):
        text = call_grammar(format, functions, special, may_talk=may_talk, is_parallel=is_parallel)
        grammar = compiler.submit(GrammarSpec("lark", text)).result()
        for seed in range(12):
            pieces = spelled(drawn(grammar.start(), random.Random(seed), hints=hints))
            content, calls = parse(GuidedParser(format, may_talk=may_talk), *pieces)
            shown = "".join(pieces)
            assert not content or may_talk, shown
            if not calls:
                assert content == shown
                assert may_talk
            for name, arguments in calls:
                jsonschema_rs.validate(FUNCTIONS[name], json.loads(arguments))
            assert len(calls) <= 1 or is_parallel, shown
            # Who reads it without knowing that it was forced understands the same.
            assert parse(FreeParser(format, FUNCTIONS), *pieces) == (content, calls), shown
            n_calls.append(len(calls))
    assert any(n_calls)
    assert 0 in n_calls or not may_talk
    assert max(n_calls) > 1 or format is MISTRAL_ARGS or may_talk


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_one_forced_call_is_complete_at_its_end(compiler: GrammarCompiler, format: ToolFormat) -> None:
    """So that the output ends there, whatever the model would go on with."""
    now = [Function("now", FUNCTIONS["now"])]
    text = call_grammar(format, now, {}, may_talk=False, is_parallel=False)
    constraint = compiler.submit(GrammarSpec("lark", text)).result().start()
    written = "".join(spelled(drawn(constraint, random.Random(0))))
    assert constraint.is_complete
    assert parse(GuidedParser(format, may_talk=False), written) == ("", [("now", "{}")])


def test_text_that_only_resembles_a_call_is_allowed(compiler: GrammarCompiler) -> None:
    functions = [Function("now", FUNCTIONS["now"])]
    for format, text in ((HERMES, "a <tool_calls> b"), (LLAMA3_JSON, "No {call}"), (MISTRAL, "[TOOL] [CALLS] [1]")):
        grammar = call_grammar(format, functions, {}, may_talk=True, is_parallel=True)
        constraint = compiler.submit(GrammarSpec("lark", grammar)).result().start()
        for byte in text.encode():
            constraint.accept(byte)
