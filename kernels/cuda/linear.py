"""A fused site's linear layer on CUDA: which kernel runs, with which configuration, on what memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from manylora.kernels.cuda.configs import Configs, TileConfig
from manylora.kernels.cuda.lora_op import BK, ROWS, SHARE, TritonLora
from manylora.kernels.cuda.nf4_linear import dequantize_kernel, nf4_linear_kernel
from manylora.kernels.cuda.nf4_words import Nf4Words
from manylora.kernels.cuda.scratch import Scratch
from manylora.kernels.lora_routing import LoraRouting

DEQUANTIZE_BN = 64


@dataclass(frozen=True)
class LinearAdapters:
    """The adapters of a step at one site of one layer. ``done``: an int32 of this launch's own, zero before it."""

    op: TritonLora
    routing: LoraRouting
    site: str
    layer: int
    done: torch.Tensor


def is_capped(*, even: bool, splits: int, vectors: bool) -> bool:
    """Whether a tile's ``max_registers`` is for a variant of the kernel: the others need more, and would spill."""
    return even and splits > 1 and not vectors


class LinearKernels:
    """Launches for one device and type; ``scratch`` is shared with the LoRA kernels of the same stream."""

    def __init__(self, configs: Configs, scratch: Scratch, *, fast: bool, wide: bool) -> None:
        self.configs, self._scratch, self._fast, self._wide = configs, scratch, fast, wide

    def fused(
        self,
        x: torch.Tensor,
        weight: Nf4Words,
        bias: torch.Tensor | None,
        add_to: torch.Tensor | None,
        adapters: LinearAdapters | None,
        *,
        out: torch.Tensor | None = None,
        tile: TileConfig | None = None,
        splits: int | None = None,
    ) -> torch.Tensor:
        """``x @ W.T`` plus bias, adapters and ``add_to`` (then written there), in one launch.

        ``x`` ``[M, K]``; ``out`` where to write it else; ``tile`` and ``splits`` override the configuration (tuning).
        ValueError for shapes that do not fit.
        """
        (n, k), m = weight.shape, x.shape[0]
        if x.dim() != 2 or x.shape[1] != k or x.stride(1) != 1 or x.dtype != weight.dtype:
            raise ValueError(f"W [{n}, {k}] takes {weight.dtype} rows [M, {k}], got {x.dtype} {list(x.shape)}")
        y = add_to if add_to is not None else out
        if y is None:
            y = torch.empty(m, n, dtype=x.dtype, device=x.device)
        elif y.shape != (m, n) or y.stride(1) != 1:
            raise ValueError(f"the output of {m} rows must be [{m}, {n}], got {list(y.shape)}")
        tile = self.configs.tile(m) if tile is None else tile
        splits = self.configs.splits_of(n, k) if splits is None else splits
        n_tiles, m_tiles = triton.cdiv(n, tile.bn), triton.cdiv(m, tile.bm)
        planes = self._scratch.empty(
            "planes", n_tiles * m_tiles * splits * tile.bn * tile.bm if splits > 1 else 1, torch.float32
        )
        tickets = self._scratch.zeros("tickets", n_tiles * m_tiles)
        launch: dict[str, Any] = dict(
            BM=tile.bm, BN=tile.bn, NB=tile.nb, SPLITS=splits, EVEN=k % (64 * tile.nb) == 0, NESTED=weight.nested,
            BIAS=bias is not None, ADD=add_to is not None, ROWS=ROWS, SHARE=SHARE, BK=BK,
            FAST=self._fast, WIDE=self._wide, num_warps=tile.num_warps, num_stages=tile.num_stages if self._fast else 1,
        )  # fmt: skip
        of_weight = (weight.words, weight.scales, weight.code, weight.outer, weight.first, weight.offset, weight.values)
        grid = n_tiles * m_tiles * splits
        if is_capped(even=launch["EVEN"], splits=splits, vectors=adapters is not None and adapters.op.pool.vectors):
            launch["maxnreg"] = tile.max_registers  # None: up to the compiler
        if adapters is None:
            # Pointers and sizes that this variant never looks at.
            nothing = (y,) * 14
            nf4_linear_kernel[(grid,)](
                y, x, *of_weight, y if bias is None else bias, y, planes, tickets, *nothing,
                m, n, k, x.stride(0), y.stride(0), y.stride(0), 0, 0, n, n, 0, 0, 0, 0,
                LORA=False, WORKERS=0, SLOT_PAGES=1, VECTORS=False, **launch,
            )  # fmt: skip
            return y
        op, routing = adapters.op, adapters.routing
        pool, store = op.pool, op.pool.sites[adapters.site]
        partial, entry_tickets, h = op.buffers(routing, k)
        column_1, column_2 = (*store.columns[1:-1], n, n)[:2]
        nf4_linear_kernel[(op.workers + grid,)](
            y, x, *of_weight, y if bias is None else bias, y, planes, tickets,
            store.a, store.b, store.scaling, store.gain, store.bias,
            routing.places, routing.slot_at, routing.scale_at, routing.lists, routing.counts[adapters.site],
            partial, entry_tickets, h, adapters.done,
            m, n, k, x.stride(0), y.stride(0), y.stride(0), op.stride_h, routing.stride_level, column_1, column_2,
            adapters.layer, store.ranks.shape[2], pool.max_slots, pool.max_pages,
            LORA=True, WORKERS=op.workers, SLOT_PAGES=pool.pages_per_slot, VECTORS=pool.vectors, **launch,
        )  # fmt: skip
        return y

    def dequantize(self, weight: Nf4Words, dtype: torch.dtype) -> torch.Tensor:
        """W ``[N, K]`` in scratch memory: valid until the next call."""
        n, k = weight.shape
        out = self._scratch.empty("dequantized", n * k, dtype)[: n * k].view(n, k)
        dequantize_kernel[(triton.cdiv(n, DEQUANTIZE_BN), k // 64)](
            out, weight.words, weight.scales, weight.code, weight.outer, weight.first, weight.offset, weight.values,
            n, k, BN=DEQUANTIZE_BN, NESTED=weight.nested, FAST=self._fast,
        )  # fmt: skip
        return out
