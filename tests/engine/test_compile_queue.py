"""Whose grammars are compiled, in which order, and what is kept of those that are refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from manylora.server.engine.constraint import Grammar
from manylora.server.engine.errors import GrammarQueueFull
from manylora.server.engine.grammar import grammars
from manylora.server.engine.grammar.grammars import MAX_REASON, MAX_REFUSED, MAX_SOURCE, GrammarCompiler
from manylora.server.engine.grammar.sources import GrammarSpec, InvalidGrammar, source_of
from tests.engine.grammar_cases import trie


class Gate:
    """A checker that lets a specification through when the test says so; it refuses those that begin with "no"."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._changed = threading.Condition()
        self._allowed: set[str] = set()
        self.is_open = False

    def check(self, spec: GrammarSpec) -> str:
        with self._changed:
            self.begun.append(spec.text)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self.is_open or spec.text in self._allowed, 30)
        if spec.text.startswith("no"):
            raise InvalidGrammar(f"{spec.text} is refused", is_costly=True)
        return source_of(spec)

    def pass_on(self, *texts: str) -> None:
        with self._changed:
            self._allowed.update(texts)
            self._changed.notify_all()

    def open(self) -> None:
        self.is_open = True
        self.pass_on()

    def wait_begun(self, count: int) -> list[str]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.begun) >= count, 30), self.begun
            return list(self.begun)

    def close(self) -> None:
        self.open()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def compiler(gate: Gate) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(trie(), gate, max_waiting=3)
    yield made
    made.close()


Submit = Callable[..., Future[Grammar]]


@pytest.fixture
def submit(compiler: GrammarCompiler) -> Submit:
    return lambda text, tenant="a": compiler.submit(GrammarSpec("regex", text), tenant)


def test_one_of_a_tenant_at_a_time_and_tenants_in_turn(gate: Gate, submit: Submit) -> None:
    mine = [submit(f"a{n}") for n in range(4)]
    gate.wait_begun(1)
    others = [submit("d0", "d")]
    assert gate.wait_begun(2) == ["a0", "d0"], "the thread that a leaves free is another's"
    others += [submit(f"{tenant}{n}", tenant) for tenant in "bc" for n in range(2)]  # while both threads are taken
    gate.pass_on("d0")
    assert gate.wait_begun(3)[2] == "b0"
    gate.pass_on("b0")
    assert gate.wait_begun(4)[3] == "c0"
    gate.pass_on("a0", "c0")
    gate.wait_begun(6)
    gate.open()
    for future in (*mine, *others):
        future.result(30)
    order = gate.begun
    assert sorted(order) == sorted(set(order))
    assert max(order.index("b1"), order.index("c1")) < order.index("a3"), "nobody waits for all of a's"


def test_without_tenants_all_threads_are_for_everybody(gate: Gate, submit: Submit) -> None:
    for n in range(3):
        submit(f"x{n}", "")
    assert len(gate.wait_begun(2)) == grammars.THREADS


def test_one_too_many_is_refused_and_costs_the_others_nothing(gate: Gate, submit: Submit) -> None:
    futures = [submit(f"a{n}") for n in range(4)]
    with pytest.raises(GrammarQueueFull, match=r"^The compilation queue of a is full: 3 grammars wait, 3 may.") as full:
        submit("a4")
    assert full.value.retry_after >= 1
    futures += [submit("a0"), submit("a3")]  # those it waits for already
    futures += [submit("b0", "b"), submit("a3", "b")]
    gate.open()
    for future in futures:
        future.result(30)
    submit("a4").result(30)
    assert sorted(gate.begun) == ["a0", "a1", "a2", "a3", "a4", "b0"]


def test_for_without_tenants_there_is_an_end_too(gate: Gate, submit: Submit) -> None:
    for n in range(grammars.THREADS + 3):
        submit(f"x{n}", "")
    with pytest.raises(GrammarQueueFull, match=r"^The compilation queue is full"):
        submit("x", "")


def test_what_another_waits_for_too_begins_in_the_first_turn(gate: Gate, submit: Submit) -> None:
    for n in range(3):
        submit(f"a{n}")
    gate.wait_begun(1)
    submit("a2", "b")  # b need not wait for all that a has sent
    assert gate.wait_begun(2) == ["a0", "a2"]


def test_what_nobody_waits_for_is_not_begun(gate: Gate, submit: Submit, compiler: GrammarCompiler) -> None:
    running = submit("a0")
    gate.wait_begun(1)
    left, shared, mine = submit("a1"), submit("a2"), submit("a2")
    assert left.cancel()
    assert shared.cancel()
    submit("a3"), submit("a4")  # the place of the one that was dropped is free again
    assert running.cancel(), "who waits for one that is being made may leave too"
    gate.open()
    mine.result(30)
    submit("last").result(30)
    assert gate.begun == ["a0", "a2", "a3", "a4", "last"]
    assert submit("a0").result(30), "it was finished and kept"
    assert gate.begun.count("a0") == 1
    assert compiler._jobs == {}


def test_who_leaves_one_that_others_wait_for_has_its_place_again(gate: Gate, submit: Submit) -> None:
    submit("a0")
    submit("b0", "b")
    gate.wait_begun(2)
    mine = [submit(f"a{n}") for n in (1, 2, 3)]
    shared = submit("a1", "b")
    assert mine[0].cancel()
    submit("a4")
    gate.open()
    shared.result(30)


def test_one_that_left_and_comes_again(gate: Gate, submit: Submit) -> None:
    submit("a0")
    gate.wait_begun(1)
    for _ in range(50):
        assert submit("a1").cancel()
    again = submit("a1")
    gate.open()
    again.result(30)
    assert gate.begun == ["a0", "a1"]


def test_many_threads_submit_and_leave(submit: Submit, gate: Gate, compiler: GrammarCompiler) -> None:
    gate.open()
    failures: list[BaseException] = []

    def use(tenant: str) -> None:
        try:
            for n in range(60):
                future = submit(f"x{{{n % 7}}}{n // 20}", tenant)
                if n % 3 == 0:
                    future.cancel()
                else:
                    future.result(30)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failures.append(error)

    threads = [threading.Thread(target=use, args=(tenant,)) for tenant in ("a", "b", "c", "d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    submit("last").result(30)
    until = time.monotonic() + 30
    while (compiler._jobs or compiler._n_working) and time.monotonic() < until:
        time.sleep(0.001)
    assert compiler._jobs == {}
    assert (compiler._queue._queues, compiler._queue._running, compiler._n_working) == ({}, {}, 0)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_of_one_that_is_too_long_nothing_is_kept(compiler: GrammarCompiler, gate: Gate) -> None:
    for tenant in "abcdefgh":
        future = compiler.submit(GrammarSpec("regex", "a" * (MAX_SOURCE + 1)), tenant)
        with pytest.raises(InvalidGrammar, match="characters; at most"):
            future.result(0)
    assert gate.begun == []
    assert (compiler._jobs, compiler._kept, compiler._refused) == ({}, {}, {})


def test_refusals_are_kept_without_their_source_and_take_no_place_of_a_grammar(
    compiler: GrammarCompiler, gate: Gate, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.open()
    good = submit("good").result(30)
    monkeypatch.setattr(grammars, "COSTLY_FOR_S", float("inf"))
    now = iter(range(0, 10**6, 100))
    monkeypatch.setattr(grammars.time, "monotonic", lambda: float(next(now)))  # each compilation takes 100 s
    long = "no" + "x" * 50_000 + " " + "y z " * 3000
    for text in (long, *(f"no{n}" for n in range(MAX_REFUSED + 10))):
        for _ in range(2):
            with pytest.raises(InvalidGrammar, match="is refused") as refused:
                submit(text).result(30)
            assert refused.value.is_costly
            assert len(str(refused.value)) < MAX_REASON + 10
    monkeypatch.undo()
    assert submit("good").result(0) is good
    assert len(gate.begun) == len(set(gate.begun)) == MAX_REFUSED + 12
    assert len(compiler._refused) == MAX_REFUSED
    with pytest.raises(InvalidGrammar):
        submit(long).result(30)
    assert gate.begun[-1] == long, "the one of longest ago made room"
    assert not any(isinstance(key, GrammarSpec) or len(key) > 32 for key in compiler._refused)


@pytest.mark.parametrize(("seconds", "times"), [(0.0, 2), (60.0, 1)])
def test_what_took_too_long_is_tried_again_later(
    gate: Gate, submit: Submit, monkeypatch: pytest.MonkeyPatch, seconds: float, times: int
) -> None:
    """The machine may have been busy."""
    gate.open()
    monkeypatch.setattr(grammars, "COSTLY_FOR_S", seconds)
    for _ in range(2):
        with pytest.raises(InvalidGrammar):
            submit("no").result(30)
    assert gate.begun == ["no"] * times


def test_a_refusal_is_of_its_kind(compiler: GrammarCompiler, gate: Gate) -> None:
    gate.open()
    refused: Any = compiler.submit(GrammarSpec("regex", "no"))
    with pytest.raises(InvalidGrammar):
        refused.result(30)
    with pytest.raises(InvalidGrammar):
        compiler.submit(GrammarSpec("lark", "no")).result(30)
    assert gate.begun == ["no", "no"]
