"""``y = W x`` on the CPU with W in NF4 or bf16: decoded panel by panel into the L1 cache, never as a whole.

The weights are re-laid once, at load, into tiles of 16 outputs (the new bytes replace the old: the base is in memory
once), so that one load gives 64 codes and no sum crosses lanes.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit

from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.emit import (
    TILE,
    decode_bf16,
    decode_nf4,
    fused_bf16_1x1,
    fused_bf16_1x4,
    fused_bf16_2x1,
    fused_bf16_2x2,
    fused_bf16_3x1,
    fused_bf16_3x2,
    fused_bf16_4x1,
    fused_nf4_1x1,
    fused_nf4_1x2,
    fused_nf4_2x1,
    fused_nf4_2x2,
    fused_nf4_3x1,
    fused_nf4_3x2,
    fused_nf4_4x1,
)
from manylora.kernels.cpu.threads import launch
from manylora.kernels.cpu.tiles import address_of, gemm_rows, keep_alive, share
from manylora.kernels.nf4_code import NF4_CODE

DEPTH = 256
"""Rows of a decoded panel: 256 x 16 fp32 = 16 KiB, half of a 32 KiB L1."""
ROW_BLOCK = 96
"""Rows of x per pass over the weights: their 96 x 256 fp32 stay in L2 while the panels stream by."""


@njit("void(uint8[::1], int64, int64, uint8[:, :, ::1])", nogil=True, cache=True)
def _pack_nf4(source, n, k, out):
    for tile in range(n // 16):
        for quad in range(k // 4):
            for lane in range(2):
                for pair in range(2):
                    for half in range(2):
                        for e in range(4):
                            row = 16 * tile + 8 * half + 4 * lane + e
                            # bitsandbytes keeps the even position in the high nibble.
                            low = source[(row * k + 4 * quad) // 2] >> (4 - 4 * pair) & 15
                            high = source[(row * k + 4 * quad) // 2 + 1] >> (4 - 4 * pair) & 15
                            out[tile, quad, 16 * lane + 8 * pair + 4 * half + e] = low | high << 4


def pack_nf4(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Re-lay bitsandbytes' NF4 bytes ``[N * K / 2]`` (N % 16 == 0, K % 4 == 0) as ``[N / 16, K / 4, 32]`` uint8.

    Byte ``16 l + 8 kk + 4 h + e`` of a quad holds, for output ``n = 8 h + 4 l + e``, position ``k = kk`` in its low
    nibble and ``k = 2 + kk`` in its high one: just where ``vpunpck`` puts them back in order.
    """
    out = torch.empty(n // TILE, k // 4, 32, dtype=torch.uint8)
    _pack_nf4(packed.contiguous().numpy(), n, k, out.numpy())
    return out


def pack_absmax(absmax: torch.Tensor, n: int) -> torch.Tensor:
    """Re-lay absmax (fp32, one a block of the flattened ``[N, K]``, K % blocksize == 0) as ``[N / 16, blocks, 16]``."""
    return absmax.float().reshape(n // TILE, TILE, -1).permute(0, 2, 1).contiguous()


@njit("void(uint8[:, :, ::1], float32[:, :, ::1], float32[::1], int64, float32[:, ::1])", nogil=True, cache=True)
def _unpack_nf4(packed, absmax, code, block, out):
    for tile in range(packed.shape[0]):
        for n in range(16):
            half, lane, e = n // 8, n // 4 % 2, n % 4
            row = 16 * tile + n
            for quad in range(packed.shape[1]):
                scale = absmax[tile, 4 * quad // block, n]
                for pair in range(2):
                    byte = packed[tile, quad, 16 * lane + 8 * pair + 4 * half + e]
                    out[row, 4 * quad + pair] = code[byte & 15] * scale
                    out[row, 4 * quad + 2 + pair] = code[byte >> 4] * scale


def unpack_nf4(packed: torch.Tensor, absmax: torch.Tensor, blocksize: int) -> torch.Tensor:
    """The weight that `pack_nf4` and `pack_absmax` packed, fp32 ``[N, K]``, as the kernels multiply with it.

    On the caller's thread alone, without Python's lock: adapters are loaded while the step loop computes.
    """
    out = torch.empty(packed.shape[0] * TILE, packed.shape[1] * 4)
    _unpack_nf4(packed.numpy(), absmax.numpy(), np.array(NF4_CODE, np.float32), blocksize, out.numpy())
    return out


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


FUSED_ROWS = 4
"""Up to here the weights are multiplied as they are decoded; above, they are decoded once for all rows."""


@njit(nogil=True, inline="never")
def _nf4_few_rows(rows, first, last, x, xo, packed, absmax, depth, block, y, co, accumulate):
    weight_bytes, scale_bytes = 8 * depth, 64 * (depth // block)
    blocks, quads = depth // block, block // 4
    tile = first
    while tile < last:
        w, s, c = packed + tile * weight_bytes, absmax + tile * scale_bytes, y + 64 * tile
        if rows <= 3 and tile + 2 <= last:
            # Two tiles at once: the chains of one hide the latency of the other's.
            if rows == 1:
                fused_nf4_1x2(x, xo, w, weight_bytes, s, scale_bytes, blocks, quads, c, co, accumulate)
            elif rows == 2:
                fused_nf4_2x2(x, xo, w, weight_bytes, s, scale_bytes, blocks, quads, c, co, accumulate)
            else:
                fused_nf4_3x2(x, xo, w, weight_bytes, s, scale_bytes, blocks, quads, c, co, accumulate)
            tile += 2
        else:
            if rows == 1:
                fused_nf4_1x1(x, xo, w, weight_bytes, s, scale_bytes, blocks, quads, c, co, accumulate)
            elif rows == 2:
                fused_nf4_2x1(x, xo, w, weight_bytes, s, scale_bytes, blocks, quads, c, co, accumulate)
            elif rows == 3:
                fused_nf4_3x1(x, xo, w, weight_bytes, s, scale_bytes, blocks, quads, c, co, accumulate)
            else:
                fused_nf4_4x1(x, xo, w, weight_bytes, s, scale_bytes, blocks, quads, c, co, accumulate)
            tile += 1


@kernel
def _nf4_kernel(arguments, part, parts):
    a = carray(arguments, 11)
    x, x_stride, rows, depth, packed, absmax, n_tiles = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    y, y_stride, block, accumulate = a[7], a[8], a[9], a[10]
    x_offsets, c_offsets = np.arange(rows) * x_stride, np.arange(rows) * y_stride
    xo, co = address_of(x_offsets), address_of(c_offsets)
    first, last = share(n_tiles, part, parts, 2)
    if rows <= FUSED_ROWS:
        _nf4_few_rows(rows, first, last, x, xo, packed, absmax, depth, block, y, co, accumulate)
    else:
        step = max(block, DEPTH // block * block)
        panel_memory = np.empty(step * TILE, np.float32)
        panel = address_of(panel_memory)
        for row in range(0, rows, ROW_BLOCK):
            count = min(ROW_BLOCK, rows - row)
            for tile in range(first, last):
                for k in range(0, depth, step):
                    length = min(step, depth - k)
                    for b in range(0, length, block):
                        source = packed + 32 * (tile * (depth // 4) + (k + b) // 4)
                        scale = absmax + 64 * (tile * (depth // block) + (k + b) // block)
                        decode_nf4(source, scale, panel + 64 * b, 64, block // 4)
                    keep = 1 if accumulate != 0 or k > 0 else 0
                    gemm_rows(count, x + 4 * k, xo + 8 * row, panel, 64, length, y + 64 * tile, co + 8 * row, keep)
        keep_alive(panel_memory)
    keep_alive(x_offsets)
    keep_alive(c_offsets)


@njit(nogil=True, inline="never")
def _bf16_few_rows(rows, first, last, x, xo, packed, depth, y, co, accumulate):
    weight_bytes = 32 * depth
    tile = first
    while tile < last:
        w, c = packed + tile * weight_bytes, y + 64 * tile
        if rows == 1 and tile + 4 <= last:
            fused_bf16_1x4(x, xo, w, weight_bytes, depth, c, co, accumulate)
            tile += 4
        elif rows == 2 and tile + 2 <= last:
            fused_bf16_2x2(x, xo, w, weight_bytes, depth, c, co, accumulate)
            tile += 2
        elif rows == 3 and tile + 2 <= last:
            fused_bf16_3x2(x, xo, w, weight_bytes, depth, c, co, accumulate)
            tile += 2
        else:
            if rows == 1:
                fused_bf16_1x1(x, xo, w, weight_bytes, depth, c, co, accumulate)
            elif rows == 2:
                fused_bf16_2x1(x, xo, w, weight_bytes, depth, c, co, accumulate)
            elif rows == 3:
                fused_bf16_3x1(x, xo, w, weight_bytes, depth, c, co, accumulate)
            else:
                fused_bf16_4x1(x, xo, w, weight_bytes, depth, c, co, accumulate)
            tile += 1


@kernel
def _bf16_kernel(arguments, part, parts):
    a = carray(arguments, 9)
    x, x_stride, rows, depth, packed, n_tiles, y, y_stride = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
    accumulate = a[8]
    x_offsets, c_offsets = np.arange(rows) * x_stride, np.arange(rows) * y_stride
    xo, co = address_of(x_offsets), address_of(c_offsets)
    first, last = share(n_tiles, part, parts, 4)
    if rows <= FUSED_ROWS:
        _bf16_few_rows(rows, first, last, x, xo, packed, depth, y, co, accumulate)
    else:
        panel_memory = np.empty(DEPTH * TILE, np.float32)
        panel = address_of(panel_memory)
        for row in range(0, rows, ROW_BLOCK):
            count = min(ROW_BLOCK, rows - row)
            for tile in range(first, last):
                for k in range(0, depth, DEPTH):
                    length = min(DEPTH, depth - k)
                    decode_bf16(packed + 32 * (tile * depth + k), panel, 64, length)
                    keep = 1 if accumulate != 0 or k > 0 else 0
                    gemm_rows(count, x + 4 * k, xo + 8 * row, panel, 64, length, y + 64 * tile, co + 8 * row, keep)
        keep_alive(panel_memory)
    keep_alive(x_offsets)
    keep_alive(c_offsets)


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
        out.data_ptr(), out.stride(0) * 4, blocksize, int(accumulate), keep=(x, out),
    )  # fmt: skip


def bf16_linear(x: torch.Tensor, packed: torch.Tensor, out: torch.Tensor, *, accumulate: bool = False) -> None:
    """``out (+)= x @ W.T``, x ``[M, K]`` fp32, ``out`` ``[M, 16 * tiles]`` fp32, both with contiguous rows."""
    m, k = x.shape
    launch(
        _bf16_kernel, x.data_ptr(), x.stride(0) * 4, m, k, packed.data_ptr(), packed.shape[0], out.data_ptr(),
        out.stride(0) * 4, int(accumulate), keep=(x, out),
    )  # fmt: skip
