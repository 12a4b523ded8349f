"""Grammars that outputs must match, compiled by llguidance: which tokens may come next.

A ``GrammarCompiler`` turns a ``GrammarSpec`` into a ``CompiledGrammar`` and keeps it, so that the same one again is a
look-up. Each request starts a state of its own from it, which is a copy of some microseconds.

What a specification can cost is bounded: its length; the size of the grammar and the work and memory of each step, by
llguidance; and the time of compiling, by doing it in another process first (``grammar_checker``). One that is beyond
the bounds is refused, or ends its own request and no other. What tenants send is compiled in turns
(``compile_queue``), and what nobody waits for any more is not begun.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

from manylora.server.engine.constraint import ConstraintFailed, Grammar
from manylora.server.engine.detokenizer import Vocabulary, WindowVocabulary
from manylora.server.engine.grammar.checker import GrammarChecker
from manylora.server.engine.grammar.compile_queue import CompileQueue, Job
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
MAX_REFUSED: Final = 256
"""Refusals that are kept, so that one that took long is not tried again and again. No specification is kept for them,
and they take no place of a grammar."""
COSTLY_FOR_S: Final = 60.0
"""Seconds for which what took too long is not tried again; the machine may have been busy."""
MAX_REASON: Final = 2000
"""Characters of why one is refused: llguidance may quote all of it."""
MAX_WAITING: Final = 32
"""Grammars of one tenant that wait to be compiled; usual ones take milliseconds."""
MASK_SECONDS: Final = 0.5
"""Processor time that the masks of one output may take at first, ..."""
MASK_SECONDS_MORE: Final = 0.002
"""... and with each token. A hundredth of that is usual."""
TOO_SLOW: Final = "The grammar takes too long to follow; make it simpler (fewer nested repetitions or alternatives)."
_RUN: Final = re.compile(r"\S{200,}| {200,}")
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


class GrammarCompiler:
    """Compiles specifications for one vocabulary. For any number of threads.

    Args:
        trie: the vocabulary (``grammar_vocabulary.token_trie``).
        checker: translates each specification, within a time; without one, only llguidance's own limits hold.
        max_kept, max_kept_seconds: how many compiled grammars are kept, and what compiling them took in all.
        max_waiting: how many of one tenant wait to be compiled.
    """

    def __init__(
        self,
        trie: LLTokenizer,
        checker: Checker | None = None,
        *,
        max_kept: int = MAX_KEPT,
        max_kept_seconds: float = MAX_KEPT_SECONDS,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self._trie = trie
        self._checker = checker
        self._max_kept, self._max_kept_seconds = max_kept, max_kept_seconds
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="manylora-grammar")
        self._lock = threading.Lock()
        self._kept: OrderedDict[GrammarSpec, tuple[CompiledGrammar, float]] = OrderedDict()  # and its seconds
        self._kept_seconds = 0.0
        self._refused: OrderedDict[bytes, tuple[InvalidGrammar, float]] = OrderedDict()  # and until when
        self._jobs: dict[GrammarSpec, Job] = {}
        self._queue = CompileQueue(THREADS, max_waiting)
        self._n_working = 0
        """Threads that look for a job when they are through with theirs."""
        self._is_closed = False

    def submit(self, spec: GrammarSpec, tenant: str = "") -> Future[Grammar]:
        """Its grammar, at once if it is kept, or as soon as a thread has compiled it; whoever asks meanwhile waits for
        the same one. The future raises InvalidGrammar; who cancels it waits no more.

        Raises GrammarQueueFull if too many of the tenant's wait, and RuntimeError after ``close``.
        """
        future: Future[Grammar] = Future()
        if len(spec.text) > MAX_SOURCE:  # before anything of it is kept
            reason = f"it has {len(spec.text)} characters; at most {MAX_SOURCE} are taken"
            future.set_exception(InvalidGrammar(reason))
            return future
        digest = _digest(spec)
        with self._lock:
            found = self._find(spec, digest)
            if found is None:
                if self._is_closed:
                    raise RuntimeError("grammars are compiled no more: the server is shutting down")
                job = self._jobs.get(spec) or Job(spec)
                if job.turn is None:
                    self._queue.enter(job, tenant)
                    self._jobs[spec] = job
                job.waiters[future] = tenant
                if self._n_working < THREADS:
                    self._threads.submit(self._work)
                    self._n_working += 1
        if found is None:
            future.add_done_callback(partial(self._leave, job))
        else:
            _give(found, future)
        return future

    def compile(self, spec: GrammarSpec) -> Grammar:
        """The same, waited for."""
        return self.submit(spec).result()

    def close(self) -> None:
        """What is being compiled ends; what waits for its turn is cancelled."""
        with self._lock:
            self._is_closed = True
            waiting = [job for job in self._jobs.values() if job.turn is None]
            for job in waiting:
                self._drop(job)
        if self._checker is not None:
            self._checker.close()
        self._threads.shutdown(wait=True)
        for job in waiting:
            for future in list(job.waiters):
                future.cancel()

    def _find(self, spec: GrammarSpec, digest: bytes) -> CompiledGrammar | InvalidGrammar | None:
        if spec in self._kept:
            self._kept.move_to_end(spec)
            grammar, _ = self._kept[spec]
            return InvalidGrammar(TOO_SLOW, is_costly=True) if grammar.is_slow else grammar
        if digest in self._refused:
            refusal, until = self._refused[digest]
            if time.monotonic() < until:
                self._refused.move_to_end(digest)
                return refusal
            del self._refused[digest]
        return None

    def _leave(self, job: Job, future: Future[Grammar]) -> None:
        """``future`` is done, perhaps because it was cancelled: who waited for it may have been the last."""
        with self._lock:
            tenant = job.waiters.pop(future, None)
            if tenant is None or job.turn is not None:
                return
            if not job.waiters:
                self._drop(job)
            elif tenant not in job.waiters.values():
                self._queue.leave(job, tenant)

    def _drop(self, job: Job) -> None:
        """It will not be begun."""
        if self._jobs.get(job.spec) is job:
            del self._jobs[job.spec]
        for tenant in tuple(job.queues):
            self._queue.leave(job, tenant)

    def _work(self) -> None:
        while True:
            with self._lock:
                job = self._queue.take()
                if job is None:  # one that may not begin now begins on the thread that ends what it waits for
                    self._n_working -= 1
                    return
            self._make(job)

    def _make(self, job: Job) -> None:
        began = time.monotonic()
        made: CompiledGrammar | BaseException
        try:
            made = self._compile(job.spec)
        except InvalidGrammar as refused:
            made = InvalidGrammar(_shortened(str(refused)), is_costly=refused.is_costly)
        except BaseException as raised:  # noqa: BLE001 - who waits for it gets it; a panic of llguidance is no Exception
            made = raised
        with self._lock:
            del self._jobs[job.spec]
            self._queue.end(job)
            waiters = list(job.waiters)
            if isinstance(made, CompiledGrammar):
                self._keep(job.spec, made, time.monotonic() - began)
            elif isinstance(made, InvalidGrammar):
                until = time.monotonic() + COSTLY_FOR_S if made.is_costly else math.inf
                self._refused[_digest(job.spec)] = made, until
                if len(self._refused) > MAX_REFUSED:
                    self._refused.popitem(last=False)
        for future in waiters:
            if future.set_running_or_notify_cancel():
                _give(made, future)

    def _keep(self, spec: GrammarSpec, grammar: CompiledGrammar, seconds: float) -> None:
        self._kept[spec] = grammar, seconds
        self._kept_seconds += seconds
        while len(self._kept) > self._max_kept or (self._kept_seconds > self._max_kept_seconds and len(self._kept) > 1):
            _, (_, freed) = self._kept.popitem(last=False)
            self._kept_seconds -= freed

    def _compile(self, spec: GrammarSpec) -> CompiledGrammar:
        source = source_of(spec) if self._checker is None else self._checker.check(spec)
        return CompiledGrammar(compile_source(self._trie, source))


def _give(made: CompiledGrammar | BaseException, future: Future[Grammar]) -> None:
    if isinstance(made, InvalidGrammar):  # a new one for each: an exception grows each time that it is raised
        future.set_exception(InvalidGrammar(str(made), is_costly=made.is_costly))
    elif isinstance(made, BaseException):
        future.set_exception(made)
    else:
        future.set_result(made)


def _digest(spec: GrammarSpec) -> bytes:
    return hashlib.blake2b(f"{spec.kind} {spec.text}".encode("utf-8", "surrogatepass"), digest_size=32).digest()


def _shortened(reason: str) -> str:
    if len(reason) <= MAX_REASON:
        return reason
    reason = _RUN.sub(lambda run: f"{run[0][:100]}...", reason)
    half = MAX_REASON // 2
    return reason if len(reason) <= MAX_REASON else f"{reason[:half]} ... {reason[-half:]}"


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
