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
    """The tensors of a plan with at least one row. Rows are sorted by slot, so each adapter's tokens are one run."""
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
        if row.count == 1:
            ids[at] = request.token_at(row.start)
            positions[at] = row.start
        else:
            ids[at : at + row.count] = [request.token_at(position) for position in range(row.start, last)]
            positions[at : at + row.count] = np.arange(row.start, last)
        contexts[i] = last
        pages = request.pages[: KVCache.pages_for(last)]
        tables[i, : len(pages)] = pages
        at += row.count
        starts[i + 1] = at
        if row.sample:
            sampled.append(at - 1)

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
    """The adapters of these rows' tokens, which lie one behind the other; None if every row is a base row.

    ValueError if the rows are not sorted by slot, base rows first.
    """
    slots: list[int] = []
    bounds: list[int] = []
    scales: list[float] = []
    counts: list[int] = []
    at = first = 0
    for row in rows:
        slot = row.request.slot
        if slot is None:
            first = at + row.count
        else:
            if not slots or slots[-1] != slot:
                slots.append(slot)
                bounds.append(at)
            scales.append(row.request.adapter_scale)
            counts.append(row.count)
        at += row.count
    if not slots:
        return None
    if bounds[0] != first or slots != sorted(set(slots)):
        raise ValueError(f"the plan's rows are not sorted by slot: {[row.request.slot for row in rows]}")
    return LoraSegments.from_arrays(
        np.arange(first, at, dtype=np.int32),
        np.repeat(np.array(scales, np.float32), counts),
        slots,
        np.array([*bounds, at], np.int32) - np.int32(first),
        device,
    )
