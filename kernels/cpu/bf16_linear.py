"""``y = W x`` on the CPU with W in bf16: decoded panel by panel into the L1 cache, never as a whole.

The weights are re-laid once, at load, into tiles of 16 outputs (the new bytes replace the old: the base is in memory
once), so that no sum crosses lanes.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit

from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.emit import (
    TILE,
    decode_bf16,
    fused_bf16_tile,
    fused_bf16_tiles,
    int32_at,
)
from manylora.kernels.cpu.target import TARGET
from manylora.kernels.cpu.threads import launch
from manylora.kernels.cpu.tiles import (
    address_of,
    float32_from_bits,
    float32_view,
    gemm_panel,
    gemm_rows,
    int64_view,
    keep_alive,
    share,
)

PANEL_TILES = TARGET.panel_tiles
DEPTH = 256 // PANEL_TILES
"""Rows of a decoded panel: 256 x 16 fp32, or 128 x 32, are 16 KiB, half of a 32 KiB L1."""
ROW_BLOCK = 96
"""Rows of x per pass over the weights: their 96 x 256 fp32 stay in L2 while the panels stream by."""


def unpack_bf16(tiles: torch.Tensor) -> torch.Tensor:
    """The weight that `pack_bf16` packed, fp32 ``[16 * tiles, K]``."""
    count, k, _ = tiles.shape
    return tiles.view(count, k, 8, 2).permute(0, 3, 2, 1).reshape(count * TILE, k).float()


def pack_bf16(weight: torch.Tensor) -> torch.Tensor:
    """Re-lay a bf16 weight ``[N, K]`` as ``[ceil(N / 16), K, 16]``, element 2i holding output i and 2i + 1 output
    8 + i of the tile; missing outputs are zero."""
    n, k = weight.shape
    tiles = -(-n // TILE)
    padded = torch.zeros(tiles * TILE, k, dtype=torch.bfloat16)
    padded[:n] = weight
    return padded.reshape(tiles, 2, 8, k).permute(0, 3, 2, 1).reshape(tiles, k, TILE).contiguous()


@kernel
def _gather_kernel(arguments, part, parts):
    a = carray(arguments, 6)
    count, width, tiles = a[1], a[4], a[5]
    outputs = int64_view(a[0], count)
    first, last = share(count, part, parts, 1)
    for i in range(first, last):
        tile, within = outputs[i] // 16, outputs[i] % 16
        row = float32_view(a[3] + 4 * width * i, width)
        if 0 <= tile < tiles:
            pairs = a[2] + 32 * width * tile + 4 * (within % 8)
            for k in range(width):
                pair = int32_at(pairs, 8 * k)
                row[k] = float32_from_bits(pair << 16 if within < 8 else pair & ~0xFFFF)  # the upper half of an fp32
        else:
            for k in range(width):
                row[k] = np.nan


def gather_bf16(outputs: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """Rows of the weight that `pack_bf16` packed, fp32 ``[len(outputs), K]``: those of the ``outputs``, int64.
    IndexError if there is no such row. Within ``queued`` they are there when that has ended; run again, it gives those
    of the outputs by then, NaN for what is no row."""
    outputs = outputs.contiguous()
    if any(not 0 <= output < 16 * tiles.shape[0] for output in outputs.tolist()):
        raise IndexError(f"rows {outputs.tolist()[:8]} ... of a table of {16 * tiles.shape[0]}")
    out = torch.empty(outputs.numel(), tiles.shape[1])
    launch(
        _gather_kernel, outputs.data_ptr(), outputs.numel(), tiles.data_ptr(), out.data_ptr(), tiles.shape[1],
        tiles.shape[0], keep=(outputs, tiles, out),
    )  # fmt: skip
    return out


@njit(nogil=True)
def multiply_panel(rows, tiles, x, x_offsets, panel, depth, c, c_offsets, accumulate):
    """``c[r] (+)= x[r] @ panel`` for a panel of ``PANEL_TILES`` tiles, the first ``tiles`` of them."""
    if PANEL_TILES == 1:
        gemm_rows(rows, x, x_offsets, panel, 64, depth, c, c_offsets, accumulate, 0)
    else:
        gemm_panel(rows, tiles, x, x_offsets, panel, 64 * PANEL_TILES, depth, c, c_offsets, accumulate, 0)


_BF16_TILES = TARGET.bf16_tiles
"""By the number of rows, how many tiles at once: the chains of one hide the latency of the other's."""
_BF16_GRAIN = max(_BF16_TILES)
"""Threads' shares are multiples of those."""


FUSED_ROWS = len(_BF16_TILES) - 1
"""Rows at most that weights are multiplied with as they are decoded."""
PANEL_FROM = 64 * FUSED_ROWS if TARGET.lanes == 16 else FUSED_ROWS
"""Above, weights are decoded once for all rows: decoding them again for each ``FUSED_ROWS`` costs more then."""


@njit(nogil=True, inline="never")
def _bf16_few_rows(rows, first, last, x, xo, packed, depth, y, co, accumulate):
    weight_bytes = 32 * depth
    groups = (rows + FUSED_ROWS - 1) // FUSED_ROWS
    most = _BF16_TILES[(rows + groups - 1) // groups]
    tile = first
    while tile < last:
        w, c = packed + tile * weight_bytes, y + 64 * tile
        at_once = most if tile + most <= last else 1
        for g in range(groups):
            row = rows * g // groups
            size = rows * (g + 1) // groups - row
            if at_once > 1 and at_once == _BF16_TILES[size]:
                fused_bf16_tiles(size, x, xo + 8 * row, w, weight_bytes, depth, c, co + 8 * row, accumulate)
            else:
                for t in range(at_once):
                    fused_bf16_tile(
                        size, x, xo + 8 * row, w + t * weight_bytes, weight_bytes, depth, c + 64 * t, co + 8 * row,
                        accumulate,
                    )  # fmt: skip
        tile += at_once


@kernel
def _bf16_kernel(arguments, part, parts):
    a = carray(arguments, 9)
    x, x_stride, rows, depth, packed, n_tiles, y, y_stride = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
    accumulate = a[8]
    x_offsets, c_offsets = np.arange(rows) * x_stride, np.arange(rows) * y_stride
    xo, co = address_of(x_offsets), address_of(c_offsets)
    first, last = share(n_tiles, part, parts, _BF16_GRAIN)
    if rows <= PANEL_FROM:
        _bf16_few_rows(rows, first, last, x, xo, packed, depth, y, co, accumulate)
    else:
        panel_memory = np.empty(DEPTH * TILE * PANEL_TILES, np.float32)
        panel = address_of(panel_memory)
        for row in range(0, rows, ROW_BLOCK):
            count = min(ROW_BLOCK, rows - row)
            for tile in range(first, last, PANEL_TILES):
                tiles = min(PANEL_TILES, last - tile)
                for k in range(0, depth, DEPTH):
                    length = min(DEPTH, depth - k)
                    for t in range(tiles):
                        decode_bf16(packed + 32 * ((tile + t) * depth + k), panel + 64 * t, 64 * PANEL_TILES, length)
                    keep = 1 if accumulate != 0 or k > 0 else 0
                    multiply_panel(
                        count, tiles, x + 4 * k, xo + 8 * row, panel, length, y + 64 * tile, co + 8 * row, keep
                    )
        keep_alive(panel_memory)
    keep_alive(x_offsets)
    keep_alive(c_offsets)


def bf16_linear(x: torch.Tensor, packed: torch.Tensor, out: torch.Tensor, *, accumulate: bool = False) -> None:
    """``out (+)= x @ W.T``, x ``[M, K]`` fp32, ``out`` ``[M, 16 * tiles]`` fp32, both with contiguous rows."""
    m, k = x.shape
    launch(
        _bf16_kernel, x.data_ptr(), x.stride(0) * 4, m, k, packed.data_ptr(), packed.shape[0], out.data_ptr(),
        out.stride(0) * 4, int(accumulate), keep=(x, out),
    )  # fmt: skip
