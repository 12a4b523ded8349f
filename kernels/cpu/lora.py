"""Batched LoRA on the CPU: ``y[row] += scale * (x[row] A_slot) B_slot`` over segments of rows with the same slot.

Two kernels with the same arguments: the shrink fills ``h`` (shared out by segment, projection, page and rows), the
expand adds to ``y``. That is shared out by `regions`, as the product is that y holds, so that it can follow the product
part by part, while y is in the cache. The order of every sum is fixed: by page, then by segment.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit

from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.emit import float32_at, int32_at
from manylora.kernels.cpu.lora_inner import APART, FEW
from manylora.kernels.cpu.lora_kinds import (
    KINDS,
    add_apart,
    add_page,
    has_scales,
    multiply_apart,
    multiply_rows,
    multiply_two,
    tile_stride,
)
from manylora.kernels.cpu.lora_tables import table_product
from manylora.kernels.cpu.lora_vectors import add_vectors
from manylora.kernels.cpu.regions import items_of, next_region
from manylora.kernels.cpu.threads import Arguments, flush, launch, launch_again
from manylora.kernels.cpu.tiles import address_of, keep_alive, share
from manylora.kernels.cpu.vectors import multiply_16, scale_16
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.lora_step import StepAdapters, VectorRows
from manylora.kernels.lora_tables import DeviceTable
from manylora.kernels.sites import RANK_PAGE, SITES

_HEADER = 17
_FIELDS = 13
"""Arguments before the projections', and for each projection."""
_ALONE = 3
"""Rows of a segment at most that are multiplied each by itself, ``APART`` at a time, whoever's they are."""
_CHUNK = 32
"""Rows of a segment that are multiplied by one part at most."""
_FEW_FROM, _FEW_TO = (min(FEW), max(FEW)) if FEW else (1, 0)

# Arguments: x, x_stride, y, y_stride, depth, n_pairs, rows, scales, n_segments, slots, offsets, h, h_width,
# n_projections, kind, n_rows, groups, then each projection's fields. h is [pairs, projections, h_width]; h_width is 16
# times the most pages that a slot can have; kind is what a page's elements are, of ``KINDS``; n_rows are
# those of y, groups what they are cut into, see `regions`. Which pages a part will read is listed first: a step reads
# some megabytes from places far apart, and each is asked for before it is used.

_PAIR, _COUNT, _PROJECTION, _PLACE, _PAGE, _SLOT = range(6)
"""An item of the shrink: ``_COUNT`` pairs from ``_PAIR`` on, times page ``_PAGE``, which the slot has in ``_PLACE``."""


@njit(nogil=True)
def _list_items(a, part, parts, items):
    """How many items are this part's, and as many of them as there are columns of ``items`` int64 ``[6, most]``. Those
    of one row are dealt out ``APART`` at a time."""
    n_segments, slots, offsets, n_projections = a[8], a[9], a[10], a[13]
    own = unit = within = 0
    for s in range(n_segments):
        slot, first, last = int32_at(slots, s), int32_at(offsets, s), int32_at(offsets, s + 1)
        step = 1 if last - first <= _ALONE else _CHUNK
        for j in range(n_projections):
            p = _HEADER + _FIELDS * j
            for place in range((int32_at(a[p + 4], slot * a[p + 8]) + 15) // 16):
                for pair in range(first, last, step):
                    if step == 1 and within < APART:
                        within += 1
                    else:
                        unit, within = unit + 1, (1 if step == 1 else APART)
                    if unit % parts != part:
                        continue
                    if own < items.shape[1]:
                        items[_PAIR, own], items[_COUNT, own] = pair, min(step, last - pair)
                        items[_PROJECTION, own], items[_PLACE, own], items[_SLOT, own] = j, place, slot
                        items[_PAGE, own] = int32_at(a[p + 6], slot * a[p + 7] + place)
                    own += 1
    return own


@kernel
def _shrink_kernel(arguments, part, parts):
    a = carray(arguments, _HEADER + 3 * _FIELDS)
    x, x_stride, depth, rows, scales = a[0], a[1], a[4], a[6], a[7]
    h, h_width, n_projections, kind = a[11], a[12], a[13], a[14]
    h_stride = n_projections * h_width * 4
    items = np.empty((6, 64), np.int64)
    own = _list_items(a, part, parts, items)
    if own > items.shape[1]:
        items = np.empty((6, own), np.int64)
        _list_items(a, part, parts, items)
    if own == 0:
        return
    # Few arrays, as asking for one takes longer than filling it.
    lists, chunks = np.empty((3, own), np.int64), np.empty(6 * _CHUNK, np.int64)
    panels, sources, targets = lists[0], lists[1], lists[2]
    for i in range(own):
        p = _HEADER + _FIELDS * items[_PROJECTION, i]
        panels[i] = a[p] + items[_PAGE, i] * a[p + 1]
        sources[i] = x + int32_at(rows, items[_PAIR, i]) * x_stride
        place = items[_PROJECTION, i] * h_width + 16 * items[_PLACE, i]
        targets[i] = h + items[_PAIR, i] * h_stride + 4 * place
    x_offsets, h_offsets = chunks[:_CHUNK], chunks[_CHUNK : 2 * _CHUNK]
    few, few_targets = chunks[2 * _CHUNK : 4 * _CHUNK], chunks[4 * _CHUNK :]
    for r in range(_CHUNK):
        h_offsets[r] = r * h_stride
    i = 0
    while i < own:
        pair, count, run = items[_PAIR, i], items[_COUNT, i], 1
        if count == 1:
            while run < APART and i + run < own and items[_COUNT, i + run] == 1:
                run += 1
            at = 8 * i
            multiply_apart(
                kind, run, address_of(sources) + at, address_of(panels) + at, depth, address_of(targets) + at
            )  # fmt: skip
        elif _FEW_FROM <= count <= _FEW_TO and i + 1 < own and items[_COUNT, i + 1] == count:
            run = 2
            for k in range(2):
                for r in range(count):
                    few[k * count + r] = x + int32_at(rows, items[_PAIR, i + k] + r) * x_stride
                    few_targets[k * count + r] = targets[i + k] + r * h_stride
            multiply_two(
                kind, count, address_of(few), panels[i], panels[i + 1], depth, address_of(few_targets)
            )  # fmt: skip
        else:
            for r in range(count):
                x_offsets[r] = int32_at(rows, pair + r) * x_stride
            multiply_rows(
                kind, count, x, address_of(x_offsets), panels[i], depth, targets[i], address_of(h_offsets)
            )  # fmt: skip
        for k in range(i, i + run):
            p = _HEADER + _FIELDS * items[_PROJECTION, k]
            factor = float32_at(a[p + 5], items[_SLOT, k] * a[p + 8])
            for r in range(items[_COUNT, k]):
                target = targets[k] + r * h_stride
                scale_16(target, factor * float32_at(scales, items[_PAIR, k] + r))
                if has_scales(kind):
                    multiply_16(target, a[p + 11] + items[_PAGE, k] * a[p + 12])
        i += run
    keep_alive(lists)
    keep_alive(chunks)


@njit(nogil=True)
def _pairs_within(rows, offsets, n_segments, first_row, last_row, pairs):
    """Of each segment the first of its pairs of these rows, and the one behind the last, as ``pairs`` ``[S, 2]``."""
    for s in range(n_segments):
        first, last = int32_at(offsets, s), int32_at(offsets, s + 1)
        while first < last and int32_at(rows, first) < first_row:
            first += 1
        while last > first and int32_at(rows, last - 1) >= last_row:
            last -= 1
        pairs[s, 0], pairs[s, 1] = first, last


_FIRST, _ROWS, _WIDTH = range(3)
"""Of a page that the expand adds: its first pair, how many there are, and its ranks."""


@njit(nogil=True)
def _goes_with(shapes, targets, first, other):
    """Whether page ``other`` can be added at once with ``first`` and those between: it has one row, another than
    theirs, as sums are in order, and as many ranks."""
    does = shapes[_ROWS, other] == 1 and shapes[_WIDTH, other] == shapes[_WIDTH, first]
    for i in range(first, other):
        does = does and targets[i] != targets[other]
    return does


@kernel
def _expand_kernel(arguments, part, parts):
    a = carray(arguments, _HEADER + 3 * _FIELDS)
    y, y_stride, n_pairs, rows = a[2], a[3], a[5], a[6]
    n_segments, slots, offsets, h, h_width, n_projections, kind = a[8], a[9], a[10], a[11], a[12], a[13], a[14]
    depth, n_rows, groups = a[4], a[15], a[16]
    h_stride = n_projections * h_width * 4
    offsets_of = np.empty((2, n_pairs), np.int64)
    y_offsets, h_offsets = offsets_of[0], offsets_of[1]
    for i in range(n_pairs):
        y_offsets[i], h_offsets[i] = int32_at(rows, i) * y_stride, i * h_stride
    yo, ho = address_of(y_offsets), address_of(h_offsets)
    most = n_segments * (h_width // 16)
    lists = np.empty((6, most + APART), np.int64)
    pages, sources, targets, shapes = lists[0], lists[1], lists[2], lists[3:]
    pairs = np.empty((n_segments, 2), np.int64)
    end = _HEADER + _FIELDS * (n_projections - 1)
    tiles = (a[end + 10] + a[end + 9]) // 16
    item, last_item = share(items_of(groups, depth, tiles), part, parts, 1)
    while item < last_item:
        group, last_group, tile, last_tile, item = next_region(item, last_item, groups, depth, tiles)
        _pairs_within(rows, offsets, n_segments, n_rows * group // groups, n_rows * last_group // groups, pairs)
        for j in range(n_projections):
            p = _HEADER + _FIELDS * j
            begin, columns = a[p + 10] // 16, a[p + 9]
            first, last = max(tile, begin), min(last_tile, begin + columns // 16)
            if first >= last:
                continue
            within = (first - begin) * tile_stride(kind)
            found = 0
            for s in range(n_segments):
                if pairs[s, 0] == pairs[s, 1]:
                    continue
                slot = int32_at(slots, s)
                rank = int32_at(a[p + 4], slot * a[p + 8])
                for page in range((rank + 15) // 16):
                    pages[found] = a[p + 2] + int32_at(a[p + 6], slot * a[p + 7] + page) * a[p + 3] + within
                    sources[found] = h + 4 * (j * h_width + 16 * page) + h_offsets[pairs[s, 0]]
                    targets[found] = y + 64 * first + y_offsets[pairs[s, 0]]
                    shapes[_FIRST, found], shapes[_ROWS, found] = pairs[s, 0], pairs[s, 1] - pairs[s, 0]
                    shapes[_WIDTH, found] = min(16, rank - 16 * page)
                    found += 1
            for i in range(APART):  # asked for behind the last
                pages[found + i] = pages[max(found - 1, 0)]
            i = 0
            while i < found:
                count, width, at = shapes[_ROWS, i], shapes[_WIDTH, i], 8 * i
                run = 1
                while count == 1 and run < APART and i + run < found and _goes_with(shapes, targets, i, i + run):
                    run += 1
                if run > 2:
                    add_apart(
                        kind, run, last - first, address_of(sources) + at, address_of(pages) + at,
                        address_of(pages) + at + 8 * run, columns, width, address_of(targets) + at,
                    )  # fmt: skip
                else:  # several tiles at once are chains of FMAs enough
                    run, first_pair = 1, shapes[_FIRST, i]
                    add_page(
                        kind, count, last - first, sources[i] - h_offsets[first_pair], ho + 8 * first_pair, pages[i],
                        columns, width, targets[i] - y_offsets[first_pair], yo + 8 * first_pair,
                        pages[i + 1] - pages[i],
                    )  # fmt: skip
                i += run
    keep_alive(offsets_of)
    keep_alive(lists)


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
                pool.shapes.out_features[projection],
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
        self.expand_(self.shrink(y, x, adapters, site, layer))

    def shrink(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        adapters: StepAdapters,
        site: str,
        layer: int,
        *,
        groups: int = 1,
    ) -> Arguments:
        """The first half of ``add_``, which needs x alone; ``expand_`` must be given what it returns before another
        half is begun. ``groups``: what the rows of y are cut into, see `regions`."""
        segments, projections = adapters.segments, len(SITES[site])
        n_pairs = segments.rows.numel()
        if self._h.numel() < n_pairs * projections * self._h_width:
            self._h = torch.empty(n_pairs * 3 * self._h_width, dtype=torch.float32)
        return launch(
            _shrink_kernel, x.data_ptr(), x.stride(0) * 4, y.data_ptr(), y.stride(0) * 4, x.shape[1], n_pairs,
            segments.rows.data_ptr(), segments.scales.data_ptr(), len(segments.slot_list), segments.slots.data_ptr(),
            segments.offsets.data_ptr(), self._h.data_ptr(), self._h_width, projections,
            KINDS[self._pool.page_dtype], y.shape[0], groups, *self._fields[site, layer],
            keep=(x, y, segments.rows, segments.scales, segments.slots, segments.offsets, self._h),
        )  # fmt: skip

    def expand_(self, begun: Arguments, *, follows: bool = False) -> None:
        """The second half: adds to ``y``. ``follows``: the kernel that is queued last makes y, shared out by the same
        regions."""
        launch_again(_expand_kernel, begun, follows=follows)

    def add_vectors_(self, y: torch.Tensor, base: torch.Tensor, vectors: VectorRows, site: str, layer: int) -> None:
        add_vectors(y, base, vectors, self._pool.sites[site], layer)

    def table_product(self, x: torch.Tensor, table: DeviceTable) -> torch.Tensor:
        return table_product(x, table)

    def flush(self) -> None:
        flush()
