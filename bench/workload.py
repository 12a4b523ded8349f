"""The workload that this project and its peers are compared on, as data.

``rows`` requests at once over ``adapters`` distinct adapters (0: the base), prompts of 64 token ids, 64 tokens out,
greedy, end-of-sequence ignored. The model and the adapters ``a0 .. a31`` (rank 16, all seven projections) come from the
workload folder: ``model/`` and ``adapters/a0`` and so on.
"""

from __future__ import annotations

from dataclasses import dataclass

PROMPT_TOKENS = 64
OUTPUT_TOKENS = 64
N_ADAPTERS = 32


@dataclass(frozen=True)
class Case:
    rows: int
    adapters: int

    def prompt(self, row: int) -> list[int]:
        return [1000 + row + j for j in range(PROMPT_TOKENS)]

    def adapter(self, row: int) -> str | None:
        return f"a{row % self.adapters}" if self.adapters else None

    @property
    def tokens(self) -> int:
        return self.rows * OUTPUT_TOKENS

    def __str__(self) -> str:
        return f"{self.rows}/{self.adapters}"


CASES = tuple(Case(*c) for c in ((1, 0), (1, 1), (8, 0), (8, 8), (32, 0), (32, 8), (32, 32)))
