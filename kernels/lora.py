"""Batched multi-adapter LoRA, the public op: each row of a batch gets what its own adapters add.

Semantics, for a site of projections p with outputs side by side, over pairs (row, slot, c)::

    y[row, p] += c * scaling[p][slot, layer] * (x[row] @ A_p[slot, layer]) @ B_p[slot, layer]
    y[row]    += c * ((gain[slot, layer] - 1) * base[row] + bias[slot, layer])

in place, accumulated in fp32; ``base`` is the layer's product without bias and residual. A row without a pair (a base
row) is not touched; a row may have several pairs; ranks may differ between slots and projections, each costing its own
pages; gain and bias cost only the rows whose adapters have some. Pairs come sorted by slot, as segments.
``kernels.lora_step`` says what rows of tables do that an adapter replaces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.lora_step import StepAdapters, VectorRows, add_vectors_, embed_adapters_, replace_logits_
from manylora.kernels.lora_tables import DeviceTable
from manylora.kernels.reference import pool_matrices
from manylora.kernels.sites import PROJECTIONS, SITES

Implementation = Literal["auto", "cpu", "triton", "torch"]


class Routed(Protocol):
    """A step's adapters in the form that an implementation works with."""

    @property
    def step(self) -> StepAdapters | None:
        """None where the contents change under a captured graph; see ``lora_routing.StaticRouting``."""

    def vector_rows(self, site: str, layer: int) -> VectorRows | None:
        """The rows whose product ``add_`` has to be given there, because it has more to add than pairs."""


class Kernel(Protocol):
    """An implementation of the op."""

    def route(self, segments: LoraSegments, n_rows: int) -> Routed:
        """What the others take for a step's segments over ``n_rows`` rows: made once, used at every site."""

    def add_(self, y: torch.Tensor, x: torch.Tensor, adapters: Any, site: str, layer: int) -> None:
        """The low-rank pairs alone."""

    def add_vectors_(self, y: torch.Tensor, base: torch.Tensor, vectors: VectorRows, site: str, layer: int) -> None:
        """Gains and biases alone; ``base`` ``[R, N]``: the products of the rows that ``vectors`` names."""

    def table_product(self, x: torch.Tensor, table: DeviceTable) -> torch.Tensor:
        """``x @ rows.T``, fp32 ``[rows of x, >= table.count]``."""

    def flush(self) -> None:
        """Run what is queued, so that torch may look at it."""


class TorchLora:
    """Segment by segment in torch: any shape, dtype and device; slow with many adapters."""

    def __init__(self, pool: LoraPool) -> None:
        self._pool = pool

    def route(self, segments: LoraSegments, n_rows: int) -> StepAdapters:
        return StepAdapters(segments, self._pool)

    def add_(self, y: torch.Tensor, x: torch.Tensor, adapters: StepAdapters, site: str, layer: int) -> None:
        segments = adapters.segments
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

    def add_vectors_(self, y: torch.Tensor, base: torch.Tensor, vectors: VectorRows, site: str, layer: int) -> None:
        add_vectors_(y, base, vectors, self._pool.sites[site], layer)

    def table_product(self, x: torch.Tensor, table: DeviceTable) -> torch.Tensor:
        return x.float() @ table.plain().float().T

    def flush(self) -> None:
        pass


@dataclass(frozen=True)
class _Held:
    """What the slots of some segments held when the pool was at ``version``."""

    segments: LoraSegments
    version: int
    touched: frozenset[str]
    has_vectors: bool


class BatchedLora:
    """The op bound to one pool. ``implementation="auto"`` takes the fastest that fits the device and the shapes.

    ``queues``: the implementation runs through the CPU kernels' queue, so it may stand within ``Ops.together``.
    """

    def __init__(self, pool: LoraPool, implementation: Implementation = "auto") -> None:
        self.pool = pool
        self.implementation = _choose(pool) if implementation == "auto" else implementation
        self.kernel = _make(pool, self.implementation)
        self.queues = self.implementation == "cpu"
        self._last: _Held | None = None

    def route(self, segments: LoraSegments, n_rows: int) -> Routed:
        """A step's segments in the form that the implementation works with; ``add_`` takes either."""
        return self.kernel.route(segments, n_rows)

    def add_(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        adapters: LoraSegments | Routed,
        site: str,
        layer: int,
        base: torch.Tensor | None = None,
    ) -> None:
        """Add what the adapters have at ``site`` in ``layer`` to ``y`` ``[T, N]``, given its input ``x`` ``[T, K]``.

        ``adapters``: the step's `LoraSegments`, or what ``route`` made of them. ``base`` ``[R, N]``: the products,
        without bias and residual, of the rows that ``vector_rows`` names; not needed for ``lm_head``, whose y is just
        that. Raises ValueError if a shape or dtype is not the site's, or if ``base`` is missing; the message has both.
        """
        n = self.check(y, x, site)
        routed = self.route(adapters, x.shape[0]) if isinstance(adapters, LoraSegments) else adapters
        vectors = routed.vector_rows(site, layer)
        if vectors is not None and base is None and site == "lm_head":
            self.kernel.flush()
            base = y[vectors.rows]
        if site == "lm_head" and routed.step is not None and routed.step.has_tables(site):
            self.kernel.flush()
            replace_logits_(y, x, routed.step, self.kernel.table_product)
        if vectors is not None:
            if base is None or base.shape != (vectors.count, n):
                got = "nothing" if base is None else list(base.shape)
                raise ValueError(
                    f"gains and biases at `{site}` need the products of their {vectors.count} rows, without bias and "
                    f"residual, [{vectors.count}, {n}], got {got}"
                )
            self.kernel.add_vectors_(y, base, vectors, site, layer)
        self.kernel.add_(y, x, routed, site, layer)

    def check(self, y: torch.Tensor, x: torch.Tensor, site: str) -> int:
        """The site's width N. Raises ValueError if a shape or dtype is not the site's; the message has both."""
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
        return n

    def add_embedding_(self, y: torch.Tensor, token_ids: torch.Tensor, segments: LoraSegments) -> None:
        """The token embedding's part of the adapters; ids int64 ``[T]``, ``y`` ``[T, hidden]`` the base's rows::

        y[row] = own row of the token, if the adapter has one
        y[row] += c * (scale * A[token] B + (gain - 1) * base[row] + bias)
        """
        if self.touches("embed", segments):
            embed_adapters_(y, token_ids, StepAdapters(segments, self.pool), self.pool)

    def has_vectors(self, segments: LoraSegments) -> bool:
        """Whether any of the segments' adapters has gains or biases."""
        return self._held(segments).has_vectors

    def touches(self, projection: str, segments: LoraSegments) -> bool:
        """Whether any of the segments' adapters has anything for ``projection``, in any layer."""
        return projection in self._held(segments).touched

    def _held(self, segments: LoraSegments) -> _Held:
        """Kept for the segments that were asked about last: rows that decode have the same step after step."""
        held, version = self._last, self.pool.version
        if held is None or held.segments is not segments or held.version != version:
            contents = [self.pool.contents(slot) for slot in segments.slot_list]
            touched = frozenset(p for p in PROJECTIONS if any(slot.touches(p) for slot in contents))
            held = self._last = _Held(segments, version, touched, any(slot.vectors for slot in contents))
        return held


@dataclass(frozen=True)
class SiteAdapters:
    """A step's adapters at one site of one layer, for ``Ops.linear``."""

    lora: BatchedLora
    adapters: Any
    site: str
    layer: int

    def routed(self, n_rows: int) -> Any:
        """See ``BatchedLora.route``."""
        adapters = self.adapters
        return self.lora.route(adapters, n_rows) if isinstance(adapters, LoraSegments) else adapters

    def vector_rows(self) -> VectorRows | None:
        """The rows whose products ``add_`` needs as its ``base``; None if there are none."""
        adapters = self.adapters
        if isinstance(adapters, LoraSegments):
            adapters = StepAdapters(adapters, self.lora.pool)
        found: VectorRows | None = adapters.vector_rows(self.site, self.layer)
        return found

    def add_(self, y: torch.Tensor, x: torch.Tensor, base: torch.Tensor | None = None) -> None:
        """See ``BatchedLora.add_``."""
        self.lora.add_(y, x, self.adapters, self.site, self.layer, base)


def _choose(pool: LoraPool) -> Implementation:
    if pool.device.type == "cuda":
        return "triton"
    if pool.suits_cpu_kernels:
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
