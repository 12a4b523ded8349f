"""Patterns out of adapter files: as ``re`` reads them, and never for long."""

from __future__ import annotations

import re
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.adapters.patterns import MAX_LENGTH, Patterns, PatternsTooSlow

MODULES = [
    *(f"model.layers.{i}.{m}_proj" for i in (0, 1, 10, 31) for m in ("self_attn.q", "self_attn.o", "mlp.down")),
    "lm_head",
    "model.embed_tokens",
]
USUAL = [
    r".*\.(q|v)_proj",
    r"(.*\.)?(q_proj)$",
    r"(.*\.)?(layers\.\d+\.self_attn\.o_proj)$",
    r"(?:^|.*?\.)layers\.(?P<idx>\d+)\.",
    r".*?\.[^.]*\.(?P<idx>\d+)\.",
    r"^(?!.*lm_head).*layers\.(1\d|[0-9])\..*_proj$",
    r"(?i)MODEL\.LAYERS\.\d{1,2}\.(self_attn|mlp)\.[a-z]+_proj",
    r"(?:.*?(?:language|text).*?)?(?:model|layers)\.(?:layers\.)?\d+\.(?:self_attn|mlp)\.(?:q|k|v|o|down)_proj",
    r"model(\.\w+)*",
    r"[]a-z._0-9]+",
    r"\S{3,}\x6droj|lm_head",
]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_mean_what_they_mean_to_re(pattern: str) -> None:
    patterns = Patterns()
    assert patterns.problem(pattern) is None
    for module in MODULES:
        for whole in (False, True):
            theirs = (re.fullmatch if whole else re.match)(pattern, module)
            ours = patterns.match(pattern, module, whole=whole)
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert ours.groups() == theirs.groups()
                assert ours.groupdict() == theirs.groupdict()


PIECES = ["q", "_proj", ".", r"\.", ".*", r"\d+", "[a-z_]", "(", "(?:", ")", "|", "?", "+", "*", "{1,2}", "^", "$"]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(PIECES), max_size=10).map("".join), st.sampled_from(MODULES))
def test_whatever_is_taken_means_what_it_means_to_re(pattern: str, module: str) -> None:
    patterns = Patterns()
    if patterns.problem(pattern) is None:
        theirs = re.match(pattern, module)
        ours = patterns.match(pattern, module)
        assert (ours and ours.span()) == (theirs and theirs.span())


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("q_(proj", "missing ), unterminated subpattern"),
        ("[z-a]", "bad character range"),
        ("x{e<=1}", "a brace in it is not a repetition"),  # an error allowed, to regex
        (r"\p{Lu}", "a brace in it is not a repetition"),
        ("[[:alpha:]]", "a bracket in a set of characters"),
        ("[a[:alpha:]]", "a bracket in a set of characters"),
        ("(?x)a # (", "comments and the flag x"),
        ("a(?#((()b", "comments and the flag x"),
        ("(?|a|b)", "unknown extension"),
        ("a" * (MAX_LENGTH + 1), "more than the 4096 that are read"),
        ("(" * 2000 + "a" + ")" * 2000, "nested too deep"),
        # Both would make a form of the pattern that fills the memory.
        ("(" * 150 + "[a-z]" + "+)" * 150, "its repetitions are nested too deep"),
        ("((((((a{9}){9}){9}){9}){9}){9}){9}", "its repetitions are nested too deep"),
        ("(a?){65000}", "its repetitions are nested too deep"),
        ("a{99999999999999999999}", "its repetitions are nested too deep"),
    ],
)
def test_refused(pattern: str, problem: str) -> None:
    start = time.monotonic()
    assert problem in str(Patterns().problem(pattern))
    assert time.monotonic() - start < 1


ENDLESS = r"((.)(?!\2)|..)*(.)(?=\3\3\3)"


def test_endless_backtracking_ends_and_lets_other_threads_run() -> None:
    """``re`` would hold Python's lock for hours."""
    patterns, ticks, done = Patterns(0.5), 0, threading.Event()

    def work() -> None:
        nonlocal ticks
        while not done.wait(0.005):
            ticks += 1

    thread = threading.Thread(target=work)
    thread.start()
    start = time.monotonic()
    with pytest.raises(PatternsTooSlow, match="takes too long"):
        patterns.match(ENDLESS, "model.layers.10.self_attn.q_proj", whole=True)
    seconds = time.monotonic() - start
    done.set()
    thread.join()
    assert 0.2 < seconds < 20
    assert ticks > 10, "the other thread was kept waiting"
    with pytest.raises(PatternsTooSlow):  # the budget is the adapter's, not each match's
        patterns.match("q_proj", "q_proj")


def test_a_match_that_timed_out_has_used_up_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock says: regex counts the processor time of all threads, which may run faster than it."""

    class Slow:
        def match(self, *_: object, **__: object) -> None:
            raise TimeoutError

    patterns = Patterns(1000.0)
    monkeypatch.setitem(patterns._compiled, "slow", Slow())
    with pytest.raises(PatternsTooSlow, match="slow"):
        patterns.match("slow", "q_proj")
    with pytest.raises(PatternsTooSlow):
        patterns.match("q_proj", "q_proj")
