"""What a replica's work costs, fitted to what the real server was measured to take.

A step that draws a token for each of n rows, computes t prompt tokens and has d distinct adapters in it takes

    base(n) + t * prompt_token_s + d * adapter_s

with ``base`` a line through what was measured at 1, 8 and 32 rows. An adapter that is not on the device takes
``upload_s`` to copy there from host memory, and ``read_s`` before that if it has to be read from the disk. Where steps
run on the processor that also reads and copies, these take from each other: a step takes ``1 + drag * n`` times as long
while n reads and uploads are under way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

RESULTS: Final = Path(__file__).resolve().parents[1] / "results" / "replica_costs.jsonl"
STEP_TOKENS: Final = 256
"""Of the servers that were measured: the default on a CPU. A longer prompt takes several steps."""
ROWS: Final = (1, 8, 32)

Case = tuple[int, int, int, int]
"""Rows, distinct adapters, prompt tokens, output tokens."""
NEEDED: Final[tuple[Case, ...]] = (
    *((rows, adapters, 64, 64) for rows, adapters in ((1, 0), (8, 0), (32, 0), (1, 1), (8, 8), (32, 8), (32, 32))),
    (1, 0, 512, 1),
    (1, 1, 512, 1),
)


class CostsError(Exception):
    """Costs that cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Costs:
    """Seconds. ``base_s``: (rows, a step's seconds) at the rows that were measured, rising; between and beyond them it
    is a straight line. ``adapter_bytes``: of one adapter, as it is uploaded and read."""

    base_s: tuple[tuple[int, float], ...]
    prompt_token_s: float
    adapter_s: float
    upload_s: float
    read_s: float
    adapter_bytes: float
    drag: float = 0.0

    def __post_init__(self) -> None:
        rows = [row for row, _ in self.base_s]
        if len(rows) < 2 or rows != sorted(set(rows)) or any(seconds < 0 for _, seconds in self.base_s):
            raise CostsError(f"base_s: expected two or more (rows, seconds), rows rising, got {self.base_s}")
        for field in fields(self)[1:]:
            if not getattr(self, field.name) >= 0:
                raise CostsError(f"{field.name}: expected >= 0, got {getattr(self, field.name)}")

    def base_table(self, max_rows: int) -> list[float]:
        """Seconds of a step without prompts and adapters, by its number of rows from 0 to ``max_rows``."""
        (x0, y0), (x1, y1) = self.base_s[:2]
        (x2, y2), (x3, y3) = self.base_s[-2:]
        known_x, known_y = zip(*self.base_s, strict=True)
        table = []
        for n in range(max_rows + 1):
            if n < x0:
                value = y0 - (x0 - n) * (y1 - y0) / (x1 - x0)
            elif n > x3:
                value = y3 + (n - x3) * (y3 - y2) / (x3 - x2)
            else:
                value = float(np.interp(n, known_x, known_y))
            table.append(max(value, 0.0))
        return table

    def capacity(self, *, rows: int, slots: int, prompt_tokens: float, output_tokens: float) -> float:
        """Requests a second of one replica at its limit: all rows taken, as many distinct adapters in each step as
        can be, all of them in their slots. Swapping and idle rows make it less, rows that share adapters more."""
        step = self.base_table(rows)[rows] + min(rows, slots) * self.adapter_s
        return 1 / (prompt_tokens * self.prompt_token_s + output_tokens * step / rows)

    @classmethod
    def of(cls, given: Mapping[str, Any], default: Costs | None = None) -> Costs:
        """From a JSON object; what it lacks is ``default``'s. CostsError if something is wrong with it."""
        names = {field.name for field in fields(cls)}
        if unknown := sorted(given.keys() - names):
            raise CostsError(f"costs: {unknown[0]} is none of {', '.join(sorted(names))}")
        values = dict(given)
        try:
            if "base_s" in values:
                values["base_s"] = tuple((int(rows), float(seconds)) for rows, seconds in values["base_s"])
            return cls(**values) if default is None else replace(default, **values)
        except (TypeError, ValueError) as error:
            raise CostsError(f"costs: {error}") from None


@dataclass(frozen=True)
class Misses:
    """What it took to bring adapters to the device: mean seconds of an upload and of a read, an adapter's bytes in host
    memory, how much longer each second of it made the steps beside it take, in seconds, and how many uses and reads
    that is from."""

    upload_s: float
    read_s: float
    adapter_bytes: float
    drag: float
    uses: int
    reads: int


def fit(seconds: Mapping[Case, float], misses: Misses) -> tuple[Costs, dict[Case, float]]:
    """The costs under which ``NEEDED`` cases take about the ``seconds`` that were measured, and by case how far off
    they are: fitted over measured. CostsError if a case is missing."""
    if missing := [case for case in NEEDED if case not in seconds]:
        raise CostsError(f"no measurement of {missing[0]} (rows, adapters, prompt, output)")
    # Without adapters: four unknowns (a prompt token, steps of 1, 8 and 32 rows), four times.
    bare = [case for case in NEEDED if not case[1]]
    known = np.linalg.solve(np.array([_base_terms(case) for case in bare]), np.array([seconds[case] for case in bare]))
    # What adapters add: a prompt token's share, and a constant for each distinct one in a step. Each case weighs alike,
    # whatever its length.
    dressed = [case for case in NEEDED if case[1]]
    extra = np.array([seconds[case] - seconds[case[0], 0, *case[2:]] for case in dressed])
    weight = np.array([1 / seconds[case] for case in dressed])
    terms = np.array([_adapter_terms(case) for case in dressed])
    added, *_ = np.linalg.lstsq(terms * weight[:, None], extra * weight, rcond=None)
    costs = Costs(
        base_s=tuple((rows, round(float(value), 6)) for rows, value in zip(ROWS, known[1:], strict=True)),
        prompt_token_s=round(float(known[0] + added[0]), 7),
        adapter_s=round(float(added[1]), 6),
        upload_s=round(misses.upload_s, 4),
        read_s=round(misses.read_s, 4),
        adapter_bytes=misses.adapter_bytes,
        drag=round(misses.drag, 3),
    )
    ratios = {}
    for case in NEEDED:
        fitted = float(np.dot(_base_terms(case), known))
        if case[1]:
            fitted += float(np.dot(_adapter_terms(case), added))
        ratios[case] = round(fitted / seconds[case], 3)
    return costs, ratios


def _prefill_steps(case: Case) -> int:
    return -(-case[0] * case[2] // STEP_TOKENS)


def _base_terms(case: Case) -> list[float]:
    """How often a case has each unknown: a prompt token, and a step of 1, 8 and 32 rows. A step of prompts alone is one
    of no rows, on the line through 1 and 8."""
    rows, _, prompt, output = case
    terms = [float(rows * prompt), 0.0, 0.0, 0.0]
    prefills = _prefill_steps(case)
    terms[1] += prefills * (1 + 1 / 7)
    terms[2] -= prefills / 7
    terms[1 + ROWS.index(rows)] += output - 1
    return terms


def _adapter_terms(case: Case) -> list[float]:
    """Prompt tokens, and (step, adapter) pairs: a step of prompts holds a share of the adapters."""
    rows, adapters, prompt, output = case
    in_prefills = max(adapters, _prefill_steps(case))
    return [float(rows * prompt), float((output - 1) * adapters + in_prefills)]


def last_measured(path: Path = RESULTS) -> tuple[Costs, str]:
    """Of the last calibration, and its run. CostsError if there is none."""
    try:
        line = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise CostsError(f"{path}: {error}; bench/scale_calibrate.py makes one") from None
    return Costs.of(line["costs"]), line["run"]
