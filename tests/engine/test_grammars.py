"""What grammars allow, what they are refused for, and what they may cost."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from manylora.server.engine.constraint import ConstraintFailed
from manylora.server.engine.detokenizer import vocabulary_for
from manylora.server.engine.grammar import grammars
from manylora.server.engine.grammar.grammars import MAX_SOURCE, GrammarCompiler, grammars_for
from manylora.server.engine.grammar.sources import GrammarSpec, InvalidGrammar, compile_source, inline_schema
from manylora.server.engine.grammar.vocabulary import GrammarVocabulary
from manylora.server.model.tokenizer import Tokenizer as ModelTokenizer
from tests.checkpoints import save_tokenizer
from tests.engine.grammar_cases import BYTES, CALL, END, EOS, VOCAB, WORD, after, allowed, compiled, matches, trie

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NODE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "boolean"}, "next": {"$ref": "#/$defs/node"}},
            "required": ["v"],
            "additionalProperties": False,
        }
    },
}
GBNF = 'root ::= "a" list | "b"\nlist ::= "(" [0-9]+ ("," [0-9]+)* ")"\n'


def text_of(schema: Any) -> str:
    return json.dumps(schema)


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        ("regex", r"[ab]+\d{2}", ["a12", "abba00"], ["a1", "12", "a123", "", "A12"]),
        ("regex", r"^\w+$", ["word"], ["^word", "two words"]),
        ("regex", r"a|ab", ["a", "ab"], ["b", "aba"]),
        ("regex", r"(?s:.)é\n", ["xé\n", "\né\n", "日é\n"], ["é", "xe\n"]),
        ("choice", '["yes", "yes.", "a|b", "x\\ny", "\\"q\\" \\\\ é", "日本"]',
         ["yes", "yes.", "a|b", "x\ny", '"q" \\ é', "日本"], ["ye", "a", "b", "yes..", "日"]),
        ("json_object", "", ["{}", '{"a": [1, {"b": null}], "c": "\\n\\" é"}'],
         ["[]", "1", '{"a"}', '{"a": 01}', "{} "]),
        ("json_schema", text_of(PERSON), ['{"name": "x", "age": 1}', '{"name":"","age":-20}',
                                          '{\n    "name": "x",\n    "age": 1\n}'],
         ['{"age": 1, "name": "x"}', '{"name": "x"}', '{"name": "x", "age": 1.5}', '{"name": "x", "age": 1, "z": 2}']),
        ("json_schema", text_of(NODE), ['{"v": true}', '{"v": false, "next": {"v": true}}'], ['{"next": {"v": true}}']),
        ("json_schema", text_of({"enum": ["a", 1, None, {"b": [True]}]}), ['"a"', "1", "null", '{"b":[true]}'],
         ["a", "2"]),
        ("json_schema", text_of({"type": "array", "items": {"type": "integer", "minimum": 5, "maximum": 25},
                                 "minItems": 1, "maxItems": 2}),
         ["[5]", "[25, 7]"], ["[]", "[4]", "[26]", "[5, 5, 5]"]),
        ("json_schema", text_of({"type": "string", "pattern": "^[a-c]{2}$"}), ['"ab"'], ['"abc"', '"xy"', "ab"]),
        ("json_schema", text_of({"type": "string", "format": "date"}), ['"2024-02-29"'], ['"2024-13-01"', '"x"']),
        ("lark", 'start: "a" b "c"\nb: /[0-9]/ b | "-"', ["a-c", "a12-c"], ["ac", "a1c"]),
        ("ebnf", 'start: "x"+', ["x", "xxx"], ["", "y"]),
        ("ebnf", GBNF, ["b", "a(1)", "a(12,3)"], ["a", "a()", "a(1,)"]),
    ],
)  # fmt: skip
def test_what_matches_and_what_does_not(kind: str, text: str, good: list[str], bad: list[str]) -> None:
    grammar = compiled(kind, text)
    assert [one for one in good if not matches(grammar, one)] == []
    assert [one for one in bad if matches(grammar, one)] == []


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        # What a schema asks and llguidance cannot keep is refused with its name, never left out.
        *(
            ("json_schema", text_of(schema), reason)
            for schema, reason in [
                ({"type": "array", "uniqueItems": True}, "uniqueItems"),
                ({"not": {"type": "string"}}, "not"),
                ({"if": {"type": "string"}, "then": {"minLength": 2}}, "if"),
                ({"type": "array", "contains": {"type": "string"}}, "contains"),
                ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
                ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
                ({"propertyNames": {"pattern": "^a"}}, "propertyNames"),
                ({"properties": {"a": {"items": {"type": "array", "uniqueItems": True}}}}, "uniqueItems"),
                ({"type": "string", "format": "colour"}, "colour"),
                ({"oneOf": [{"type": "string"}, {"enum": ["a"]}]}, "oneOf"),
                ({"$ref": "https://example.com/schema"}, "example.com"),
                ({"$ref": "#/$defs/missing"}, "missing"),
                ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
                ({"type": "strin"}, "strin"),
                ({"$ref": "#"}, "no output can match"),
                ({"type": "string", "x-guidance": {"lenient": True}}, "x-guidance"),
                ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
            ]
        ),
        ("json_schema", '{"type": ', "not valid JSON"),
        ("json_schema", '{"minimum": NaN}', "NaN"),
        ("json_schema", "[]", "must be a JSON object"),
        ("json_schema", '{"items":' * 200 + "{}" + "}" * 200, "recursion limit"),
        ("regex", "(", "unclosed group"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", r"\bword\b", "lookarounds"),
        ("regex", "(" * 2000 + ")" * 2000, "nest"),
        ("choice", "[]", "one or more strings"),
        ("choice", '["a", ""]', "must not be empty"),
        ("lark", "start: a", "unknown name"),
        ("lark", "start: (" + "(" * 3000, "nested"),
        ("lark", 'start: <nothing> "a"', "unknown special token"),
        ("lark", 'start: x\nx[temperature=0.5]: "a"', "temperature"),
        ("lark", 'start: x "b"\nx[lazy, stop="b"]: /a+/', "stop"),
        ("lark", "", "mpty"),
        ("ebnf", "nonsense", "neither Lark .* nor GBNF"),
        ("ebnf", "root ::= missing", "missing"),
        ("ebnf", "".join(f"r{i} ::= r{i + 1}\n" for i in range(600)), "500 rules"),
        ("regex", "a" * (MAX_SOURCE + 1), "characters; at most"),
    ],
)
def test_what_is_refused_is_named(kind: str, text: str, reason: str) -> None:
    with pytest.raises(InvalidGrammar, match=reason):
        compiled(kind, text)


def test_json_cannot_be_stretched_by_whitespace() -> None:
    """One space, or one line break and its indentation: a model that repeats itself must come to the next token."""
    grammar = compiled("json_schema", text_of(PERSON))
    for text in ['{"name":  "x", "age": 1}', '{\n\n"name": "x", "age": 1}', ' {"name": "x", "age": 1}',
                 '{"name": "x", "age": 1}\n', '{\n' + " " * 65 + '"name": "x", "age": 1}']:  # fmt: skip
        assert not matches(grammar, text)
    assert matches(grammar, "{\n" + " " * 64 + '"name" : "x"\n,\n"age": 1 }')
    # The same in a schema within Lark.
    call = compiled("lark", f'start: "<" %json {inline_schema(PERSON)} ">"')
    assert matches(call, '<{"name": "x",\n  "age": 1}>')
    assert not matches(call, '<{"name":  "x", "age": 1}>')
    with pytest.raises(InvalidGrammar, match="x-guidance"):
        inline_schema({"x-guidance": {}})


def test_an_output_that_always_takes_whitespace_where_it_can_ends() -> None:
    nested = {"type": "array", "items": {"type": "array", "items": {"const": 1}, "minItems": 2}, "minItems": 2}
    numbers = {"type": "object", "properties": {"a": nested, "b": nested}, "required": ["a", "b"]}
    for kind, text in [("json_object", ""), ("json_schema", text_of(numbers))]:
        state = compiled(kind, text).start()
        for _ in range(1000):
            if state.is_complete:
                break
            tokens = allowed(state)
            # Whitespace wherever there may be any, else whatever closes what is open.
            state.accept(next((t for t in b' \n}]":,1nae' if t in tokens), min(tokens)))
        assert state.is_complete, kind


def test_the_end_is_allowed_where_the_output_may_end_and_nowhere_else() -> None:
    state = compiled("regex", "a{2,3}").start()
    assert allowed(state) == {ord("a")}
    state.accept(ord("a"))
    assert allowed(state) == {ord("a")}
    state.accept(ord("a"))
    assert allowed(state) == {ord("a"), EOS, END}
    assert not state.is_complete
    state.accept(ord("a"))
    assert state.is_complete, "nothing may follow, so no end-of-sequence is waited for"
    ended = after(compiled("regex", "a{2,3}"), [97, 97, END])
    assert ended is not None
    assert ended.is_complete


def test_special_tokens_and_padding_are_not_text() -> None:
    anything = allowed(compiled("regex", r"(?s:.)*").start())
    assert anything >= {EOS, END, WORD, ord("<")}
    assert CALL not in anything
    assert max(anything) == WORD
    # A string that spells one is spelled out, though the model's tokeniser would recognise it.
    vocabulary = GrammarVocabulary(
        BYTES.tokens, BYTES.special, BYTES.eos, lambda text: [CALL] if "call" in text else []
    )
    grammar = GrammarCompiler(vocabulary.trie()).compile(GrammarSpec("json_schema", '{"const": "<call>"}'))
    assert matches(grammar, '"<call>"')
    # By name, in Lark, it is reached.
    state = compiled("lark", 'start: <call> "x"').start()
    assert allowed(state) == {CALL}
    state.accept(CALL)
    assert allowed(state) == {ord("x")}


@pytest.mark.parametrize("wrong", [[], [VOCAB + 5], [ord(" "), ord("a"), ord("b")], [ord("a")]])
def test_a_tokeniser_that_writes_another_text_is_not_followed(wrong: list[int]) -> None:
    """SentencePiece puts a space before; what is forced must be the grammar's text."""
    vocabulary = GrammarVocabulary(BYTES.tokens, BYTES.special, BYTES.eos, lambda _text: wrong)
    end = after(GrammarCompiler(vocabulary.trie()).compile(GrammarSpec("regex", "abtrue")), [*b"ab", WORD])
    assert end is not None
    assert end.is_complete


def test_forced_text_is_written_as_the_model_would() -> None:
    vocabulary = GrammarVocabulary(
        BYTES.tokens, BYTES.special, BYTES.eos, lambda text: [WORD] if text == "true" else list(text.encode())
    )
    state = GrammarCompiler(vocabulary.trie()).compile(GrammarSpec("regex", "true")).start()
    assert allowed(state) == {WORD}


def test_what_is_not_allowed_is_not_accepted() -> None:
    state = compiled("regex", "ab").start()
    with pytest.raises(ConstraintFailed):
        state.accept(ord("b"))
    with pytest.raises(ConstraintFailed):
        allowed(state)
    assert not state.is_complete


def test_outputs_of_one_grammar_are_apart() -> None:
    grammar = compiled("regex", "a+b")
    first, second = grammar.start(), grammar.start()
    first.accept(ord("a"))
    assert allowed(first) == {ord("a"), ord("b")}
    assert allowed(second) == {ord("a")}
    second.accept(ord("a"))
    second.accept(ord("b"))
    assert second.is_complete
    assert not first.is_complete


def test_masks_can_be_asked_for_again() -> None:
    """A row that was preempted after its mask was computed asks again."""
    state = compiled("json_object").start()
    for token in b'{"a":':
        assert allowed(state) == allowed(state)
        state.accept(token)


def test_a_vocabulary_as_transformers_gives_it(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    table = ModelTokenizer.from_directory(tmp_path)
    made = grammars_for(table, 320, vocabulary_for(table.hf))
    assert made is not None
    try:
        grammar = made.compile(GrammarSpec("json_schema", '{"const": "é a"}'))
        state, drawn = grammar.start(), list[int]()
        while not state.is_complete:
            drawn.append(min(allowed(state, 320)))
            state.accept(drawn[-1])
        assert table.decode(drawn) == '"é a"'
        assert table.encode(" a") == [256]
        assert 256 in drawn, "the text is not in the model's own tokens"
    finally:
        made.close()


def test_tokenisers_that_cannot_be_served(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    table = ModelTokenizer.from_directory(tmp_path)
    assert grammars_for(table, 258, vocabulary_for(table.hf)) is None, "its end-of-sequence has no row"
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    other = type("Other", (), {"backend_tokenizer": pieces, "decode": None})()
    assert grammars_for(table, 320, vocabulary_for(other)) is None, "tokens are not the bytes of their text"


# --- compiling --------------------------------------------------------------------------------------------------------


class Counting:
    """``grammar_sources.compile_source`` that counts, and waits if it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sources: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()
        monkeypatch.setattr(grammars, "compile_source", self)

    def __call__(self, trie: Any, source: str) -> Any:
        self.sources.append(source)
        assert self.go_on.wait(30)
        return compile_source(trie, source)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


def regex(text: str) -> GrammarSpec:
    return GrammarSpec("regex", text)


def test_the_same_grammar_is_compiled_once(counting: Counting) -> None:
    compiler = GrammarCompiler(trie())
    counting.go_on.clear()
    futures = [compiler.submit(regex("a")) for _ in range(5)]
    assert not any(future.done() for future in futures)
    counting.go_on.set()
    assert len({id(future.result(30)) for future in futures}) == 1
    assert compiler.compile(regex("a")) is futures[0].result()
    assert len(counting.sources) == 1
    compiler.close()


def test_a_refusal_is_kept_too(counting: Counting) -> None:
    compiler = GrammarCompiler(trie())
    errors = []
    for _ in range(3):
        with pytest.raises(InvalidGrammar) as caught:
            compiler.compile(regex("("))
        errors.append(caught.value)
    assert len(counting.sources) == 1
    assert len({id(error) for error in errors}) == 3, "an exception that is raised again grows"
    compiler.close()


def test_the_least_recently_used_are_dropped(counting: Counting) -> None:
    compiler = GrammarCompiler(trie(), max_kept=2)
    for text in "abacab":  # b was used longest ago when c came
        compiler.compile(regex(text))
    assert [json.loads(source)["grammars"][0]["lark_grammar"].split("/")[1] for source in counting.sources] == list(
        "abcb"
    )
    compiler.close()


def test_what_took_long_to_compile_takes_the_place_of_more(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(t) for t in [0, 3, 3, 6, 6, 7])
    monkeypatch.setattr(grammars.time, "monotonic", lambda: next(clock))
    compiler = GrammarCompiler(trie(), max_kept_seconds=5.0)
    for text in "abb":  # 3 s and 3 s are more than 5 s: a is dropped for b
        compiler.compile(regex(text))
    assert len(counting.sources) == 2
    compiler.compile(regex("a"))
    assert len(counting.sources) == 3
    compiler.close()


def test_an_error_of_the_server_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(trie())

    def broken(_trie: Any, _source: str) -> Any:
        raise OSError("out of processes")

    with monkeypatch.context() as patch:
        patch.setattr(grammars, "compile_source", broken)
        with pytest.raises(OSError, match="out of processes"):
            compiler.compile(regex("a"))
    assert compiler.compile(regex("a")).start()
    compiler.close()


def test_after_the_end_nothing_is_compiled(counting: Counting) -> None:
    compiler = GrammarCompiler(trie())
    counting.go_on.clear()
    waiting = [compiler.submit(regex("a" * n)) for n in range(1, 6)]
    while len(counting.sources) < grammars.THREADS:
        time.sleep(0.001)
    threading.Timer(0.05, counting.go_on.set).start()
    compiler.close()
    assert [future.cancelled() for future in waiting] == [False] * 2 + [True] * 3
    with pytest.raises(RuntimeError):
        compiler.submit(regex("b"))


def test_many_threads_compile_and_follow(counting: Counting) -> None:
    compiler = GrammarCompiler(trie(), max_kept=4)
    failures: list[BaseException] = []

    def use(seed: int) -> None:
        try:
            rng = np.random.default_rng(seed)
            for _ in range(30):
                n = int(rng.integers(1, 8))
                assert matches(compiler.compile(regex(f"x{{{n}}}y")), "x" * n + "y")
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failures.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    compiler.close()


# --- what following one may cost --------------------------------------------------------------------------------------


def test_masks_that_take_too_long_end_their_output_and_then_their_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(trie())
    spec = GrammarSpec("regex", "(((a{50}){50}){50})")
    state = compiler.compile(spec).start()
    state.accept(97)
    allowed(state)
    ticks = iter([0.0, 0.3, 1.0, 1.3])
    monkeypatch.setattr(grammars.time, "thread_time", lambda: next(ticks))
    state.accept(97)
    allowed(state)
    state.accept(97)
    with pytest.raises(ConstraintFailed, match="too long"):
        allowed(state)
    with pytest.raises(InvalidGrammar, match="too long"):
        compiler.compile(spec)
    compiler.close()


def test_a_limit_that_is_hit_half_way_is_said() -> None:
    state = compiled("lark", "start: x x x x\nx: " + "|".join(f"a{i}" for i in range(900)) + "\n"
                     + "".join(f'a{i}: "a" a{i} | "b"\n' for i in range(900))).start()  # fmt: skip

    def follow() -> None:
        for _ in range(50):
            allowed(state)
            state.accept(ord("a"))

    with pytest.raises(ConstraintFailed, match="cannot go on: the grammar cannot be followed"):
        follow()
