"""Compiles grammars in a process of its own, whose death harms nobody: ``python -m`` of this module.

It reads the vocabulary, answers ``{}``, and then answers each specification it reads: ``{"source": ...}``, or
``{"error": ...}`` for one that is wrong; all of them one line of JSON. A specification that takes too much ends the
process: its stack is a part of what threads of the server have, and its memory and its processor time are bounded (so
that it ends even if nobody is left to end it).
"""

from __future__ import annotations

import json
import resource
import sys
import threading
from pathlib import Path
from typing import Any, Final

from manylora.server.engine.grammar.sources import GrammarSpec, InvalidGrammar, compile_source, source_of
from manylora.server.engine.grammar.vocabulary import GrammarVocabulary

MEMORY: Final = 256 << 20
"""Bytes that may be allocated besides what the process begins with."""
_STACK: Final = 4 << 20
_STATM: Final = Path("/proc/self/statm")


def main() -> None:
    seconds = int(sys.argv[1])
    _limit(resource.RLIMIT_CORE, 0)  # its death is expected
    allowed, _ = resource.getrlimit(resource.RLIMIT_STACK)
    # What overflows the stack of a thread of the server must have overflowed this one before.
    threading.stack_size(_STACK if allowed == resource.RLIM_INFINITY else min(_STACK, allowed // 2))
    thread = threading.Thread(target=_serve, args=(seconds,))
    thread.start()
    thread.join()


def _serve(seconds: int) -> None:
    given = json.loads(sys.stdin.readline())
    trie = GrammarVocabulary(
        [token.encode("latin-1") for token in given["tokens"]], given["special"], given["eos"]
    ).trie()
    compile_source(trie, source_of(GrammarSpec("json_object")))  # what the first one allocates is not counted
    if _STATM.exists():  # elsewhere the time alone bounds it
        _limit(resource.RLIMIT_AS, int(_STATM.read_text().split()[0]) * resource.getpagesize() + MEMORY)
    _reply({})
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)
        try:
            source = source_of(GrammarSpec(**json.loads(line)))
            compile_source(trie, source)
        except InvalidGrammar as error:
            _reply({"error": str(error)})
        else:
            _reply({"source": source})


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _reply(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
