"""Grammars compiled in other processes first, which may take too long or die of it (``grammar_worker``).

The limits of llguidance bound most of what a hostile specification can do, not all: a chain of references in a JSON
schema overflows the stack, which ends the process; `multipleOf` makes an automaton with as many states as its value;
intersections of regular expressions take minutes. Nothing in a thread can be stopped, so a process does it first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from typing import Any, Final

from manylora.server.engine.grammar.sources import GrammarSpec, InvalidGrammar
from manylora.server.engine.grammar.vocabulary import GrammarVocabulary

_log = logging.getLogger(__name__)

SECONDS: Final = 3
"""That a specification may take. Usual ones take milliseconds."""
_START_S: Final = 60.0
"""For a worker to start and to read the vocabulary, on a machine that is busy."""


class GrammarChecker:
    """Workers, started when they are needed, one for each thread that checks at a time, and kept for the next."""

    def __init__(self, vocabulary: GrammarVocabulary, *, seconds: int = SECONDS) -> None:
        self._seconds = seconds
        self._vocabulary = json.dumps(
            {
                "tokens": [token.decode("latin-1") for token in vocabulary.tokens],
                "special": list(vocabulary.special),
                "eos": list(vocabulary.eos),
            }
        )
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._workers: set[_Worker] = set()
        self._is_closed = False

    def check(self, spec: GrammarSpec) -> str:
        """llguidance's form of it. Raises InvalidGrammar; RuntimeError if there is no worker to be had."""
        worker = self._take()
        try:
            answer = worker.ask(json.dumps(asdict(spec)), self._seconds)
        except BaseException:
            self._drop(worker)
            raise
        if answer is None:
            self._drop(worker)
            self._check_open()
            raise InvalidGrammar(
                f"it takes too long or too much memory to compile (the limit is {self._seconds} s)", is_costly=True
            )
        with self._lock:
            if not self._is_closed:
                self._idle.append(worker)
        if self._is_closed:
            self._drop(worker)
        if "error" in answer:
            raise InvalidGrammar(answer["error"])
        source: str = answer["source"]
        return source

    def close(self) -> None:
        """End the workers; who waits for one gets an error."""
        with self._lock:
            self._is_closed = True
            busy, idle, self._idle = self._workers.difference(self._idle), self._idle, []
        for worker in busy:
            worker.kill()  # its thread finds it dead, and does the rest
        for worker in idle:
            self._drop(worker)

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("grammars are compiled no more: the server is shutting down")

    def _take(self) -> _Worker:
        while True:
            with self._lock:
                self._check_open()
                if not self._idle:
                    worker = _Worker(self._seconds)
                    self._workers.add(worker)
                    break
                worker = self._idle.pop()
            if worker.is_alive:
                return worker
            self._drop(worker)
        if worker.ask(self._vocabulary, _START_S) is None:
            self._drop(worker)
            raise RuntimeError(f"the process that compiles grammars did not start: {' '.join(worker.command)}")
        _log.debug("grammars are compiled by process %d", worker.pid)
        return worker

    def _drop(self, worker: _Worker) -> None:
        with self._lock:
            self._workers.discard(worker)
        worker.kill()
        worker.close_pipes()


class _Worker:
    def __init__(self, seconds: int) -> None:
        self.command = (sys.executable, "-P", "-m", "manylora.server.engine.grammar.worker", str(seconds))
        # A session of its own: an interrupt from the terminal is for the server, which then closes it.
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, line: str, seconds: float) -> dict[str, Any] | None:
        """What it answers within this time; None if it does not, or dies."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        until = time.monotonic() + seconds
        poll = select.poll()  # not select: a server has more than a thousand sockets
        poll.register(self._process.stdout, select.POLLIN)
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        answer = b""
        while not answer.endswith(b"\n"):
            ready = poll.poll(1000 * max(until - time.monotonic(), 0))
            read = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            if not read:
                return None
            answer += read
        parsed: dict[str, Any] = json.loads(answer)
        return parsed

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what was not written is of no use any more
                    pipe.close()
