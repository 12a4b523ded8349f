"""``y = W x`` on the CPU with W in NF4 or bf16: decoded panel by panel into the L1 cache, never as a whole.

The weights are re-laid once, at load, into tiles of 16 outputs (the new bytes replace the old: the base is in memory
once), so that one load gives 64 codes and no sum crosses lanes.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, cfunc, njit

from manylora.kernels.cpu.emit import TILE, decode_bf16, decode_nf4
from manylora.kernels.cpu.threads import KERNEL, launch
from manylora.kernels.cpu.tiles import address_of, gemm_few_rows, gemm_rows, keep_alive, share

DEPTH = 256
"""Rows of a decoded panel: 256 x 16 fp32 = 16 KiB, half of a 32 KiB L1; with four tiles 64 rows."""
ROW_BLOCK = 96
"""Rows of x per pass over the weights: their 96 x 256 fp32 stay in L2 while the panels stream by."""


def pack_nf4(codes: torch.Tensor) -> torch.Tensor:
    """Re-lay NF4 codes ``[N, K]`` uint8 (0..15; N % 16 == 0, K % 4 == 0) as ``[N / 16, K / 4, 32]`` uint8.

    Byte ``16 l + 8 kk + 4 h + e`` of a quad holds, for output ``n = 8 h + 4 l + e``, position ``k = kk`` in its low
    nibble and ``k = 2 + kk`` in its high one: just where ``vpunpck`` puts them back in order.
    """
    n, k = codes.shape
    # [tile, h, l, e, quad, pair, kk]
    v = codes.reshape(n // TILE, 2, 2, 4, k // 4, 2, 2)
    low, high = v[..., 0, :], v[..., 1, :]
    merged = low | (high << 4)  # [tile, h, l, e, quad, kk]
    return merged.permute(0, 4, 2, 5, 1, 3).reshape(n // TILE, k // 4, 32).contiguous()


def pack_absmax(absmax: torch.Tensor, n: int) -> torch.Tensor:
    """Re-lay absmax (fp32, one a block of the flattened ``[N, K]``, K % blocksize == 0) as ``[N / 16, blocks, 16]``."""
    return absmax.float().reshape(n // TILE, TILE, -1).permute(0, 2, 1).contiguous()


def pack_bf16(weight: torch.Tensor) -> torch.Tensor:
    """Re-lay a bf16 weight ``[N, K]`` as ``[ceil(N / 16), K, 16]``, element 2i holding output i and 2i + 1 output
    8 + i of the tile; missing outputs are zero."""
    n, k = weight.shape
    tiles = -(-n // TILE)
    padded = torch.zeros(tiles * TILE, k, dtype=torch.bfloat16)
    padded[:n] = weight
    return padded.reshape(tiles, 2, 8, k).permute(0, 3, 2, 1).reshape(tiles, k, TILE).contiguous()


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _multiply(rows, tiles, x, offsets, first_row, panel, stride, depth, c, c_offsets, accumulate):  # type: ignore[no-untyped-def]
    xo, co = offsets + 8 * first_row, c_offsets + 8 * first_row
    if tiles > 1 or rows <= 3:
        gemm_few_rows(rows, tiles, x, xo, panel, stride, depth, c, co, accumulate)
    else:
        gemm_rows(rows, x, xo, panel, stride, depth, c, co, accumulate)


@cfunc(KERNEL, cache=True)  # type: ignore[untyped-decorator]
def _nf4_kernel(arguments, part, parts):  # type: ignore[no-untyped-def]
    a = carray(arguments, 12)
    x, x_stride, rows, depth, packed, absmax, n_tiles = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    y, y_stride, block, accumulate = a[7], a[8], a[9], a[10]
    x_offsets, c_offsets = np.arange(rows) * x_stride, np.arange(rows) * y_stride
    xo, co = address_of(x_offsets), address_of(c_offsets)
    tiles_at_once = 4 if rows <= 3 else 1
    step = max(block, DEPTH // tiles_at_once // block * block)
    panel_memory = np.empty(step * TILE * tiles_at_once, np.float32)
    panel = address_of(panel_memory)
    first, last = share(n_tiles, part, parts, tiles_at_once)
    for row in range(0, rows, ROW_BLOCK):
        count = min(ROW_BLOCK, rows - row)
        for tile in range(first, last, tiles_at_once):
            tiles = min(tiles_at_once, last - tile)
            stride = 64 * tiles
            for k in range(0, depth, step):
                length = min(step, depth - k)
                for t in range(tiles):
                    for b in range(0, length, block):
                        source = (tile + t) * (depth // 4) + (k + b) // 4
                        scale = (tile + t) * (depth // block) + (k + b) // block
                        decode_nf4(packed + 32 * source, absmax + 64 * scale, panel + b * stride + 64 * t, stride, block // 4)
                keep = 1 if accumulate != 0 or k > 0 else 0
                _multiply(count, tiles, x + 4 * k, xo, row, panel, stride, length, y + 64 * tile, co, keep)
    keep_alive(x_offsets)
    keep_alive(c_offsets)
    keep_alive(panel_memory)


@cfunc(KERNEL, cache=True)  # type: ignore[untyped-decorator]
def _bf16_kernel(arguments, part, parts):  # type: ignore[no-untyped-def]
    a = carray(arguments, 8)
    x, x_stride, rows, depth, packed, n_tiles, y, y_stride = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
    x_offsets, c_offsets = np.arange(rows) * x_stride, np.arange(rows) * y_stride
    xo, co = address_of(x_offsets), address_of(c_offsets)
    tiles_at_once = 4 if rows <= 3 else 1
    step = DEPTH // tiles_at_once
    panel_memory = np.empty(step * TILE * tiles_at_once, np.float32)
    panel = address_of(panel_memory)
    first, last = share(n_tiles, part, parts, tiles_at_once)
    for row in range(0, rows, ROW_BLOCK):
        count = min(ROW_BLOCK, rows - row)
        for tile in range(first, last, tiles_at_once):
            tiles = min(tiles_at_once, last - tile)
            stride = 64 * tiles
            for k in range(0, depth, step):
                length = min(step, depth - k)
                for t in range(tiles):
                    decode_bf16(packed + 32 * ((tile + t) * depth + k), panel + 64 * t, stride, length)
                _multiply(count, tiles, x + 4 * k, xo, row, panel, stride, length, y + 64 * tile, co, 1 if k > 0 else 0)
    keep_alive(x_offsets)
    keep_alive(c_offsets)
    keep_alive(panel_memory)


def nf4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    out: torch.Tensor,
    *,
    accumulate: bool = False,
) -> None:
    """``out (+)= x @ W.T``, x ``[M, K]`` fp32, ``out`` ``[M, N]`` fp32, both with contiguous rows."""
    m, k = x.shape
    launch(
        _nf4_kernel, x.data_ptr(), x.stride(0) * 4, m, k, packed.data_ptr(), absmax.data_ptr(), packed.shape[0],
        out.data_ptr(), out.stride(0) * 4, blocksize, int(accumulate), 0,
    )  # fmt: skip


def bf16_linear(x: torch.Tensor, packed: torch.Tensor, out: torch.Tensor) -> None:
    """``out = x @ W.T``, x ``[M, K]`` fp32, ``out`` ``[M, 16 * tiles]`` fp32, both with contiguous rows."""
    m, k = x.shape
    launch(
        _bf16_kernel, x.data_ptr(), x.stride(0) * 4, m, k, packed.data_ptr(), packed.shape[0], out.data_ptr(),
        out.stride(0) * 4,
    )  # fmt: skip
