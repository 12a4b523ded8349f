"""Logits on the CPU, ``y = x @ W.T`` with both sides rounded to integers of 8 bits, see ``bytes_inner``.

A code is a weight relative to the largest of its output's block of positions (``block_of``), by which that block's
share of the sum is scaled: as a weight in NF4, with 248 values instead of 16. Codes are made once, at load: half of the
bytes of bf16, which is what few rows wait for. To make them in each step from the table that is kept for embeddings took
1.1 of 2.9 ms (32 rows, a vocabulary of 49152, a width of 576).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numba import carray, njit

from manylora.kernels.cpu.bytes_inner import CODE_UNIT, CODE_ZERO, MANY_ROWS, some_tiles
from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.emit import TILE, VECTORS, Builder, Value, load, offset
from manylora.kernels.cpu.nf4_bytes import groups_of_rows, quantise_bytes_kernel
from manylora.kernels.cpu.nf4_inner import BYTES, SMALLEST, SPAN
from manylora.kernels.cpu.nf4_packing import GROUP
from manylora.kernels.cpu.target import TARGET
from manylora.kernels.cpu.threads import launch
from manylora.kernels.cpu.tiles import share

_FOUR_BYTES: Final = 4 * TILE
"""Codes of four positions of a tile."""
_ROWS_AT_ONCE: Final = 1024
"""Of a table that are packed at once: in fp32 in between."""


def _group(b: Builder, address: Value) -> list[list[Value]]:
    fours = [offset(b, address, _FOUR_BYTES * i) for i in range(GROUP // 4)]
    return [[load(b, offset(b, one, 4 * TARGET.lanes * v), BYTES, 1) for v in range(VECTORS)] for one in fours]


_some_tiles = some_tiles(_group, TILE * GROUP, fetched=True)


@kernel
def _head_bytes_kernel(arguments, part, parts):
    a = carray(arguments, 13)
    rows, depth, levels, stride, codes, largest, y, y_stride, block = (
        a[2], a[3], a[4], a[5], a[6], a[7], a[9], a[10], a[11],
    )  # fmt: skip
    # A part has tiles for all rows, as memory brings each once: a vocabulary is more than caches hold.
    first, last = share(a[8], part, parts, 2)
    groups = groups_of_rows(rows)
    at_once = 2 if groups > 1 else max(last - first, 1)
    for tile in range(first, last, at_once):
        for g in range(groups):
            row, end = rows * g // groups, rows * (g + 1) // groups
            _some_tiles(
                end - row, levels + row * stride, depth, codes + 16 * tile * depth,
                largest + 64 * tile * (depth // block), min(at_once, last - tile), block,
                y + row * y_stride + 64 * tile, y_stride, 0, rows >= MANY_ROWS,
            )  # fmt: skip


def block_of(width: int) -> int:
    """Positions of an output that have a largest magnitude of their own, of ``width``, a multiple of ``SPAN``."""
    return 64 if width % 64 == 0 else SPAN


@njit("void(float32[:, ::1], int64, int64, uint8[:, :, :, ::1], float32[:, :, ::1])", nogil=True, cache=True)
def _pack(weight, first, block, codes, largest):
    for n in range(len(weight)):
        tile, output = (first + n) // TILE, (first + n) % TILE
        for start in range(0, weight.shape[1], block):
            most = np.float32(0.0)
            for k in range(start, start + block):
                size = abs(weight[n, k])
                most = max(most, size) if size == size else np.float32(np.nan)
            if most < SMALLEST:
                most = np.float32(0.0)
            largest[tile, start // block, output] = most
            factor = np.float32(CODE_UNIT) / most if np.isfinite(most) and most > 0.0 else np.float32(0.0)
            for k in range(start, start + block):
                value = np.float64(weight[n, k]) * factor if factor > 0.0 else 0.0
                codes[tile, k // 4, output, k % 4] = np.uint8(np.rint(value + CODE_ZERO))


def pack_head(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A bf16 weight ``[N, K]``, K a multiple of ``SPAN``, as codes, uint8 ``[ceil(N / 16), K / 4, 16, 4]``, and the
    largest magnitudes of blocks, fp32 ``[ceil(N / 16), K / block_of(K), 16]``; a tile's missing outputs are zero."""
    n, k = weight.shape
    tiles = -(-n // TILE)
    codes = torch.zeros(tiles, k // 4, TILE, 4, dtype=torch.uint8)
    largest = torch.zeros(tiles, k // block_of(k), TILE)
    for first in range(0, n, _ROWS_AT_ONCE):
        rows = weight[first : first + _ROWS_AT_ONCE].float().contiguous()
        _pack(rows.numpy(), first, block_of(k), codes.numpy(), largest.numpy())
    return codes, largest


def head_bytes_linear(
    x: torch.Tensor, codes: torch.Tensor, largest: torch.Tensor, out: torch.Tensor, work: torch.Tensor
) -> None:
    """``out = x @ W.T``, x ``[M, K]`` fp32, K a multiple of ``SPAN``, W as `pack_head` packed it; ``out`` ``[M, 16 *
    tiles]`` fp32. ``work``: as ``nf4_bytes.nf4_bytes_linear``'s."""
    m, k = x.shape
    launch(
        quantise_bytes_kernel, x.data_ptr(), x.stride(0) * 4, m, k, work.data_ptr(), work.stride(0) * 4,
        codes.data_ptr(), largest.data_ptr(), codes.shape[0], out.data_ptr(), out.stride(0) * 4, block_of(k), 0,
        then=_head_bytes_kernel, keep=(x, codes, largest, out, work),
    )  # fmt: skip
