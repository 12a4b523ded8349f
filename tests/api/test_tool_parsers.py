"""Calls in texts: what is a call, what stays text, and that it does not matter how a text is divided."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.server.api.tools.formats import FORMATS, HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_ARGS, ToolFormat
from manylora.server.api.tools.parsers import Arguments, CallStart, FreeParser, GuidedParser, Piece, ToolParser

NAMES = ("get_weather", "now", "web.search-2")
PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'

Read = tuple[str, list[tuple[str, str]]]
"""The content, and the calls' names and arguments."""


def read(pieces: Sequence[Piece]) -> Read:
    calls: list[tuple[str, str]] = []
    ids: set[str] = set()
    content = ""
    for piece in pieces:
        assert piece != "", "an empty piece says nothing"
        if isinstance(piece, str):
            content += piece
        elif isinstance(piece, CallStart):
            assert piece.index == len(calls)
            ids.add(piece.id)
            calls.append((piece.name, ""))
        else:
            assert piece.index == len(calls) - 1
            assert piece.text
            calls[-1] = calls[-1][0], calls[-1][1] + piece.text
    assert len(ids) == len(calls)
    return content, calls


def parse(parser: ToolParser, *texts: str) -> Read:
    return read([*(piece for text in texts for piece in parser.feed(text)), *parser.finish()])


def free(format: ToolFormat, *texts: str, is_parallel: bool = True) -> Read:
    return parse(FreeParser(format, NAMES, is_parallel=is_parallel), *texts)


WEATHER = ("get_weather", PARIS)
NOW = ("now", "{}")

FREE: list[tuple[ToolFormat, str, Read]] = [
    (HERMES, "", ("", [])),
    (HERMES, "Hello <b>world</b>. ", ("Hello <b>world</b>. ", [])),
    (HERMES, CALL, ("", [WEATHER])),
    (HERMES, f"Let me see.\n\n{CALL}\n", ("Let me see.", [WEATHER])),
    (HERMES, f"{CALL}\n{CALL}", ("", [WEATHER, WEATHER])),
    (HERMES, f"One{CALL} two {CALL} three", ("One two three", [WEATHER, WEATHER])),
    (HERMES, CALL.replace("\n", ""), ("", [WEATHER])),
    (HERMES, CALL.removesuffix("</tool_call>"), ("", [WEATHER])),
    (HERMES, CALL.removesuffix("call>"), ("", [WEATHER])),
    (
        HERMES,
        '<tool_call>{"arguments" : {"city": "</tool_call>\\"}{"}, "name":"get_weather", "type": "x"}</tool_call>',
        ("", [("get_weather", '{"city": "</tool_call>\\"}{"}')]),
    ),
    (HERMES, '<tool_call>{"name": "now", "parameters": {}}</tool_call>', ("", [NOW])),
    (LLAMA3_JSON, f'{{"name": "get_weather", "parameters": {PARIS}}}', ("", [WEATHER])),
    (LLAMA3_JSON, f'\n<|python_tag|> {{"name": "get_weather", "parameters": {PARIS}}} \n', ("", [WEATHER])),
    (
        LLAMA3_JSON,
        f'{{"name": "get_weather", "parameters": {PARIS}}}; {{"name": "now", "arguments": {{}}}}',
        ("", [WEATHER, NOW]),
    ),
    (LLAMA3_JSON, "Say {1} or <|python", ("Say {1} or <|python", [])),
    (LLAMA3_JSON, '{"city": "Paris"}\n', ('{"city": "Paris"}\n', [])),
    (LLAMA3_JSON, '{"name": "now", "parameters": {}}; then', ("; then", [NOW])),
    (LLAMA3_JSON, "  \n", ("  \n", [])),
    (MISTRAL, f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}]', ("", [WEATHER])),
    (
        MISTRAL,
        f'Well [TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS}, "id": "abcdefghi"}} , '
        '{"name": "now", "arguments": {}}]',
        ("Well", [WEATHER, NOW]),
    ),
    (MISTRAL, "[TOOL]", ("[TOOL]", [])),
    (MISTRAL_ARGS, f"[TOOL_CALLS]get_weather[ARGS]{PARIS}", ("", [WEATHER])),
    (
        MISTRAL_ARGS,
        f"Hm. [TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{PARIS}[TOOL_CALLS]now[ARGS]{{}}",
        ("Hm.", [WEATHER, NOW]),
    ),
]

TEXTS: list[tuple[ToolFormat, str]] = [
    # None of these is a call, so they are what the model said.
    (HERMES, CALL.replace("get_weather", "get_wether")),
    (HERMES, CALL.replace(PARIS, '"Paris"')),
    (HERMES, CALL.replace('"get_weather"', '{"get_weather": 1}')),
    (HERMES, CALL.replace(PARIS, '{"city": Paris}')),
    (HERMES, CALL.replace(PARIS, '{"city": NaN}')),
    (HERMES, CALL.replace('"name": "get_weather", ', "")),
    (HERMES, CALL.replace('"name"', '"name": "now", "name"')),
    (HERMES, CALL.replace("}}", "}")),
    (HERMES, CALL.replace("}}", "}]")),
    (HERMES, CALL.replace("}\n</", "} so </")),
    (HERMES, CALL.replace("<tool_call>\n", "<tool_call>\ncall: ")),
    (HERMES, "Use <tool_call> and </tool_call>."),
    (HERMES, "<tool_call>\n{}\n</tool_call>"),
    (HERMES, "<tool_call>\n{" + '"x": [' * 5000),
    (HERMES, "a\n<tool_"),
    (LLAMA3_JSON, '{"name": "nothing", "parameters": {}}'),
    (LLAMA3_JSON, '{"name": "now", "parameters": {}'),
    (LLAMA3_JSON, '{"name": "now", "parameters": {}, "arguments": {}}'),
    (MISTRAL, '[TOOL_CALLS] {"name": "now", "arguments": {}}'),
    (MISTRAL, '[TOOL_CALLS] [{"name": "now", "arguments": {}}, 7]'),
    (MISTRAL, '[TOOL_CALLS] [{"name": "now", "arguments": {}} {"name": "now", "arguments": {}}]'),
    (MISTRAL, "[TOOL_CALLS] []"),
    (MISTRAL_ARGS, "[TOOL_CALLS]nothing[ARGS]{}"),
    (MISTRAL_ARGS, "[TOOL_CALLS]now {}"),
    (MISTRAL_ARGS, "[TOOL_CALLS]now[ARGS][1]"),
    (MISTRAL_ARGS, "[TOOL_CALLS]" + "now" * 100),
]


@pytest.mark.parametrize(("format", "text", "expected"), FREE)
def test_calls_that_are_written_freely(format: ToolFormat, text: str, expected: Read) -> None:
    assert free(format, text) == expected
    assert free(format, *text) == expected


@pytest.mark.parametrize(("format", "text"), TEXTS)
def test_what_is_no_call_stays_text(format: ToolFormat, text: str) -> None:
    assert free(format, text) == (text, [])
    assert free(format, *text) == (text, [])


def test_a_call_after_a_malformed_one() -> None:
    bad = CALL.replace("get_weather", "nothing")
    assert free(HERMES, f"{bad}\n{CALL}") == (bad, [WEATHER])
    assert free(HERMES, "<tool_call>\n" + CALL) == ("<tool_call>", [WEATHER])


def test_without_parallel_calls_the_first_is_taken() -> None:
    other = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert free(HERMES, CALL + other + "!", is_parallel=False) == ("!", [WEATHER])
    many = f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}, {{"name": "now", "arguments": {{}}}}]'
    assert free(MISTRAL, many, is_parallel=False) == ("", [WEATHER])


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_ids_have_the_length_that_templates_take(format: ToolFormat) -> None:
    texts = {
        "hermes": CALL,
        "llama3_json": '{"name": "now", "parameters": {}}',
        "mistral": '[TOOL_CALLS] [{"name": "now", "arguments": {}}]',
        "mistral_args": "[TOOL_CALLS]now[ARGS]{}",
    }
    [start] = [p for p in FreeParser(format, NAMES).feed(texts[format.name] + " ") if isinstance(p, CallStart)]
    if "mistral" in format.name:
        assert len(start.id) == 9
        assert start.id.isalnum()
    else:
        assert start.id.startswith("call_")


def test_text_is_told_as_soon_as_it_can_be_no_call() -> None:
    parser = FreeParser(HERMES, NAMES)
    seen = [parser.feed(text) for text in ("Hi", " ", "a<", "tool", "s> <tool_c", "all", ">\n{")]
    assert seen == [["Hi"], [], [" a"], [], ["<tools>"], [], []]
    assert parse(parser, "") == (" <tool_call>\n{", [])


def test_a_free_call_is_told_when_it_is_whole() -> None:
    parser = FreeParser(HERMES, NAMES)
    assert not any(parser.feed(character) for character in CALL[:-1])
    [start, arguments] = parser.feed(CALL[-1])
    assert isinstance(start, CallStart)
    assert arguments == Arguments(0, PARIS)


_MARKS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<tool", "\n", " ", "; ", ", "]
_JSON = ["{", "}", "[", "]", "\\", ":", '"', '"name": ', '"now"', '"arguments": ', '"parameters": ', "{}", "now", "a"]
_CALLS = ['{"name": "now", "arguments": {}}', '{"name": "now", "parameters": {"x": "}"}}', CALL]
_ALPHABET = st.sampled_from([*_MARKS, *_JSON, *_CALLS])


@settings(max_examples=300, deadline=None)
@given(
    format=st.sampled_from(list(FORMATS.values())),
    parts=st.lists(_ALPHABET, max_size=24),
    cuts=st.lists(st.integers(0, 300), max_size=12),
)
def test_division_makes_no_difference_and_nothing_is_lost(
    format: ToolFormat, parts: list[str], cuts: list[int]
) -> None:
    text = "".join(parts)
    at = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    divided = [text[i:j] for i, j in pairwise(at)]
    content, calls = free(format, text)
    assert free(format, *divided) == (content, calls)
    if not calls:
        assert content == text
    for name, arguments in calls:
        assert name in NAMES
        assert isinstance(json.loads(arguments), dict)
        assert arguments in text


GUIDED: list[tuple[ToolFormat, str, Read]] = [
    (HERMES, f"{CALL}\n{CALL}", ("", [WEATHER, WEATHER])),
    (
        LLAMA3_JSON,
        f'{{"name": "get_weather", "parameters": {PARIS}}}; {{"name": "now", "parameters": {{}}}}',
        ("", [WEATHER, NOW]),
    ),
    (
        MISTRAL,
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}, {{"name": "now", "arguments": {{}}}}]',
        ("", [WEATHER, NOW]),
    ),
    (MISTRAL_ARGS, f"[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]now[ARGS]{{}}", ("", [WEATHER, NOW])),
]


@pytest.mark.parametrize(("format", "text", "expected"), GUIDED)
def test_guided_calls(format: ToolFormat, text: str, expected: Read) -> None:
    for may_talk in (False, True):
        assert parse(GuidedParser(format, may_talk=may_talk), text) == expected
        assert parse(GuidedParser(format, may_talk=may_talk), *text) == expected


def test_guided_arguments_are_passed_on_as_they_come() -> None:
    parser = GuidedParser(HERMES, may_talk=False)
    at = CALL.index(PARIS)
    [start] = parser.feed(CALL[: at + 1])[:1]
    assert isinstance(start, CallStart)
    assert [parser.feed(text) for text in ('"city": ', '"Pa\\', '"ris', '"}', "}\n")] == [
        [Arguments(0, '"city": ')],
        [Arguments(0, '"Pa')],  # what a backslash escapes is part of it
        [Arguments(0, '\\"ris')],
        [Arguments(0, '"}')],
        [],
    ]
    assert parser.finish() == []
    assert not parser.is_cut


@pytest.mark.parametrize("end", range(len(CALL)))
def test_a_guided_call_that_is_cut_off(end: int) -> None:
    parser = GuidedParser(HERMES, may_talk=False)
    content, calls = parse(parser, *CALL[:end])
    at = CALL.index(PARIS)
    assert content == ""
    assert calls == ([] if end <= at else [("get_weather", PARIS[: end - at])])
    assert parser.is_cut == (at < end < at + len(PARIS))


def test_guided_text_around_calls() -> None:
    text = f"Let me see. {CALL} and <tool"
    assert parse(GuidedParser(HERMES, may_talk=True), *text) == ("Let me see. and <tool", [WEATHER])
    assert parse(GuidedParser(LLAMA3_JSON, may_talk=True), *"No {call}.") == ("No {call}.", [])


@pytest.mark.parametrize(
    ("format", "unit"),
    [
        (HERMES, "<tool_call>{"),
        (HERMES, '<tool_call>{"name": "now", "arguments": {"x": "'),
        (HERMES, "<tool_call>\n"),
        (HERMES, '{"a": "\\"" '),
        (MISTRAL, "[TOOL_CALLS] ["),
        (MISTRAL_ARGS, "[TOOL_CALLS]now[ARGS]{"),
        (LLAMA3_JSON, '{"x": '),
    ],
)
def test_hostile_outputs_take_time_in_proportion(format: ToolFormat, unit: str) -> None:
    text = unit * (200_000 // len(unit))

    def seconds(whole: str) -> float:
        parser: Any = FreeParser(format, NAMES)
        start = time.process_time()
        for at in range(0, len(whole), 400):
            parser.feed(whole[at : at + 400])
        parser.finish()
        return time.process_time() - start

    assert seconds(text) < 2  # quadratic: minutes
