"""Grammars that outputs must match, compiled by llguidance: which tokens may come next.

A ``GrammarCompiler`` turns a ``GrammarSpec`` into a ``CompiledGrammar`` and keeps it, so that the same one again is a
look-up. Each request starts a state of its own from it, which is a copy of some microseconds.

What a specification can cost is bounded: its length; the size of the grammar and the work and memory of each step, by
llguidance; and the time of compiling, by doing it in another process first (``grammar_checker``). One that is beyond
the bounds is refused, or ends its own request and no other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

from manylora.server.engine.constraint import ConstraintFailed, Grammar
from manylora.server.engine.detokenizer import Vocabulary, WindowVocabulary
from manylora.server.engine.grammar.checker import GrammarChecker
from manylora.server.engine.grammar.sources import (
    GrammarSpec,
    InvalidGrammar,
    compile_source,
    problem_of,
    source_of,
)
from manylora.server.engine.grammar.vocabulary import GrammarVocabulary, TokenTable

_log = logging.getLogger(__name__)

MAX_SOURCE: Final = 64 * 1024
"""Characters of one specification."""
MAX_KEPT: Final = 256
MAX_KEPT_SECONDS: Final = 5.0
"""Compiling them again would take that long. It stands for their memory: what compiling takes is writing it, and the
worst grammars were seen to grow by 30 MB a second."""
MASK_SECONDS: Final = 0.5
"""Processor time that the masks of one output may take at first, ..."""
MASK_SECONDS_MORE: Final = 0.002
"""... and with each token. A hundredth of that is usual."""
TOO_SLOW: Final = "The grammar takes too long to follow; make it simpler (fewer nested repetitions or alternatives)."
THREADS: Final = 2
"""Grammars compiled at once; more wait."""


class Checker(Protocol):
    """``grammar_checker.GrammarChecker``."""

    def check(self, spec: GrammarSpec) -> str: ...
    def close(self) -> None: ...


class CompiledGrammar:
    """A ``constraint.Grammar``."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.is_slow = False
        """Whether an output was ended because of the time its masks took."""
        self._matcher = matcher  # never moved on, only copied

    def start(self) -> MatchState:
        return MatchState(self._matcher.deep_copy(), self)


class MatchState:
    """One output within its grammar: a ``constraint.Constraint``."""

    def __init__(self, matcher: LLMatcher, grammar: CompiledGrammar) -> None:
        self._matcher = matcher
        self._grammar = grammar
        self._seconds_left = MASK_SECONDS

    def allow(self, mask: npt.NDArray[np.int32]) -> None:
        # All other requests of the step wait for this, and llguidance's limits do not bound all of it: a few characters
        # of nested repetitions take a tenth of a second each time. Usual grammars take 0.02 to 0.1 ms.
        began = time.thread_time()  # not the clock's: a busy machine is nobody's fault
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)  # without the interpreter's lock
        self._seconds_left += MASK_SECONDS_MORE - (time.thread_time() - began)
        if self._seconds_left < 0:
            self._grammar.is_slow = True
            raise ConstraintFailed(TOO_SLOW)
        self._check()

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            self._check()
            raise ConstraintFailed(f"Token {token} is outside the grammar of this output.")

    @property
    def is_complete(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def _check(self) -> None:
        problem = problem_of(self._matcher)
        if problem is not None:
            raise ConstraintFailed(f"This output cannot go on: {problem}.")


@dataclass(frozen=True)
class _Kept:
    """What came of a specification, a refusal too: one that took long is not tried again and again."""

    grammar: CompiledGrammar | None
    refusal: str = ""
    seconds: float = 0.0

    def give(self, future: Future[Grammar]) -> Future[Grammar]:
        if self.grammar is None:
            future.set_exception(InvalidGrammar(self.refusal))
        elif self.grammar.is_slow:
            future.set_exception(InvalidGrammar(TOO_SLOW))
        else:
            future.set_result(self.grammar)
        return future


class GrammarCompiler:
    """Compiles specifications for one vocabulary. For any number of threads.

    Args:
        trie: the vocabulary (``grammar_vocabulary.token_trie``).
        checker: translates each specification, within a time; without one, only llguidance's own limits hold.
        max_kept, max_kept_seconds: how many compiled grammars are kept, and what compiling them took in all.
    """

    def __init__(
        self,
        trie: LLTokenizer,
        checker: Checker | None = None,
        *,
        max_kept: int = MAX_KEPT,
        max_kept_seconds: float = MAX_KEPT_SECONDS,
    ) -> None:
        self._trie = trie
        self._checker = checker
        self._max_kept, self._max_kept_seconds = max_kept, max_kept_seconds
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="manylora-grammar")
        self._lock = threading.Lock()
        self._kept: OrderedDict[GrammarSpec, _Kept] = OrderedDict()
        self._kept_seconds = 0.0
        self._making: dict[GrammarSpec, Future[Grammar]] = {}

    def submit(self, spec: GrammarSpec) -> Future[Grammar]:
        """Its grammar, at once if it is kept, or as soon as a thread has compiled it; whoever asks meanwhile waits for
        the same one. The future raises InvalidGrammar. RuntimeError after ``close``."""
        with self._lock:
            kept = self._kept.get(spec)
            if kept is not None:
                self._kept.move_to_end(spec)
                return kept.give(Future())
            made = self._making.get(spec)
            if made is None:
                made = self._making[spec] = Future()
                try:
                    self._threads.submit(self._make, spec, made)
                except RuntimeError:
                    del self._making[spec]
                    raise
            return made

    def compile(self, spec: GrammarSpec) -> Grammar:
        """The same, waited for."""
        return self.submit(spec).result()

    def close(self) -> None:
        """What is being compiled ends; what waits for its turn is cancelled."""
        if self._checker is not None:
            self._checker.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            for made in self._making.values():
                made.cancel()
            self._making.clear()

    def _make(self, spec: GrammarSpec, made: Future[Grammar]) -> None:
        began = time.monotonic()
        kept: _Kept | None = None
        error: BaseException | None = None
        try:
            kept = _Kept(self._compile(spec))
        except InvalidGrammar as refused:
            kept = _Kept(None, str(refused))
        except BaseException as raised:  # noqa: BLE001 - who waits for it gets it; a panic of llguidance is no Exception
            error = raised
        with self._lock:
            del self._making[spec]
            if kept is not None:
                self._keep(spec, replace(kept, seconds=time.monotonic() - began))
        if kept is not None:
            kept.give(made)
        else:
            made.set_exception(error)

    def _keep(self, spec: GrammarSpec, kept: _Kept) -> None:
        self._kept[spec] = kept
        self._kept_seconds += kept.seconds
        while len(self._kept) > self._max_kept or (self._kept_seconds > self._max_kept_seconds and len(self._kept) > 1):
            _, freed = self._kept.popitem(last=False)
            self._kept_seconds -= freed.seconds

    def _compile(self, spec: GrammarSpec) -> CompiledGrammar:
        if len(spec.text) > MAX_SOURCE:
            raise InvalidGrammar(f"it has {len(spec.text)} characters; at most {MAX_SOURCE} are taken")
        source = source_of(spec) if self._checker is None else self._checker.check(spec)
        return CompiledGrammar(compile_source(self._trie, source))


def grammars_for(table: TokenTable, vocab_size: int, text: Vocabulary) -> GrammarCompiler | None:
    """The compiler of a model's grammars; None, and a line in the log, if its tokens are not the bytes of their text.

    ``vocab_size``: rows of ``lm_head``. ``text``: what turns its tokens into text.
    """
    problem = "its tokenizer's decoder is of an unknown kind"
    if not isinstance(text, WindowVocabulary):  # which decodes tokens only together
        try:
            vocabulary = GrammarVocabulary.of(table, vocab_size)
            return GrammarCompiler(vocabulary.trie(), GrammarChecker(vocabulary))
        except ValueError as error:
            problem = str(error)
    _log.warning("structured output is not served for this model: %s", problem)
    return None
