"""The pairs (row, slot, scale) of a step, against a slow way to make them."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from dataclasses import fields

import numpy as np
import pytest

from manylora.adapters.versions import AdapterRef
from manylora.kernels.lora_segments import LoraSegments
from manylora.server.engine.batch import BatchBuilder, adapter_segments
from manylora.server.engine.request import AdapterUse, Request, SamplingParams, ScheduledRow
from manylora.server.model.step_arrays import StepArrays

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


def same(one: StepArrays, other: StepArrays) -> None:
    for field in fields(StepArrays):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(theirs, np.ndarray):
            assert mine.dtype == theirs.dtype
            assert mine.tolist() == theirs.tolist(), field.name
        else:
            assert pairs_of(mine) == pairs_of(theirs) if field.name == "lora" else mine is theirs, field.name


def test_a_step_that_goes_on_is_as_one_made_anew() -> None:
    """Rows decode, draw several tokens at once, come, leave, are preempted and start again in other pages."""
    rng = random.Random(0)
    for _ in range(60):
        builder, number = BatchBuilder(), 0
        running: list[Request] = []
        for _ in range(60):
            while len(running) < 4 and (not running or rng.random() < 0.2):
                number += 1
                uses = rng.choice([[], [], [(rng.randrange(8), 1.0)], [(1, 0.5), (3, 2.0)]])
                made = row(number, rng.randint(1, 40), uses).request
                made.prompt_token_ids = [rng.randrange(9) for _ in made.prompt_token_ids]
                made.merged = "merge" if not uses and rng.random() < 0.2 else None
                running.append(made)
            if running and rng.random() < 0.1:
                running.remove(rng.choice(running))
            if rng.random() < 0.1:
                rng.shuffle(running)
            rows = []
            for request in running:
                if rng.random() < 0.03:  # preempted, and started again at once with all but its last token cached
                    request.num_computed, request.pages = rng.choice([0, request.num_tokens - 1]), []
                drafts = (7, 8)[: rng.choice([0] * 9 + [2])] if request.num_computed == request.num_tokens - 1 else ()
                left = request.num_tokens - request.num_computed
                count = (left if rng.random() < 0.7 else 1) + len(drafts)
                if len(drafts) and count != 1 + len(drafts):
                    drafts, count = (), left
                while len(request.pages) * 16 < request.num_computed + count:
                    request.pages.append(rng.randrange(1000))
                rows.append(ScheduledRow(request, request.num_computed, count, drafts))
            if not rows:
                continue
            for _ in range(rng.choice([1, 1, 1, 2])):
                same(builder.arrays(rows), BatchBuilder().arrays(rows))
            # As on a GPU: a row with drafts as rows of a token each.
            singles = [
                ScheduledRow(one.request, one.start + i, 1, one.drafts[:i])
                for one in rows
                for i in range(one.count if one.drafts else 0)
            ]
            if singles:
                same(builder.arrays(singles), BatchBuilder().arrays(singles))
            for one in rows:
                one.request.num_computed += one.count - len(one.drafts)
                if one.sample:
                    one.request.output_token_ids.append(rng.randrange(9))
                if one.drafts:  # none was right: their pages go back, and others come
                    del one.request.pages[-(-one.request.num_computed // 16) :]
