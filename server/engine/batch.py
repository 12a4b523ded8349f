"""A step's plan as arrays: token ids, positions, page tables, adapter segments. Built on the CPU, once a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.ops import PAGE_SIZE
from manylora.server.engine.request import ScheduledRow, StepPlan
from manylora.server.model.forward_batch import ForwardBatch
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.step_arrays import StepArrays


class BatchBuilder:
    """Makes the arrays of steps; ``device``: where their adapters are computed. For one thread (the step loop's).

    A step in which the rows of the one before go on, each by a token, is made from that one's arrays."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._last: _Continued | None = None

    def arrays(self, rows: Sequence[ScheduledRow]) -> StepArrays:
        """Of at least one row. Of a row that samples, the logits of its last known token are asked for, and those of
        each of its drafts. Good until the next call."""
        if any(row.count != 1 or row.drafts or not row.sample for row in rows):
            return _arrays(rows, adapter_segments(rows, self._device))
        if self._last is None or not self._last.goes_on(rows):
            self._last = _Continued(rows, _arrays(rows, adapter_segments(rows, self._device)))
        return self._last.step


class _Continued:
    """A step of decoding rows, which is made into the next one as long as the same rows decode."""

    def __init__(self, rows: Sequence[ScheduledRow], step: StepArrays) -> None:
        self.step = step
        # Who is preempted, which is when slots change, has another list afterwards. Not the requests: what they hold
        # would be kept with them.
        self._pages = [row.request.pages for row in rows]
        self._starts = [row.start for row in rows]

    def goes_on(self, rows: Sequence[ScheduledRow]) -> bool:
        """Make it the step of these rows; False if it has others, or one that does not go on where it was."""
        starts = [start + 1 for start in self._starts]
        if starts != [row.start for row in rows]:
            return False
        requests = [row.request for row in rows]
        if any(request.pages is not pages for request, pages in zip(requests, self._pages, strict=True)):
            return False
        self._starts, step = starts, self.step
        step.token_ids[:] = [request.output_token_ids[-1] for request in requests]
        for array in (step.positions, step.contexts):
            array += 1
        for i, start in enumerate(starts):
            if start % PAGE_SIZE == 0:  # pages before it are as they were: only drafts give some back
                self._turn_page(i, self._pages[i], start // PAGE_SIZE)
        return True

    def _turn_page(self, row: int, pages: Sequence[int], place: int) -> None:
        tables = self.step.tables
        if place == tables.shape[1]:
            tables = np.pad(tables, ((0, 0), (0, 1)))
            self.step = replace(self.step, tables=tables)
        tables[row, place] = pages[place]


def build_batch(plan: StepPlan, device: torch.device | str = "cpu") -> ForwardBatch:
    """The tensors of a plan with at least one row; see ``BatchBuilder``."""
    return BatchBuilder(device).arrays(plan.rows).on(device)


def _arrays(rows: Sequence[ScheduledRow], segments: LoraSegments | None) -> StepArrays:
    tokens = sum(row.count for row in rows)
    width = max(KVCache.pages_for(row.start + row.count) for row in rows)
    ids = np.empty(tokens, np.int64)
    positions = np.empty(tokens, np.int32)
    starts = np.zeros(len(rows) + 1, np.int32)
    contexts = np.empty(len(rows), np.int32)
    tables = np.zeros((len(rows), width), np.int32)
    sampled: list[int] = []
    at = 0
    for i, row in enumerate(rows):
        request, last = row.request, row.start + row.count
        if row.drafts:
            ids[at : at + row.count] = [row.token_at(position) for position in range(row.start, last)]
        else:
            ids[at : at + row.count] = request.tokens_between(row.start, last)
        positions[at : at + row.count] = np.arange(row.start, last)
        contexts[i] = last
        pages = request.pages[: KVCache.pages_for(last)]
        tables[i, : len(pages)] = pages
        at += row.count
        starts[i + 1] = at
        sampled.extend(range(at - row.num_sampled, at))
    rows_that_sample = None if len(sampled) == tokens else np.array(sampled, np.int64)
    return StepArrays(ids, starts, contexts, tables, positions, rows_that_sample, segments)


def adapter_segments(rows: Sequence[ScheduledRow], device: torch.device | str = "cpu") -> LoraSegments | None:
    """The adapters of these rows' tokens, which lie one behind the other; None if no row has any to add.

    Segments are in the order of the adapters' versions, so that a row's deltas are added up in one order whatever slots
    they lie in. A slot that a row has twice counts once, with the sum of its scales. What has scale 0 is left out: such
    a row is computed, to the bit, as if it did not name the adapter.
    """
    # Plain Python: for the few dozen rows of a decode step, numpy's calls would take several times as long.
    uses = sorted(_uses(rows))
    slots: list[int] = []
    bounds: list[int] = []
    firsts: list[int] = []
    counts: list[int] = []
    scales: list[float] = []
    total = 0
    for _version, slot, first, count, scale in uses:
        if not slots or slots[-1] != slot:
            slots.append(slot)
            bounds.append(total)
        firsts.append(first)
        counts.append(count)
        scales.append(scale)
        total += count
    if not uses:
        return None
    pair_rows, pair_scales = np.array(firsts, np.int32), np.array(scales, np.float32)
    if total > len(uses):  # not a token each
        before = np.cumsum(counts) - counts
        pair_rows = (np.arange(total) + np.repeat(pair_rows - before, counts)).astype(np.int32)
        pair_scales = np.repeat(pair_scales, counts)
    return LoraSegments.from_arrays(pair_rows, pair_scales, slots, np.array([*bounds, total], np.int32), device)


def _uses(rows: Sequence[ScheduledRow]) -> list[tuple[str, int, int, int, float]]:
    """(version, slot, first token, number of tokens, scale) of each slot of a row, once, unless the scale is 0."""
    uses: list[tuple[str, int, int, int, float]] = []
    at = 0
    for row in rows:
        request, count = row.request, row.count
        adapters, slots = request.adapters, request.slots
        if (adapters or slots) and request.merged is None:
            if len(adapters) != len(slots):
                raise ValueError(f"request {request.request_id} names {len(adapters)} adapters, but has slots {slots}")
            if len(set(slots)) == len(slots):
                for slot, use in zip(slots, adapters, strict=True):
                    if use.scale != 0.0:
                        uses.append((use.ref.version, slot, at, count, use.scale))
            else:
                scales: dict[tuple[str, int], float] = {}
                for slot, use in zip(slots, adapters, strict=True):
                    scales[use.ref.version, slot] = scales.get((use.ref.version, slot), 0.0) + use.scale
                uses.extend((*key, at, count, scale) for key, scale in scales.items() if scale != 0.0)
        at += count
    return uses
