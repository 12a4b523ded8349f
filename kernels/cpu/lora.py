"""Batched LoRA on the CPU: ``y[row] += scale * (x[row] A_slot) B_slot`` over segments of rows with the same slot.

Two kernels with the same arguments: the shrink fills ``h`` (shared out by segment, projection and page), the expand
adds to ``y`` (shared out by columns, or by segments if no row is in two: no two threads write one element). The order
of every sum is fixed: by page, then by segment.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit

from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.emit import float32_at, int32_at
from manylora.kernels.cpu.lora_tables import table_product
from manylora.kernels.cpu.lora_vectors import add_vectors
from manylora.kernels.cpu.threads import flush, launch
from manylora.kernels.cpu.tiles import (
    address_of,
    gemm_panel,
    gemm_rows,
    half_gemm_panel,
    half_gemm_rows,
    integer_gemm_panel,
    integer_gemm_rows,
    keep_alive,
    share,
)
from manylora.kernels.cpu.vectors import multiply_16, scale_16
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.lora_step import StepAdapters, VectorRows
from manylora.kernels.lora_tables import DeviceTable
from manylora.kernels.sites import RANK_PAGE, SITES

_HEADER = 15
_FIELDS = 13
"""Arguments before the projections', and for each projection."""
_FP32, _BF16, _INT16 = 0, 1, 2
_KINDS = {torch.float32: _FP32, torch.bfloat16: _BF16, torch.int16: _INT16}
"""What pages hold."""


@njit(nogil=True)
def _row_offsets(rows, n_pairs, stride):
    offsets = np.empty(n_pairs, np.int64)
    for i in range(n_pairs):
        offsets[i] = int32_at(rows, i) * stride
    return offsets


# Arguments: x, x_stride, y, y_stride, depth, n_pairs, rows, scales, n_segments, slots, offsets, h, h_width,
# n_projections, kind, then each projection's fields. h is [pairs, projections, h_width]; h_width is 16 times the most
# pages that a slot can have; kind is what a page's elements are: _FP32, _BF16 or _INT16. Which pages a part will read
# is listed first: a step reads some megabytes from places far apart, and each is fetched while the one before is used.
@kernel
def _shrink_kernel(arguments, part, parts):
    a = carray(arguments, _HEADER + 3 * _FIELDS)
    x, x_stride, depth, n_pairs, rows, scales = a[0], a[1], a[4], a[5], a[6], a[7]
    n_segments, slots, offsets, h, h_width, n_projections, kind = a[8], a[9], a[10], a[11], a[12], a[13], a[14]
    h_stride = n_projections * h_width * 4
    x_offsets, h_offsets = _row_offsets(rows, n_pairs, x_stride), np.arange(n_pairs) * h_stride
    xo, ho = address_of(x_offsets), address_of(h_offsets)

    panels = np.empty(n_segments * n_projections * (h_width // 16), np.int64)
    own = item = 0
    for s in range(n_segments):
        slot = int32_at(slots, s)
        for j in range(n_projections):
            p = _HEADER + _FIELDS * j
            for page in range((int32_at(a[p + 4], slot * a[p + 8]) + 15) // 16):
                if item % parts == part:
                    panels[own] = a[p] + int32_at(a[p + 6], slot * a[p + 7] + page) * a[p + 1]
                    own += 1
                item += 1

    at = item = 0
    for s in range(n_segments):
        slot, first, last = int32_at(slots, s), int32_at(offsets, s), int32_at(offsets, s + 1)
        count = last - first
        for j in range(n_projections):
            p = _HEADER + _FIELDS * j
            rank = int32_at(a[p + 4], slot * a[p + 8])
            factor = float32_at(a[p + 5], slot * a[p + 8])
            for page in range((rank + 15) // 16):
                if item % parts == part:
                    panel = panels[at]
                    ahead = panels[at + 1] - panel if at + 1 < own else 0
                    at += 1
                    target, xs, hs = h + 4 * (j * h_width + 16 * page), xo + 8 * first, ho + 8 * first
                    if kind == _BF16:
                        half_gemm_rows(count, x, xs, panel, 32, depth, target, hs, 0, ahead)
                    elif kind == _INT16:
                        integer_gemm_rows(count, x, xs, panel, 32, depth, target, hs, 0, ahead)
                    else:
                        gemm_rows(count, x, xs, panel, 64, depth, target, hs, 0, ahead)
                    for i in range(first, last):
                        scale_16(target + i * h_stride, factor * float32_at(scales, i))
                        if kind == _INT16:
                            index = int32_at(a[p + 6], slot * a[p + 7] + page)
                            multiply_16(target + i * h_stride, a[p + 11] + index * a[p + 12])
                item += 1
    keep_alive(x_offsets)
    keep_alive(h_offsets)


@njit(nogil=True, inline="always")
def _add_page(kind, count, tiles, source, so, panel, stride, width, target, to, ahead):
    if kind == _BF16:
        half_gemm_panel(count, tiles, source, so, panel, stride, width, target, to, 1, ahead)
    elif kind == _INT16:
        integer_gemm_panel(count, tiles, source, so, panel, stride, width, target, to, 1, ahead)
    else:
        gemm_panel(count, tiles, source, so, panel, stride, width, target, to, 1, ahead)


@njit(nogil=True)
def _largest(offsets, n_segments):
    """The most rows that a segment has."""
    most = 0
    for s in range(n_segments):
        most = max(most, int32_at(offsets, s + 1) - int32_at(offsets, s))
    return most


@njit(nogil=True)
def _no_row_twice(rows, n_pairs):
    """Whether no row has several adapters."""
    last = 0
    for i in range(n_pairs):
        last = max(last, int32_at(rows, i))
    seen = np.zeros(last + 1, np.bool_)
    for i in range(n_pairs):
        row = int32_at(rows, i)
        if seen[row]:
            return False
        seen[row] = True
    return True


# Of many adapters, each with few rows, a part takes some as a whole: memory brings whole pages faster than some columns
# of each (32 adapters: 0.73 of the time). Else, and where a row has several, it takes some columns of all.
@kernel
def _expand_kernel(arguments, part, parts):
    a = carray(arguments, _HEADER + 3 * _FIELDS)
    y, y_stride, n_pairs, rows = a[2], a[3], a[5], a[6]
    n_segments, slots, offsets, h, h_width, n_projections, kind = a[8], a[9], a[10], a[11], a[12], a[13], a[14]
    h_stride = n_projections * h_width * 4
    size = 4 if kind == _FP32 else 2
    y_offsets, h_offsets = _row_offsets(rows, n_pairs, y_stride), np.arange(n_pairs) * h_stride
    yo, ho = address_of(y_offsets), address_of(h_offsets)
    panels = np.empty(n_segments * (h_width // 16), np.int64)
    whole = n_segments >= 2 * parts and _largest(offsets, n_segments) <= 4 and _no_row_twice(rows, n_pairs)
    first_segment, last_segment = share(n_segments, part, parts, 1) if whole else (0, n_segments)
    for j in range(n_projections):
        p = _HEADER + _FIELDS * j
        tiles = a[p + 9] // 16
        first_tile, last_tile = (0, tiles) if whole else share(tiles, part, parts, 4)
        columns, before = y + 4 * (a[p + 10] + 16 * first_tile), 16 * size * first_tile
        found = 0
        for s in range(first_segment, last_segment):
            slot = int32_at(slots, s)
            for page in range((int32_at(a[p + 4], slot * a[p + 8]) + 15) // 16):
                panels[found] = a[p + 2] + int32_at(a[p + 6], slot * a[p + 7] + page) * a[p + 3] + before
                found += 1
        at = 0
        for s in range(first_segment, last_segment):
            slot, first, last = int32_at(slots, s), int32_at(offsets, s), int32_at(offsets, s + 1)
            rank = int32_at(a[p + 4], slot * a[p + 8])
            for page in range((rank + 15) // 16):
                panel = panels[at]
                ahead = panels[at + 1] - panel if at + 1 < found else 0
                at += 1
                source = h + 4 * (j * h_width + 16 * page)
                _add_page(
                    kind, last - first, last_tile - first_tile, source, ho + 8 * first, panel, size * a[p + 9],
                    min(16, rank - 16 * page), columns, yo + 8 * first, ahead,
                )  # fmt: skip
    keep_alive(y_offsets)
    keep_alive(h_offsets)


class CpuLora:
    """The batched op bound to one pool: what is constant is laid out once, not at each of a step's many calls."""

    def __init__(self, pool: LoraPool) -> None:
        self._pool = pool
        self._h_width = RANK_PAGE * pool.page_table["q"].shape[1]
        self._h = torch.empty(0)
        self._fields = {
            (site, layer): self._site(site, layer)
            for site in SITES
            for layer in range(pool.shapes.layers_of(SITES[site][0]))
        }

    def _site(self, site: str, layer: int) -> tuple[int, ...]:
        pool, fields, size = self._pool, [], self._pool.page_dtype.itemsize
        offsets = pool.shapes.site_offsets(site)
        for projection, offset in zip(SITES[site], offsets, strict=False):
            a, b, table = pool.a[projection], pool.b[projection], pool.page_table[projection]
            ranks, scaling = pool.ranks[projection], pool.scaling[projection]
            fields += [
                a.data_ptr() + layer * a.stride(1) * size,
                a.stride(0) * size,
                b.data_ptr() + layer * b.stride(1) * size,
                b.stride(0) * size,
                ranks.data_ptr() + layer * 4,
                scaling.data_ptr() + layer * 4,
                table.data_ptr(),
                table.stride(0),
                ranks.stride(0),
                b.shape[3],
                offset,
                *self._scales(projection, layer),
            ]
        return tuple(fields)

    def _scales(self, projection: str, layer: int) -> tuple[int, int]:
        """Address and stride from page to page of a layer's scales; of pages without, nothing that is read."""
        scales = self._pool.page_scales.get(projection)
        return (0, 0) if scales is None else (scales[:, layer].data_ptr(), scales.stride(0) * 4)

    def route(self, segments: LoraSegments, n_rows: int) -> StepAdapters:
        return StepAdapters(segments, self._pool)

    def add_(self, y: torch.Tensor, x: torch.Tensor, adapters: StepAdapters, site: str, layer: int) -> None:
        """Add the pairs of a site to ``y`` fp32 in place; see ``kernels.lora.Kernel``."""
        segments = adapters.segments
        n_pairs, projections = segments.rows.numel(), len(SITES[site])
        if self._h.numel() < n_pairs * 3 * self._h_width:
            self._h = torch.empty(n_pairs * 3 * self._h_width, dtype=torch.float32)
        launch(
            _shrink_kernel, x.data_ptr(), x.stride(0) * 4, y.data_ptr(), y.stride(0) * 4, x.shape[1], n_pairs,
            segments.rows.data_ptr(), segments.scales.data_ptr(), len(segments.slot_list), segments.slots.data_ptr(),
            segments.offsets.data_ptr(),
            self._h.data_ptr(), self._h_width, projections, _KINDS[self._pool.page_dtype], *self._fields[site, layer],
            then=_expand_kernel, keep=(x, y, segments.rows, segments.scales, segments.slots, segments.offsets, self._h),
        )  # fmt: skip

    def add_vectors_(self, y: torch.Tensor, base: torch.Tensor, vectors: VectorRows, site: str, layer: int) -> None:
        add_vectors(y, base, vectors, self._pool.sites[site], layer)

    def table_product(self, x: torch.Tensor, table: DeviceTable) -> torch.Tensor:
        return table_product(x, table)

    def flush(self) -> None:
        flush()
