"""A step's plan as tensors: token ids, positions, page tables, adapter segments. Built on the CPU, once a step."""

from __future__ import annotations

import numpy as np
import torch

from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.ops import PagedSequences
from manylora.server.engine.request import StepPlan
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
    scales = np.empty(tokens, np.float32)
    sampled: list[int] = []
    slots: list[int] = []
    bounds: list[int] = []
    at = first_adapter_token = 0
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
        if request.slot is None:
            first_adapter_token = at + row.count
        else:
            if not slots or slots[-1] != request.slot:
                slots.append(request.slot)
                bounds.append(at)
            scales[at : at + row.count] = request.adapter_scale
        at += row.count
        starts[i + 1] = at
        if row.sample:
            sampled.append(at - 1)

    def there(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    segments = None
    if slots:
        if bounds[0] != first_adapter_token or slots != sorted(set(slots)):
            raise ValueError(f"the plan's rows are not sorted by slot: {[row.request.slot for row in rows]}")
        offsets = np.array([*bounds, tokens], np.int32) - first_adapter_token
        segments = LoraSegments(
            rows=there(np.arange(first_adapter_token, tokens, dtype=np.int32)),
            scales=there(scales[first_adapter_token:]),
            slots=there(np.array(slots, np.int32)),
            offsets=there(offsets),
            slot_list=tuple(slots),
        )
    return ForwardBatch(
        token_ids=there(ids),
        sequences=PagedSequences(there(starts), there(contexts), there(tables), there(positions)),
        sample_rows=there(np.array(sampled, np.int64)),
        lora=segments,
    )
