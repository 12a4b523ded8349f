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
    fused_bf16_tile,
    fused_bf16_tiles,
    fused_nf4_tile,
    fused_nf4_tiles,
)
from manylora.kernels.cpu.target import TARGET
from manylora.kernels.cpu.threads import launch
from manylora.kernels.cpu.tiles import address_of, gemm_panel, gemm_rows, keep_alive, share
from manylora.kernels.nf4_code import NF4_CODE

PANEL_TILES = TARGET.panel_tiles
DEPTH = 256 // PANEL_TILES
"""Rows of a decoded panel: 256 x 16 fp32, or 128 x 32, are 16 KiB, half of a 32 KiB L1."""
ROW_BLOCK = 96
"""Rows of x per pass over the weights: their 96 x 256 fp32 stay in L2 while the panels stream by."""
GROUP: int = TARGET.nf4_group
"""Positions whose codes lie together."""

if GROUP == 4:

    @njit(nogil=True, inline="always")
    def _codes_of_byte(byte):
        lane, pair, half, e = byte // 16, byte // 8 % 2, byte // 4 % 2, byte % 4
        return 8 * half + 4 * lane + e, pair, 2 + pair

else:

    @njit(nogil=True, inline="always")
    def _codes_of_byte(byte):
        return byte // 4, 2 * (byte % 4), 2 * (byte % 4) + 1


@njit("void(uint8[::1], int64, int64, uint8[:, :, ::1])", nogil=True, cache=True)
def _pack_nf4(source, n, k, out):
    for tile in range(n // 16):
        for group in range(k // GROUP):
            for byte in range(8 * GROUP):
                output, first, second = _codes_of_byte(byte)
                start = (16 * tile + output) * k + GROUP * group
                # bitsandbytes keeps the even position in the high nibble.
                low = source[(start + first) // 2] >> (4 - 4 * (first % 2)) & 15
                high = source[(start + second) // 2] >> (4 - 4 * (second % 2)) & 15
                out[tile, group, byte] = low | high << 4


def pack_nf4(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Re-lay bitsandbytes' NF4 bytes ``[N * K / 2]`` (N % 16 == 0, K % GROUP == 0) as ``[N / 16, K / GROUP, 8 GROUP]``
    uint8.

    AVX2: byte ``16 l + 8 kk + 4 h + e`` of a group of 4 positions holds, for output ``n = 8 h + 4 l + e``, position
    ``k = kk`` in its low nibble and ``k = 2 + kk`` in its high one: just where ``vpunpck`` puts them back in order.
    AVX512: the 32-bit word ``n`` of a group of 8 holds output n, position k in its bits from 4 k on.
    """
    out = torch.empty(n // TILE, k // GROUP, 8 * GROUP, dtype=torch.uint8)
    _pack_nf4(packed.contiguous().numpy(), n, k, out.numpy())
    return out


def pack_absmax(absmax: torch.Tensor, n: int) -> torch.Tensor:
    """Re-lay absmax (fp32, one a block of the flattened ``[N, K]``, K % blocksize == 0) as ``[N / 16, blocks, 16]``."""
    return absmax.float().reshape(n // TILE, TILE, -1).permute(0, 2, 1).contiguous()


@njit("void(uint8[:, :, ::1], float32[:, :, ::1], float32[::1], int64, float32[:, ::1])", nogil=True, cache=True)
def _unpack_nf4(packed, absmax, code, block, out):
    for tile in range(packed.shape[0]):
        for group in range(packed.shape[1]):
            for byte in range(8 * GROUP):
                n, first, second = _codes_of_byte(byte)
                scale, codes = absmax[tile, GROUP * group // block, n], packed[tile, group, byte]
                out[16 * tile + n, GROUP * group + first] = code[codes & 15] * scale
                out[16 * tile + n, GROUP * group + second] = code[codes >> 4] * scale


def unpack_nf4(packed: torch.Tensor, absmax: torch.Tensor, blocksize: int) -> torch.Tensor:
    """The weight that `pack_nf4` and `pack_absmax` packed, fp32 ``[N, K]``, as the kernels multiply with it.

    On the caller's thread alone, without Python's lock: adapters are loaded while the step loop computes.
    """
    out = torch.empty(packed.shape[0] * TILE, packed.shape[1] * GROUP)
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


@njit(nogil=True)
def _multiply_panel(rows, tiles, x, x_offsets, panel, depth, c, c_offsets, accumulate):
    if PANEL_TILES == 1:
        gemm_rows(rows, x, x_offsets, panel, 64, depth, c, c_offsets, accumulate)
    else:
        gemm_panel(rows, tiles, x, x_offsets, panel, 64 * PANEL_TILES, depth, c, c_offsets, accumulate)


FUSED_ROWS = 4
"""Up to here the weights are multiplied as they are decoded; above, they are decoded once for all rows."""
_NF4_TILES, _BF16_TILES = TARGET.nf4_tiles, TARGET.bf16_tiles
"""By the number of rows, how many tiles at once: the chains of one hide the latency of the other's."""
_NF4_GRAIN, _BF16_GRAIN = max(_NF4_TILES), max(_BF16_TILES)
"""Threads' shares are multiples of those."""


@njit(nogil=True, inline="never")
def _nf4_few_rows(rows, first, last, x, xo, packed, absmax, depth, block, y, co, accumulate):
    weight_bytes, scale_bytes = 8 * depth, 64 * (depth // block)
    blocks, groups = depth // block, block // GROUP
    at_once = _NF4_TILES[rows]
    tile = first
    while tile < last:
        w, s, c = packed + tile * weight_bytes, absmax + tile * scale_bytes, y + 64 * tile
        if at_once > 1 and tile + at_once <= last:
            fused_nf4_tiles(rows, x, xo, w, weight_bytes, s, scale_bytes, blocks, groups, c, co, accumulate)
            tile += at_once
        else:
            fused_nf4_tile(rows, x, xo, w, weight_bytes, s, scale_bytes, blocks, groups, c, co, accumulate)
            tile += 1


@kernel
def _nf4_kernel(arguments, part, parts):
    a = carray(arguments, 11)
    x, x_stride, rows, depth, packed, absmax, n_tiles = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    y, y_stride, block, accumulate = a[7], a[8], a[9], a[10]
    x_offsets, c_offsets = np.arange(rows) * x_stride, np.arange(rows) * y_stride
    xo, co = address_of(x_offsets), address_of(c_offsets)
    first, last = share(n_tiles, part, parts, _NF4_GRAIN)
    if rows <= FUSED_ROWS:
        _nf4_few_rows(rows, first, last, x, xo, packed, absmax, depth, block, y, co, accumulate)
    else:
        step = max(block, DEPTH // block * block)
        panel_memory = np.empty(step * TILE * PANEL_TILES, np.float32)
        panel = address_of(panel_memory)
        for row in range(0, rows, ROW_BLOCK):
            count = min(ROW_BLOCK, rows - row)
            for tile in range(first, last, PANEL_TILES):
                tiles = min(PANEL_TILES, last - tile)
                for k in range(0, depth, step):
                    length = min(step, depth - k)
                    for b in range(0, length, block):
                        for t in range(tiles):
                            source = packed + 8 * ((tile + t) * depth + k + b)
                            scale = absmax + 64 * ((tile + t) * (depth // block) + (k + b) // block)
                            target = panel + 64 * (PANEL_TILES * b + t)
                            decode_nf4(source, scale, target, 64 * PANEL_TILES, block // GROUP)
                    keep = 1 if accumulate != 0 or k > 0 else 0
                    _multiply_panel(
                        count, tiles, x + 4 * k, xo + 8 * row, panel, length, y + 64 * tile, co + 8 * row, keep
                    )
        keep_alive(panel_memory)
    keep_alive(x_offsets)
    keep_alive(c_offsets)


@njit(nogil=True, inline="never")
def _bf16_few_rows(rows, first, last, x, xo, packed, depth, y, co, accumulate):
    weight_bytes = 32 * depth
    at_once = _BF16_TILES[rows]
    tile = first
    while tile < last:
        w, c = packed + tile * weight_bytes, y + 64 * tile
        if at_once > 1 and tile + at_once <= last:
            fused_bf16_tiles(rows, x, xo, w, weight_bytes, depth, c, co, accumulate)
            tile += at_once
        else:
            fused_bf16_tile(rows, x, xo, w, weight_bytes, depth, c, co, accumulate)
            tile += 1


@kernel
def _bf16_kernel(arguments, part, parts):
    a = carray(arguments, 9)
    x, x_stride, rows, depth, packed, n_tiles, y, y_stride = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
    accumulate = a[8]
    x_offsets, c_offsets = np.arange(rows) * x_stride, np.arange(rows) * y_stride
    xo, co = address_of(x_offsets), address_of(c_offsets)
    first, last = share(n_tiles, part, parts, _BF16_GRAIN)
    if rows <= FUSED_ROWS:
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
                    _multiply_panel(
                        count, tiles, x + 4 * k, xo + 8 * row, panel, length, y + 64 * tile, co + 8 * row, keep
                    )
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
