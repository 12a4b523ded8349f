"""Batched multi-adapter LoRA, the public op: each row of a batch gets the deltas of its own adapters.

Semantics, for a site of projections p with outputs side by side, over pairs (row, slot, scale)::

    y[row, p] += scale * scaling[p][slot, layer] * (x[row] @ A_p[slot, layer]) @ B_p[slot, layer]

in place, accumulated in fp32. A row without a pair (a base row) is not touched; a row may have several pairs; ranks may
differ between slots and projections, each costing its own pages. Pairs come sorted by slot, as segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from manylora.kernels.cpu import available as cpu_kernels_available
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.reference import pool_matrices
from manylora.kernels.sites import GLOBAL_PROJECTIONS, SITES

Implementation = Literal["auto", "cpu", "triton", "torch"]


class Kernel(Protocol):
    """An implementation of the op."""

    def route(self, segments: LoraSegments, n_rows: int) -> Any:
        """What ``add_`` takes for a step's segments over ``n_rows`` rows: made once, used at every site."""

    def add_(self, y: torch.Tensor, x: torch.Tensor, adapters: Any, site: str, layer: int) -> None: ...


class TorchLora:
    """Segment by segment in torch: any shape, dtype and device; slow with many adapters."""

    def __init__(self, pool: LoraPool) -> None:
        self._pool = pool

    def route(self, segments: LoraSegments, n_rows: int) -> LoraSegments:
        return segments

    def add_(self, y: torch.Tensor, x: torch.Tensor, segments: LoraSegments, site: str, layer: int) -> None:
        bounds = segments.host_offsets.tolist()
        columns = self._pool.shapes.site_offsets(site)
        for s, slot in enumerate(segments.slot_list):
            members = segments.rows[bounds[s] : bounds[s + 1]].long()
            inputs = x[members].float()
            factors = segments.scales[bounds[s] : bounds[s + 1], None]
            for j, projection in enumerate(SITES[site]):
                matrices = pool_matrices(self._pool, projection, slot, layer)
                if matrices is None:
                    continue
                a, b, scaling = matrices
                delta = ((inputs @ a.float()) * (factors * scaling)) @ b.float()
                y[members, columns[j] : columns[j + 1]] += delta.to(y.dtype)


class BatchedLora:
    """The op bound to one pool. ``implementation="auto"`` takes the fastest that fits the device and the shapes.

    ``queues``: the implementation runs through the CPU kernels' queue, so it may stand within ``Ops.together``.
    """

    def __init__(self, pool: LoraPool, implementation: Implementation = "auto") -> None:
        self.pool = pool
        self.implementation = _choose(pool) if implementation == "auto" else implementation
        self.kernel = _make(pool, self.implementation)
        self.queues = self.implementation == "cpu"
        self._with_global: dict[str, frozenset[int]] = {}
        self._seen_version = -1

    def route(self, segments: LoraSegments, n_rows: int) -> Any:
        """A step's segments in the form that the implementation works with; ``add_`` takes either."""
        return self.kernel.route(segments, n_rows)

    def add_(self, y: torch.Tensor, x: torch.Tensor, adapters: Any, site: str, layer: int) -> None:
        """Add the deltas of ``site`` in ``layer`` to ``y`` ``[T, N]``, given its input ``x`` ``[T, K]``.

        ``adapters``: the step's `LoraSegments`, or what ``route`` made of them. Raises ValueError if a shape or dtype
        is not the site's; the message has both.
        """
        shapes = self.pool.shapes
        k, n = shapes.in_features[SITES[site][0]], shapes.site_offsets(site)[-1]
        if x.dim() != 2 or y.dim() != 2 or x.shape != (y.shape[0], k) or y.shape[1] != n:
            raise ValueError(
                f"site `{site}` maps x [T, {k}] to y [T, {n}], got x {list(x.shape)} and y {list(y.shape)}"
            )
        if x.stride(1) != 1 or y.stride(1) != 1:
            raise ValueError("x and y need contiguous rows")
        if self.implementation == "cpu" and (x.dtype != torch.float32 or y.dtype != torch.float32):
            raise ValueError(f"the CPU op computes in float32, got x {x.dtype} and y {y.dtype}")
        self.kernel.add_(y, x, adapters, site, layer)

    def add_embedding_(self, y: torch.Tensor, token_ids: torch.Tensor, segments: LoraSegments) -> None:
        """Add the token embedding's deltas: ``y[row] += scale * A[token] B``; ids int64 ``[T]``, y ``[T, hidden]``.

        A one-hot input makes the shrink a gather, so this is torch on every device.
        """
        if not self.touches("embed", segments):
            return
        bounds = segments.host_offsets.tolist()
        for s, slot in enumerate(segments.slot_list):
            matrices = pool_matrices(self.pool, "embed", slot, 0)
            if matrices is None:
                continue
            a, b, scaling = matrices
            members = segments.rows[bounds[s] : bounds[s + 1]].long()
            factors = segments.scales[bounds[s] : bounds[s + 1], None] * scaling
            # One product per row: a row's result must not depend on how many rows its segment has.
            hidden = a[token_ids[members]].float() * factors
            y[members] += (hidden[:, :, None] * b.float()[None]).sum(1).to(y.dtype)

    def touches(self, projection: str, segments: LoraSegments) -> bool:
        """Whether any of the segments' adapters has a delta on ``projection``, one of the global ones."""
        if self._seen_version != self.pool.version:
            # Read before the tables: a write that ends in between is seen at the next step, before its slot is used.
            self._seen_version = self.pool.version
            self._with_global = {
                p: frozenset(self.pool.ranks[p].any(dim=1).nonzero().flatten().tolist()) for p in GLOBAL_PROJECTIONS
            }
        return not self._with_global[projection].isdisjoint(segments.slot_list)


@dataclass(frozen=True)
class SiteAdapters:
    """A step's adapters at one site of one layer, for ``Ops.linear``."""

    lora: BatchedLora
    adapters: Any
    site: str
    layer: int

    def add_(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """See ``BatchedLora.add_``."""
        self.lora.add_(y, x, self.adapters, self.site, self.layer)


def _choose(pool: LoraPool) -> Implementation:
    if pool.device.type == "cuda":
        return "triton"
    aligned = all(n % 16 == 0 for p, n in pool.shapes.out_features.items() if p != "embed")
    if cpu_kernels_available() and pool.dtype == torch.float32 and aligned:
        return "cpu"
    return "torch"


def _make(pool: LoraPool, implementation: Implementation) -> Kernel:
    # Imported here: numba and triton are there on some machines only.
    if implementation == "cpu":
        from manylora.kernels.cpu.lora import CpuLora

        return CpuLora(pool)
    if implementation == "triton":
        from manylora.kernels.cuda.lora_op import TritonLora

        return TritonLora(pool)
    return TorchLora(pool)
