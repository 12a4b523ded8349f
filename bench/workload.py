"""The workload that this project and its peers are compared on, as data.

``rows`` requests at once over ``adapters`` distinct adapters (0: the base), prompts of 64 token ids, 64 tokens out,
greedy, end-of-sequence ignored. The model and the adapters ``a0 .. a31`` (rank 16, all seven projections) come from the
workload folder: ``model/`` and ``adapters/a0`` and so on.

    python -P bench/workload.py 32/8 > 32-8.jsonl

writes a case as a trace, which loadtest/run.py --trace replays against any server that has the adapters.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

PROMPT_TOKENS = 64
OUTPUT_TOKENS = 64
N_ADAPTERS = 32


@dataclass(frozen=True)
class Case:
    rows: int
    adapters: int
    prompt_tokens: int = PROMPT_TOKENS
    output_tokens: int = OUTPUT_TOKENS

    def prompt(self, row: int) -> list[int]:
        return [1000 + row + j for j in range(self.prompt_tokens)]

    def adapter(self, row: int) -> str | None:
        return f"a{row % self.adapters}" if self.adapters else None

    @property
    def tokens(self) -> int:
        return self.rows * self.output_tokens

    def trace(self, base: str) -> list[dict[str, Any]]:
        """Its requests, all due at once, as lines of loadtest/README.md's trace format; ``base`` is the base's name."""
        fields = {"at_s": 0, "kind": "completion", "max_tokens": self.output_tokens}
        return [{**fields, "model": self.adapter(row) or base, "prompt": self.prompt(row)} for row in range(self.rows)]

    def __str__(self) -> str:
        return f"{self.rows}/{self.adapters}"


CASES = tuple(Case(*c) for c in ((1, 0), (1, 1), (8, 0), (8, 8), (32, 0), (32, 8), (32, 32)))
FIRST_TOKEN_CASES = tuple(Case(1, adapters, prompt_tokens=512, output_tokens=1) for adapters in (0, 1))
"""How long a prompt of 512 tokens keeps its first token waiting; not a load to replay."""


def main() -> None:
    by_name = {str(case): case for case in CASES}
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in by_name:
        sys.exit(f"usage: workload.py {{{','.join(by_name)}}} [NAME OF THE BASE (base)]")
    for line in by_name[sys.argv[1]].trace(*sys.argv[2:] or ["base"]):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
