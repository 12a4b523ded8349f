"""Specifications that would end the server, or hold it up, end a process of their own instead."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from manylora.server.engine.grammar import checker as grammar_checker
from manylora.server.engine.grammar.checker import GrammarChecker
from manylora.server.engine.grammar.grammars import GrammarCompiler
from manylora.server.engine.grammar.sources import GrammarSpec, InvalidGrammar, source_of
from tests.engine.grammar_cases import BYTES, matches, trie

GOOD = GrammarSpec("json_schema", '{"type": "integer"}')


def chain(length: int) -> GrammarSpec:
    """References nested so deeply that following them overflows a stack of 8 MiB."""
    links = {
        f"a{i}": {"type": "object", "properties": {p: {"$ref": f"#/$defs/a{i + 1}"} for p in "pq"}}
        for i in range(length)
    }
    schema = {"$ref": "#/$defs/a0", "$defs": links | {f"a{length}": {"type": "string"}}}
    return GrammarSpec("json_schema", json.dumps(schema, separators=(",", ":")))


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    made = GrammarChecker(BYTES, seconds=1)
    yield made
    made.close()


def workers(checker: GrammarChecker) -> list[int]:
    return [worker.pid for worker in checker._workers]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_is_right_passes_and_what_is_wrong_is_said(checker: GrammarChecker) -> None:
    assert checker.check(GOOD) == source_of(GOOD)
    with pytest.raises(InvalidGrammar, match="uniqueItems"):
        checker.check(GrammarSpec("json_schema", '{"type": "array", "uniqueItems": true}'))
    # Special tokens are known by their names and numbers.
    assert checker.check(GrammarSpec("lark", 'start: <call> <[256]> "é"'))
    with pytest.raises(InvalidGrammar, match="unknown special token"):
        checker.check(GrammarSpec("lark", "start: <cal>"))
    assert len(workers(checker)) == 1, "one after the other needs one process"


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(chain(900), id="stack"),
        pytest.param(GrammarSpec("json_schema", '{"type": "integer", "multipleOf": 1000007}'), id="automaton"),
        pytest.param(
            GrammarSpec("lark", "start: A\nA: " + " & ".join(f"/.*a{{{i}}}b.*/" for i in range(1, 900))), id="time"
        ),
    ],
)  # fmt: skip
def test_what_takes_too_much_is_refused_in_time(checker: GrammarChecker, spec: GrammarSpec) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidGrammar, match=r"too long or too much memory|too big|too large|fuel"):
        checker.check(spec)
    assert time.monotonic() - began < 20
    assert checker.check(GOOD) == source_of(GOOD), "the next one gets another process"


def test_a_chain_that_passes_does_not_hurt_the_server(checker: GrammarChecker) -> None:
    """The process has half of the stack that the server's threads have, so what passes there is safe here."""
    passed = 0
    compiler = GrammarCompiler(trie(), checker)
    for length in (100, 200, 300, 400, 500, 600, 700):
        try:
            compiler.compile(chain(length))
        except InvalidGrammar:
            break
        passed = length
    assert passed >= 100


def test_a_process_that_died_meanwhile_is_replaced(checker: GrammarChecker) -> None:
    checker.check(GOOD)
    (pid,) = workers(checker)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while is_running(pid) and checker._idle[0].is_alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert checker.check(GOOD) == source_of(GOOD)
    assert workers(checker) != [pid]


def test_a_process_that_does_not_answer_is_not_waited_for(checker: GrammarChecker) -> None:
    """One that sleeps uses up no processor time, so that the limit of that does not end it."""
    checker.check(GOOD)
    (pid,) = workers(checker)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(InvalidGrammar, match="too long"):
        checker.check(GrammarSpec("regex", "stopped"))
    assert 0.9 < time.monotonic() - began < 20
    assert not is_running(pid)


def test_several_at_once_and_an_end() -> None:
    checker = GrammarChecker(BYTES, seconds=1)
    compiler = GrammarCompiler(trie(), checker)
    futures = [compiler.submit(GrammarSpec("regex", "a" * n)) for n in range(1, 7)]
    assert [matches(future.result(30), "a" * n) for n, future in enumerate(futures, 1)] == [True] * 6
    pids = workers(checker)
    assert 1 <= len(pids) <= 2
    compiler.close()
    assert not any(map(is_running, pids))
    assert workers(checker) == []
    with pytest.raises(RuntimeError, match="shutting down"):
        checker.check(GOOD)


def test_an_end_does_not_wait_for_a_hostile_one() -> None:
    checker = GrammarChecker(BYTES, seconds=60)
    checker.check(GOOD)
    errors: list[BaseException] = []

    def check() -> None:
        try:
            checker.check(GrammarSpec("json_schema", '{"type": "integer", "multipleOf": 10000019}'))
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=check)
    thread.start()
    time.sleep(0.3)
    checker.close()
    thread.join(10)
    assert [str(error) for error in errors] == ["grammars are compiled no more: the server is shutting down"]


def test_a_process_that_does_not_start_is_no_fault_of_the_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_checker.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        GrammarChecker(BYTES).check(GOOD)
