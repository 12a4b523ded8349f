"""A step's plan as tensors: token ids, positions, page tables, adapter segments. Built on the CPU, once a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.ops import PagedSequences
from manylora.server.engine.request import ScheduledRow, StepPlan
from manylora.server.model.forward_batch import ForwardBatch
from manylora.server.model.kv_cache import KVCache


def build_batch(plan: StepPlan, device: torch.device | str = "cpu") -> ForwardBatch:
    """The tensors of a plan with at least one row. See ``adapter_segments``. Of a row that samples, the logits of its
    last known token are asked for, and those of each of its drafts."""
    rows, tokens = plan.rows, plan.num_tokens
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
        token_at = row.token_at if row.drafts else request.token_at
        if row.count == 1:
            ids[at] = token_at(row.start)
            positions[at] = row.start
        else:
            ids[at : at + row.count] = [token_at(position) for position in range(row.start, last)]
            positions[at : at + row.count] = np.arange(row.start, last)
        contexts[i] = last
        pages = request.pages[: KVCache.pages_for(last)]
        tables[i, : len(pages)] = pages
        at += row.count
        starts[i + 1] = at
        sampled.extend(range(at - row.num_sampled, at))

    def there(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return ForwardBatch(
        token_ids=there(ids),
        sequences=PagedSequences(
            there(starts), there(contexts), there(tables), there(positions), tuple(starts.tolist())
        ),
        sample_rows=there(np.array(sampled, np.int64)),
        lora=adapter_segments(rows, device),
    )


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
