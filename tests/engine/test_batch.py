"""The pairs (row, slot, scale) of a step, against a slow way to make them."""

from __future__ import annotations

import random
import time
from collections import defaultdict

import pytest

from manylora.adapters.versions import AdapterRef
from manylora.kernels.lora_segments import LoraSegments
from manylora.server.engine.batch import adapter_segments
from manylora.server.engine.request import AdapterUse, Request, SamplingParams, ScheduledRow

VERSIONS = "73a9510f"
"""The version in each slot."""
Uses = list[tuple[int, float]]


def row(number: int, count: int, uses: Uses, *, merged: object = None) -> ScheduledRow:
    made = Request(f"r{number}", [1] * count, SamplingParams(), merged=merged)
    made.adapters = tuple(AdapterUse(AdapterRef(f"n{i}", VERSIONS[slot] * 64), c) for i, (slot, c) in enumerate(uses))
    made.slots = () if merged is not None else tuple(slot for slot, _ in uses)
    return ScheduledRow(made, 0, count)


def pairs_of(segments: LoraSegments | None) -> list[tuple[int, int, float]]:
    """(slot, row, scale) in the order of the segments."""
    if segments is None:
        return []
    bounds = segments.host_offsets.tolist()
    assert segments.slots.tolist() == list(segments.slot_list)
    assert segments.rows.tolist() == segments.host_rows.tolist()
    assert segments.scales.tolist() == segments.host_scales.tolist()
    assert segments.offsets.tolist() == bounds
    assert (bounds[0], bounds[-1]) == (0, len(segments.host_rows))
    return [
        (slot, int(segments.host_rows[i]), float(segments.host_scales[i]))
        for s, slot in enumerate(segments.slot_list)
        for i in range(bounds[s], bounds[s + 1])
    ]


def slowly(rows: list[ScheduledRow]) -> list[tuple[int, int, float]]:
    """Token by token: segments by version, tokens ascending, scales of a slot added up, nothing of scale 0."""
    scales: dict[tuple[str, int, int], float] = defaultdict(float)
    token = 0
    for one in rows:
        for _ in range(one.count):
            for slot, use in zip(one.request.slots, one.request.adapters, strict=False):
                scales[use.ref.version, slot, token] += use.scale
            token += 1
    return [(slot, at, scale) for (_, slot, at), scale in sorted(scales.items()) if scale != 0]


def test_random_plans() -> None:
    rng = random.Random(0)
    for _ in range(500):
        rows = [
            row(
                i,
                rng.choice([1, 1, 1, 2, 5]),
                [(rng.randrange(8), rng.choice([1.0, 0.5, -0.5, 0.0])) for _ in range(rng.choice([0, 1, 1, 2, 4]))],
                merged=object() if rng.random() < 0.1 else None,
            )
            for i in range(rng.randint(1, 12))
        ]
        assert pairs_of(adapter_segments(rows)) == slowly(rows)


def test_nothing_to_add_is_none() -> None:
    assert adapter_segments([row(0, 3, []), row(1, 1, [(2, 0.0)]), row(2, 1, [(1, 1.0), (1, -1.0)])]) is None


def test_a_row_without_its_slots_is_not_computed_as_the_base() -> None:
    lost = row(0, 1, [(2, 1.0)])
    lost.request.slots = ()
    with pytest.raises(ValueError, match="request r0 names 1 adapters, but has slots"):
        adapter_segments([lost])


@pytest.mark.parametrize("adapters", [1, 2])
def test_the_pairs_of_a_decode_step_take_microseconds(adapters: int) -> None:
    """Of 32 rows: made anew for each step, which takes tens of milliseconds on a CPU and five on a GPU. About 50 and 70
    microseconds on an idle core of 2020; the bound is ten times that, for machines that are busy."""
    rows = [row(i, 1, [((i + k) % 8, 0.5) for k in range(adapters)]) for i in range(32)]
    times = []
    for _ in range(100):
        start = time.perf_counter()
        adapter_segments(rows)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.7e-3
