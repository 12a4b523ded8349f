"""What a system under comparison speaks: it is started once, says what it is, and then measures what it is asked for.

On standard output its first line is {"system": ...}; then, for each line on standard input, a case such as
{"rows": 8, "adapters": 8, "prompt_tokens": 64, "output_tokens": 64}, one line {"seconds": ...}. Only the standard
library: this runs in the environments of the peers, too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from workload import Case

Measured = Mapping[str, float]
"""``seconds`` for all of the case's requests together; ``decode_seconds`` of that without the prompt, where known."""


def answer(system: str, start: Callable[[], Callable[[Case], Measured]]) -> None:
    """``start`` makes the system ready and gives what measures a case; runs until standard input ends."""
    # Libraries print what they like: they get standard error, and standard output is kept for what is asked.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    measure = start()
    print(json.dumps({"system": system}), file=replies, flush=True)
    for line in sys.stdin:
        print(
            json.dumps({key: round(value, 6) for key, value in measure(Case(**json.loads(line))).items()}),
            file=replies,
            flush=True,
        )
