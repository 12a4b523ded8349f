"""``y = W x`` on the CPU with W in NF4 and both sides rounded to integers of 16 bits, see ``nf4_inner``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, njit

from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.nf4_inner import (
    FUSED_ROWS,
    PAIR_BYTES,
    PANEL_ROWS,
    SPAN,
    decode_nf4,
    fused_nf4,
    panel_nf4,
    quantise,
)
from manylora.kernels.cpu.nf4_packing import GROUP
from manylora.kernels.cpu.regions import CODE_BYTES, items_of, next_region
from manylora.kernels.cpu.threads import launch
from manylora.kernels.cpu.tiles import address_of, keep_alive, share

DEPTH = 512
"""Positions of a decoded panel: 512 x 16 int16 are 16 KiB, half of a 32 KiB L1."""
ROW_BLOCK = 96
"""Rows of x per pass over the weights: their 96 x 512 int16 stay in L2 while the panels stream by."""


@kernel
def quantise_kernel(arguments, part, parts):
    a = carray(arguments, 13)
    x, x_stride, rows, depth, levels, level_stride = a[0], a[1], a[2], a[3], a[4], a[5]
    spans = depth // SPAN
    first, last = share(rows * spans, part, parts, 1)
    while first < last:
        row, start = first // spans, first % spans
        count = min(spans - start, last - first)
        own = levels + row * level_stride
        quantise(
            x + row * x_stride + 4 * SPAN * start, own + 2 * SPAN * start, own + 2 * depth + 4 * start, count
        )  # fmt: skip
        first += count


@njit(nogil=True, inline="never")
def _many_rows(rows, levels, stride, depth, packed, absmax, block, c, c_stride, accumulate, panel):
    """A tile's outputs for more rows than are multiplied with weights as they are decoded."""
    step = max(block, DEPTH // block * block)
    groups = (rows + PANEL_ROWS - 1) // max(PANEL_ROWS, 1)
    for k in range(0, depth, step):
        length = min(step, depth - k)
        decode_nf4(packed + 8 * k, panel, length // GROUP)
        keep = 1 if accumulate != 0 or k > 0 else 0
        done = 0
        for g in range(groups):
            # Near-equal groups: 8 rows are 4 + 4, not 6 + 2, as weights are loaded for each.
            size = (rows - done + groups - g - 1) // (groups - g)
            own = levels + done * stride
            panel_nf4(
                size, own + 2 * k, own + 2 * depth + 4 * (k // SPAN), stride, panel, absmax + 64 * (k // block),
                length // block, block // SPAN, c + done * c_stride, c_stride, keep,
            )  # fmt: skip
            done += size


def groups_and_tiles(fused: Any, most_rows: int, weight_bytes: int) -> Any:
    """Some of the tiles of ``y (+)= W x`` for some of its groups of rows, by a micro-kernel that makes integers of
    weights as it multiplies them with up to ``most_rows`` rows. ``weight_bytes`` of a tile's position."""

    @njit(nogil=True, inline="never")
    def some(
        rows, group, last_group, tile, last_tile, levels, stride, depth, packed, absmax, block, y, y_stride,
        accumulate,
    ):  # fmt: skip
        """A group's levels stay in L1 while weights come from L2, where some tiles' stay for all of the groups."""
        groups = (rows + most_rows - 1) // most_rows
        at_once = max(1, CODE_BYTES // (weight_bytes * depth))
        for begin in range(tile, last_tile, at_once):
            for g in range(group, last_group):
                # Near-equal groups: 9 rows are 4 + 5, not 8 + 1, as weights are made integers for each.
                row, end = rows * g // groups, rows * (g + 1) // groups
                own = levels + row * stride
                for t in range(begin, min(begin + at_once, last_tile)):
                    fused(
                        end - row, own, own + 2 * depth, stride, packed + weight_bytes * t * depth,
                        absmax + 64 * t * (depth // block), depth // block, block // SPAN,
                        y + row * y_stride + 64 * t, y_stride, accumulate,
                    )  # fmt: skip

    return some


_some = groups_and_tiles(fused_nf4, FUSED_ROWS, 8)


@kernel
def _nf4_kernel(arguments, part, parts):
    a = carray(arguments, 13)
    rows, depth, levels, stride, packed, absmax, n_tiles = a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    y, y_stride, block, accumulate = a[9], a[10], a[11], a[12]
    if PANEL_ROWS == 0 or rows <= FUSED_ROWS:
        groups = (rows + FUSED_ROWS - 1) // FUSED_ROWS
        item, last_item = share(items_of(groups, depth, n_tiles), part, parts, 1)
        while item < last_item:
            group, last_group, tile, last_tile, item = next_region(item, last_item, groups, depth, n_tiles)
            _some(
                rows, group, last_group, tile, last_tile, levels, stride, depth, packed, absmax, block, y, y_stride,
                accumulate,
            )  # fmt: skip
        return
    first, last = share(n_tiles, part, parts, 1)
    panel_memory = np.empty(max(block, DEPTH) * PAIR_BYTES // 2, np.uint8)
    panel = address_of(panel_memory)
    for row in range(0, rows, ROW_BLOCK):
        count = min(ROW_BLOCK, rows - row)
        for tile in range(first, last):
            _many_rows(
                count, levels + row * stride, stride, depth, packed + 8 * tile * depth,
                absmax + 64 * tile * (depth // block), block,
                y + row * y_stride + 64 * tile, y_stride, accumulate, panel,
            )  # fmt: skip
    keep_alive(panel_memory)


def groups_of(rows: int) -> int:
    """The groups that ``nf4_linear`` cuts rows into, see `regions`."""
    return -(-rows // FUSED_ROWS) if PANEL_ROWS == 0 or rows <= FUSED_ROWS else 1


def work_width(k: int) -> int:
    """Of ``nf4_linear``'s ``work`` for K inputs."""
    return k // 2 + k // SPAN


def nf4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    out: torch.Tensor,
    work: torch.Tensor,
    *,
    accumulate: bool = False,
    follows: bool = False,
) -> None:
    """``out (+)= x @ W.T``, x ``[M, K]`` fp32, ``out`` ``[M, N]`` fp32, both with contiguous rows; K a multiple of
    ``blocksize``, and that of ``SPAN``. ``work``: ``[M, work_width(K)]`` fp32 for x as integers, a row's K levels and
    then its scales; what it holds is overwritten. ``follows``: the kernel that is queued last does not write x; see
    ``threads.launch``."""
    m, k = x.shape
    launch(
        quantise_kernel, x.data_ptr(), x.stride(0) * 4, m, k, work.data_ptr(), work.stride(0) * 4, packed.data_ptr(),
        absmax.data_ptr(), packed.shape[0], out.data_ptr(), out.stride(0) * 4, blocksize, int(accumulate),
        then=_nf4_kernel, keep=(x, out, work), follows=follows,
    )  # fmt: skip
