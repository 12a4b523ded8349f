"""Decode steps in static memory: one captured CUDA graph for each number of rows, with adapters and without.

A step writes its token ids, positions, contexts, page tables and adapter lists into buffers that never move, and
replays the graph of the smallest bucket that holds its rows. Rows beyond the step's are padding: no context, no page,
no adapter. A graph reads lists of any length from the buffers (``kernels.lora_routing``), so none can be too small
for a step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from manylora.kernels.lora_routing import StaticRouting
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.ops import PagedSequences
from manylora.server.engine.request import ScheduledRow
from manylora.server.model.decoder import Decoder
from manylora.server.model.forward_batch import ForwardBatch
from manylora.server.model.kv_cache import KVCache

logger = logging.getLogger(__name__)

BUCKETS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of rows that graphs are captured for. Padding a step costs little: tiles are of 16 rows or more anyway."""


LEVELS: Final = 2
"""Adapters that a row of a graph may have. Each further one makes all steps launch more blocks that find nothing to do,
and a step with a row of more adapters is only computed without a graph, one kernel launched after the other."""


class Graph(Protocol):
    """A step that can be run again; ``output`` is where it leaves its result."""

    output: torch.Tensor

    def replay(self) -> None: ...


class CudaGraph:
    """``compute`` captured. It must be run once before (compilation, scratch memory), and allocates from ``pool``."""

    def __init__(self, compute: Callable[[], torch.Tensor], pool: Any) -> None:
        compute()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may take memory meanwhile: adapters are loaded, weights are merged.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.output = compute()

    def replay(self) -> None:
        self._graph.replay()

    def pool(self) -> Any:
        """For other graphs that are never replayed while this one's output is needed."""
        return self._graph.pool()


class EagerGraph:
    """``compute`` run anew at each replay: what a graph does, where there is none."""

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        self._compute = compute
        self.output = compute()

    def replay(self) -> None:
        self._compute()


@dataclass(frozen=True)
class _Inputs:
    """A step's numbers in one buffer, so that they go over in one copy: int32, the ids as pairs of them."""

    block: torch.Tensor
    token_ids: torch.Tensor
    positions: torch.Tensor
    contexts: torch.Tensor

    @classmethod
    def on(cls, device: torch.device, rows: int, *, pinned: bool) -> _Inputs:
        rows = -(-rows // 4) * 4  # so that each part begins at a multiple of 16 bytes, whatever the number of rows
        block = torch.zeros(4 * rows, dtype=torch.int32, device=device, pin_memory=pinned)
        return cls(block, block[: 2 * rows].view(torch.int64), block[2 * rows : 3 * rows], block[3 * rows :])


class DecodeGraphs:
    """Steps of at most ``max_rows`` rows with one new token each. For the step loop's thread.

    ``capture`` off (or no CUDA device): the same steps without graphs.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, *, max_rows: int, max_context: int, capture: bool = True
    ) -> None:
        self._decoder, self._cache = decoder, cache
        self._device = decoder.ops.device
        on_cuda = self._device.type == "cuda"
        self._captures = capture and on_cuda
        self.buckets = (*(b for b in BUCKETS if b < max_rows), min(max_rows, BUCKETS[-1]))
        rows = self.buckets[-1]
        self._here = _Inputs.on(self._device, rows, pinned=False)
        self._host = _Inputs.on(torch.device("cpu"), rows, pinned=on_cuda)
        width = KVCache.pages_for(max_context)
        self._tables = torch.zeros(rows, width, dtype=torch.int32, device=self._device)
        self._host_tables = torch.zeros(rows, width, dtype=torch.int32, pin_memory=on_cuda)
        self._in_table: list[list[int]] = [[] for _ in range(rows)]
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=self._device)
        self._logits = torch.zeros(rows, decoder.spec.vocab_size, dtype=torch.float32, device=self._device)
        self._routing = self._make_routing(rows)
        self._graphs: dict[tuple[int, bool], Graph] = {}
        self._pool: Any = None

    def _make_routing(self, rows: int) -> StaticRouting | None:
        lora = self._decoder.lora
        if lora is None or lora.implementation != "triton":
            return None
        from manylora.kernels.cuda.lora_op import ROWS  # triton, which a CPU need not have

        return StaticRouting(lora.pool, max_rows=rows, rows_per_block=ROWS, levels=LEVELS)

    def beside(self, decoder: Decoder) -> DecodeGraphs:
        """The same steps for another decoder, without adapters: graphs of its own, in the same buffers."""
        other = copy(self)
        other._decoder, other._routing, other._graphs = decoder, None, {}
        return other

    def takes(self, rows: Sequence[ScheduledRow], segments: LoraSegments | None) -> bool:
        """Whether a step of these rows can be run here."""
        if not rows or len(rows) > self.buckets[-1] or any(row.count != 1 for row in rows):
            return False
        if segments is None:
            return True
        lora = self._decoder.lora
        if self._routing is None or lora is None or lora.touches("embed", segments):
            return False
        return self._routing.fits(segments)

    def warm_up(self) -> None:
        """Capture all graphs, the largest first (the others fit into its memory); compiles what they need."""
        began = time.monotonic()
        variants = [(rows, adapters) for rows in reversed(self.buckets) for adapters in self._variants]
        for i, (rows, adapters) in enumerate(variants):
            logger.debug("decode graph %d of %d: %d rows%s", i + 1, len(variants), rows, ", adapters" * adapters)
            self._graph(rows, adapters)
        logger.info("%d decode graphs ready in %.1f s", len(variants), time.monotonic() - began)

    @property
    def _variants(self) -> tuple[bool, ...]:
        return (False,) if self._routing is None else (True, False)

    @torch.inference_mode()
    def capture(self, rows: int) -> None:
        """Capture one of ``buckets`` without adapters, between steps: so that no step has to wait for it."""
        # The buffers hold the last step's rows, whose keys and values must not be computed again by other weights.
        self._fill([], rows)
        self._graph(rows, adapters=False)

    def run(self, rows: Sequence[ScheduledRow], segments: LoraSegments | None) -> torch.Tensor:
        """Logits fp32 ``[rows, vocab]`` of a step that ``takes`` accepts; valid until the next one."""
        bucket = next(b for b in self.buckets if len(rows) <= b)
        self._fill(rows, bucket)
        if segments is not None and self._routing is not None:
            self._routing.fill(segments)
        graph = self._graph(bucket, segments is not None)
        graph.replay()
        return graph.output[: len(rows)]

    def replay(self, rows: int, *, adapters: bool) -> None:
        """Compute the step that the buffers hold once more (benchmarks); ``rows``: one of ``buckets``."""
        self._graph(rows, adapters).replay()

    def _fill(self, rows: Sequence[ScheduledRow], bucket: int) -> None:
        host, count = self._host, len(rows)
        host.token_ids[:count] = torch.tensor([row.token_at(row.start) for row in rows])
        positions = torch.tensor([row.start for row in rows], dtype=torch.int32)
        host.positions[:count] = positions
        host.contexts[:count] = positions + 1
        host.token_ids[count:bucket] = 0
        host.positions[count:bucket] = 0
        host.contexts[count:bucket] = 0
        # The last step's copies out of pinned memory are done: it ended with a synchronisation.
        self._here.block.copy_(host.block, non_blocking=True)
        for i, row in enumerate(rows):
            pages = row.request.pages
            if self._in_table[i] != pages:  # changes with every 16th token of a row, and with the batch
                self._in_table[i] = list(pages)
                self._host_tables[i, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
                self._tables[i, : len(pages)].copy_(self._host_tables[i, : len(pages)], non_blocking=True)

    def _graph(self, rows: int, adapters: bool) -> Graph:
        graph = self._graphs.get((rows, adapters))
        if graph is None:
            graph = self._graphs[rows, adapters] = self._capture(rows, adapters)
        return graph

    def _capture(self, rows: int, adapters: bool) -> Graph:
        def compute() -> torch.Tensor:
            # A new object each time: the operations remember what they derived from the last one they saw, and what is
            # captured must derive it itself.
            sequences = PagedSequences(
                self._starts[: rows + 1],
                self._here.contexts[:rows],
                self._tables[:rows],
                self._here.positions[:rows],
                tuple(range(rows + 1)),
            )
            batch = ForwardBatch(
                token_ids=self._here.token_ids[:rows],
                sequences=sequences,
                sample_rows=None,
                lora=None,
                routed=self._routing.routing if adapters and self._routing is not None else None,
            )
            # Into one place for all graphs: each would keep its own otherwise.
            return self._logits[:rows].copy_(self._decoder.forward(batch, self._cache))

        if not self._captures:
            return EagerGraph(compute)
        graph = CudaGraph(compute, self._pool)
        self._pool = graph.pool()
        return graph
