"""Whole decode steps of Llama-3.1-8B's shapes with random weights, as captured graphs, in ms beside their byte floor.

A step's floor is what it must read (NF4 linears, lm_head, each distinct adapter once, keys and values) at the card's
copy bandwidth. ``kernels.md``'s roofline table has the same arithmetic at 3.0 and 4.3 TB/s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from adapter_cases import adapter_bytes
from gpu_timing import Card, Timing

from manylora.adapters.versions import AdapterRef
from manylora.kernels.cuda.ops import CudaOps
from manylora.kernels.lora import BatchedLora
from manylora.kernels.lora_pool import LoraPool
from manylora.server.engine.batch import adapter_segments
from manylora.server.engine.decode_graphs import DecodeGraphs
from manylora.server.engine.request import AdapterUse, Request, SamplingParams, ScheduledRow
from manylora.server.model.decoder import Decoder
from manylora.server.model.decoder_weights import DecoderWeights
from manylora.server.model.families import ModelSpec
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.synthetic import synthetic_adapter, synthetic_base

RANK = 16


class DecodeSteps:
    """The model once; ``run`` measures it. ``context`` tokens are already in every row's pages."""

    def __init__(
        self, spec: ModelSpec, card: Card, device: torch.device, dtype: torch.dtype,
        *, max_rows: int = 32, context: int = 1024,
    ) -> None:  # fmt: skip
        self._spec, self._card, self._device, self._context = spec, card, device, context
        ops = CudaOps(device, dtype)
        self._pool = LoraPool(
            spec.lora_shapes(), max_slots=max_rows, max_pages=max_rows, max_rank=RANK, dtype=dtype, device=device
        )
        # Written from one random adapter: values do not matter to the time, distinct pages do.
        adapter = synthetic_adapter(spec.lora_shapes(), RANK, dtype=dtype)
        for slot in range(max_rows):
            self._pool.write(slot, adapter)
        weights = DecoderWeights.prepare(spec, synthetic_base(spec, device=device), ops, max_context=context + 16)
        self._decoder = Decoder(spec, weights, ops, BatchedLora(self._pool, "triton"))
        self._pages = KVCache.pages_for(context + 1)
        cache = KVCache(spec, max_rows * self._pages, ops)
        self._graphs = DecodeGraphs(self._decoder, cache, max_rows=max_rows, max_context=context + 16)
        shapes = spec.lora_shapes()
        self._adapter_bytes = adapter_bytes(shapes, RANK, dtype.itemsize)
        self._row_bytes = context * 2 * spec.kv_size * dtype.itemsize * spec.n_layers
        # A tied or separate embedding is only looked up, row by row: of the two tables lm_head alone is read whole.
        table = spec.vocab_size * spec.hidden_size * dtype.itemsize
        self._base_bytes = self._decoder.nbytes - (0 if spec.tie_embeddings else table)

    def run(self, m: int, distinct: Sequence[int]) -> list[dict[str, Any]]:
        """JSON lines for ``m`` rows with each of ``distinct`` numbers of adapters (0: the graph without any)."""
        lines: list[dict[str, Any]] = []
        for adapters in distinct:
            rows = [self._row(i, None if adapters == 0 else i * adapters // m) for i in range(m)]
            with torch.inference_mode():
                logits = self._graphs.run(rows, adapter_segments(rows, self._device))
            if not bool(torch.isfinite(logits).all()):
                raise AssertionError(f"decode step of {m} rows: logits are not finite")
            timing = Timing.of(self._replays(m, adapters=adapters > 0))
            read = self._base_bytes + adapters * self._adapter_bytes + m * self._row_bytes
            floor = read / (self._card.copy_gbps * 1e9)
            lines.append({
                "kind": "decode step", "m": m, "adapters": adapters, "rank": RANK, "context": self._context,
                "layers": self._spec.n_layers, "step_ms": round(timing.seconds * 1e3, 4),
                "spread": round(timing.spread, 3), "bytes": read, "floor_ms": round(floor * 1e3, 4),
                "of_floor": round(timing.seconds / floor, 3),
            })  # fmt: skip
        base = next((line["step_ms"] for line in lines if line["adapters"] == 0), None)
        for line in lines:
            if base is not None:
                line["overhead"] = round(line["step_ms"] / base - 1, 4)
        return lines

    @torch.inference_mode()
    def _replays(self, rows: int, *, adapters: bool, count: int = 40) -> list[float]:
        """Seconds of each of ``count`` replays, queued behind one another. A step reads far more than any cache
        holds."""
        on_cuda = self._device.type == "cuda"
        if not on_cuda:  # tests
            began = time.perf_counter()
            self._graphs.replay(rows, adapters=adapters)
            return [time.perf_counter() - began]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        for _ in range(3):
            self._graphs.replay(rows, adapters=adapters)
        for mark in marks:
            mark.record()
            if mark is not marks[-1]:
                self._graphs.replay(rows, adapters=adapters)
        torch.cuda.synchronize()
        return [first.elapsed_time(second) * 1e-3 for first, second in pairwise(marks)]

    def _row(self, i: int, slot: int | None) -> ScheduledRow:
        request = Request(f"row {i}", [i] * (self._context + 1), SamplingParams())
        if slot is not None:
            request.adapters, request.slots = (AdapterUse(AdapterRef(f"in slot {slot}", f"{slot:064x}")),), (slot,)
        request.pages = list(range(i * self._pages, (i + 1) * self._pages))
        return ScheduledRow(request, self._context, 1)
