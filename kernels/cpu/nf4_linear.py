"""``y = W x`` on the CPU with W in NF4 and both sides rounded to integers of 16 bits, see ``nf4_inner``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from manylora.kernels.cpu.compiling import Compiled, kernel
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
from manylora.kernels.cpu.regions import cut, next_region
from manylora.kernels.cpu.threads import launch, launch_again, units_left, units_of_row
from manylora.kernels.cpu.tiles import address_of, keep_alive, share

Between = Callable[[bool], None]

DEPTH = 512
"""Positions of a decoded panel: 512 x 16 int16 are 16 KiB, half of a 32 KiB L1."""
ROW_BLOCK = 96
"""Rows of x per pass over the weights: their 96 x 512 int16 stay in L2 while the panels stream by."""

CODE_BYTES = 128 << 10
"""Of packed codes that are multiplied with all rows before the next are touched: they stay in L2."""


def quantised(quantise_spans: Any, level_bytes: int) -> Any:
    """A part of x as integers, by ``quantise_spans(x, levels, scales, all_spans, spans)``: ``level_bytes`` of a level,
    behind a row's levels the scales of ``all_spans``. Shared out by `threads.Units`, ``per_row`` to a row."""

    @njit(nogil=True)
    def some(part, parts, x, x_stride, rows, depth, levels, level_stride, per_row):
        spans = depth // SPAN
        count = spans // per_row
        for unit in range(part, rows * per_row, parts):
            row, start = unit // per_row, count * (unit % per_row)
            own = levels + row * level_stride
            scales = own + level_bytes * depth + 4 * start
            quantise_spans(
                x + row * x_stride + 4 * SPAN * start, own + level_bytes * SPAN * start, scales, spans, count
            )  # fmt: skip

    return some


_quantised = quantised(quantise, 2)


@kernel
def quantise_kernel(arguments, part, parts):
    a = carray(arguments, 14)
    _quantised(part, parts, a[0], a[1], a[2], a[3], a[4], a[5], a[13])


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


def groups_and_tiles(fused: Any, most_rows: int, level_bytes: int, weight_bytes: int) -> Any:
    """Some of the tiles of ``y (+)= W x`` for some of its groups of rows, by a micro-kernel that makes integers of
    weights as it multiplies them with up to ``most_rows`` rows. ``level_bytes`` of a level, ``weight_bytes`` of a
    tile's position."""

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
                        end - row, own, own + level_bytes * depth, stride, packed + weight_bytes * t * depth,
                        absmax + 64 * t * (depth // block), depth // block, block // SPAN,
                        y + row * y_stride + 64 * t, y_stride, accumulate,
                    )  # fmt: skip

    return some


def shared_out(fused: Any, most_rows: int, level_bytes: int) -> Any:
    """A part of ``y (+)= W x`` with W in NF4, the items that `regions` gives it; see `groups_and_tiles`."""
    some = groups_and_tiles(fused, most_rows, level_bytes, 8)

    @njit(nogil=True)
    def multiply(
        part, parts, rows, levels, stride, depth, packed, absmax, n_tiles, y, y_stride, block, accumulate
    ):  # fmt: skip
        groups, shares = cut(rows, most_rows, parts)
        item, last_item = share(groups * shares, part, parts, 1)
        while item < last_item:
            group, last_group, tile, last_tile, item = next_region(item, last_item, groups, shares, n_tiles)
            some(
                rows, group, last_group, tile, last_tile, levels, stride, depth, packed, absmax, block, y, y_stride,
                accumulate,
            )  # fmt: skip

    return multiply


_as_decoded = shared_out(fused_nf4, FUSED_ROWS, 2)


@kernel
def _nf4_kernel(arguments, part, parts):
    a = carray(arguments, 13)
    rows, depth, levels, stride, packed, absmax, n_tiles = a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    y, y_stride, block, accumulate = a[9], a[10], a[11], a[12]
    if PANEL_ROWS == 0 or rows <= FUSED_ROWS:
        _as_decoded(part, parts, rows, levels, stride, depth, packed, absmax, n_tiles, y, y_stride, block, accumulate)
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


def most_rows(rows: int) -> int:
    """What `regions` are cut by in a product of so many rows."""
    return FUSED_ROWS if PANEL_ROWS == 0 or rows <= FUSED_ROWS else rows


def units_of(x: torch.Tensor) -> tuple[int, bool]:
    """Into how many units a row of x ``[M, K]`` is cut to be made integers, and whether that may follow the kernel
    that is queued last."""
    left = units_left(x)
    if left and x.shape[1] % (left * SPAN) == 0:
        return left, True
    return units_of_row(*x.shape), False


def work_width(k: int) -> int:
    """Of ``nf4_linear``'s ``work`` for K inputs."""
    return k // 2 + k // SPAN


def integer_product(
    quantise: Compiled,
    multiply: Compiled,
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    out: torch.Tensor,
    work: torch.Tensor,
    *,
    accumulate: bool,
    between: Between | None = None,
) -> None:
    """Queue ``quantise`` and ``multiply`` with the same arguments. ``between`` is called after the first has been
    queued, with whether a kernel that needs x alone may follow that: not if x itself is made by what that follows."""
    m, k = x.shape
    per_row, follows = units_of(x)
    arguments = launch(
        quantise, x.data_ptr(), x.stride(0) * 4, m, k, work.data_ptr(), work.stride(0) * 4, packed.data_ptr(),
        absmax.data_ptr(), packed.shape[0], out.data_ptr(), out.stride(0) * 4, blocksize, int(accumulate), per_row,
        keep=(x, packed, absmax, out, work), follows=follows,
    )  # fmt: skip
    if between is not None:
        between(not follows)
    launch_again(multiply, arguments)


def nf4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    out: torch.Tensor,
    work: torch.Tensor,
    *,
    accumulate: bool = False,
    between: Between | None = None,
) -> None:
    """``out (+)= x @ W.T``, x ``[M, K]`` fp32, ``out`` ``[M, N]`` fp32, both with contiguous rows; K a multiple of
    ``blocksize``, and that of ``SPAN``. ``work``: ``[M, work_width(K)]`` fp32 for x as integers, a row's K levels and
    then its scales; what it holds is overwritten. ``between``: see ``integer_product``."""
    integer_product(
        quantise_kernel, _nf4_kernel, x, packed, absmax, blocksize, out, work, accumulate=accumulate, between=between
    )  # fmt: skip
