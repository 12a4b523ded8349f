"""Launches of the two LoRA kernels by themselves: for prefill, where the base is a dense product, and for lm_head."""

from __future__ import annotations

import torch
import triton

from manylora.kernels.cuda.dense_linear import dense_linear
from manylora.kernels.cuda.lora import expand_kernel, shrink_kernel
from manylora.kernels.cuda.scratch import Scratch
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_routing import LoraRouting, route
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.lora_step import VectorRows, add_vectors_
from manylora.kernels.lora_tables import DeviceTable
from manylora.kernels.sites import RANK_PAGE, SITES

ROWS = 16
"""Pairs of a block of the shrink: the fewest that the matrix units take."""
SHARE = 512
"""Part of K that one program of the shrink multiplies."""
BK = 128
WORKERS = 128
"""Programs of the shrink: about as many as a data-centre GPU has processors."""
EXPAND_BM, EXPAND_BN = 16, 128


class TritonLora:
    """See ``kernels.lora.Kernel``; ``scratch`` may be shared with other users of the same stream."""

    def __init__(self, pool: LoraPool, scratch: Scratch | None = None) -> None:
        self.pool = pool
        self.scratch = Scratch(pool.device) if scratch is None else scratch
        # The interpreter's dot multiplies raw bit patterns of 16-bit types (kernels-lab); fp32 operands are exact.
        self.wide = pool.dtype == torch.float32
        # The interpreter runs programs one after the other: many would only cost time there.
        self.workers = WORKERS if pool.device.type == "cuda" else 3
        self.stride_h = max(map(len, SITES.values())) * pool.pages_per_slot * RANK_PAGE

    def route(self, segments: LoraSegments, n_rows: int) -> LoraRouting:
        """The work lists of a step, once for all of its sites."""
        return route(segments, self.pool, n_rows, rows_per_block=ROWS)

    def buffers(self, routing: LoraRouting, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the shrink needs for an input of width ``k``: fp32 planes, tickets, and h ``[places, stride_h]``."""
        shares = -(-k // SHARE)
        partial = self.scratch.empty("lora planes", routing.max_entries * shares * ROWS * RANK_PAGE, torch.float32)
        tickets = self.scratch.zeros("lora tickets", routing.max_entries)
        h = self.scratch.empty("lora h", routing.stride_level * routing.levels * self.stride_h, self.pool.dtype)
        return partial, tickets, h

    def add_(
        self, y: torch.Tensor, x: torch.Tensor, adapters: LoraSegments | LoraRouting, site: str, layer: int
    ) -> None:
        """See ``kernels.lora.Kernel``."""
        pool, store = self.pool, self.pool.sites[site]
        routing = adapters if isinstance(adapters, LoraRouting) else self.route(adapters, x.shape[0])
        (m, k), n = x.shape, store.columns[-1]
        n_layers = store.ranks.shape[2]
        partial, tickets, h = self.buffers(routing, k)
        shrink_kernel[(self.workers,)](
            x, store.a, store.scaling, routing.places, routing.scale_at, routing.lists, routing.counts[site],
            partial, tickets, h, x.stride(0), self.stride_h, routing.stride_level, k,
            layer, n_layers, pool.max_slots, pool.max_pages,
            WORKERS=self.workers, ROWS=ROWS, SLOT_PAGES=pool.pages_per_slot, SHARE=SHARE, BK=BK, WIDE=self.wide,
        )  # fmt: skip
        column_1, column_2 = (*store.columns[1:-1], n, n)[:2]
        grid = (triton.cdiv(n, EXPAND_BN), triton.cdiv(m, EXPAND_BM))
        expand_kernel[grid](
            y, h, store.b, routing.slot_at, routing.scale_at, routing.lists, routing.counts[site],
            y.stride(0), self.stride_h, routing.stride_level, m, n, column_1, column_2,
            layer, n_layers, pool.max_pages, BM=EXPAND_BM, BN=EXPAND_BN, WIDE=self.wide,
        )  # fmt: skip

    def add_vectors_(self, y: torch.Tensor, base: torch.Tensor, vectors: VectorRows, site: str, layer: int) -> None:
        """In torch: prompts, and heads; a decode step's other sites have them in the fused kernel."""
        add_vectors_(y, base, vectors, self.pool.sites[site], layer)

    def table_product(self, x: torch.Tensor, table: DeviceTable) -> torch.Tensor:
        # The product of the base's own head: a row's bits do not depend on the rows beside it.
        return dense_linear(x, table.plain(), wide=self.wide)

    def flush(self) -> None:
        pass
