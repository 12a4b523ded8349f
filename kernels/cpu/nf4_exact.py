"""``y = W x`` on the CPU with W in NF4 and nothing rounded but fp32 sums: for those who compare logits, and for tests.

Codes become fp32 values in panels, which the fp32 micro-kernel multiplies as it does bf16's: each output is one chain
``fma(x[k], code * absmax, acc)`` over k, as in ``emit``. It takes two to three times as long as ``nf4_linear`` for a
few rows, and about as long for many.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray
from numba.core import cgutils, types
from numba.extending import intrinsic

from manylora.kernels.cpu.bf16_linear import DEPTH, PANEL_TILES, ROW_BLOCK, multiply_panel
from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.emit import I64, TILE, VECTORS, VF, Builder, Value, i64, load_tile, shuffle, store_tile
from manylora.kernels.cpu.nf4_inner import BYTES, interleave, look_up, nibbles
from manylora.kernels.cpu.nf4_packing import GROUP
from manylora.kernels.cpu.threads import launch
from manylora.kernels.cpu.tiles import address_of, keep_alive, share
from manylora.kernels.nf4_code import NF4_CODE


def _planes() -> list[Value]:
    """The four byte planes of the 16 fp32 codes, repeated in each 128-bit lane for ``vpshufb``."""
    raw = [struct.pack("<f", value) for value in NF4_CODE]
    return [ir.Constant(BYTES, [code[plane] for code in raw] * (BYTES.count // 16)) for plane in range(4)]


def _pairs_of_words(b: Builder, low: Value, high: Value, upper: bool) -> Value:
    """fp32 of low and high halves: of the lower or the upper four words of each 128-bit lane."""
    width = low.type.count
    places = [lane + 4 * upper + i for lane in range(0, width, 8) for i in range(4)]
    return b.bitcast(shuffle(b, low, high, [place for i in places for place in (i, width + i)]), VF)


def _group(b: Builder, address: Value) -> list[list[Value]]:
    """The codes of the ``GROUP`` positions and 16 outputs at ``address``: fp32, ``VECTORS`` vectors a position."""
    positions: list[list[Value]] = []
    for indices in nibbles(b, address):
        planes = [look_up(b, plane, indices) for plane in _planes()]
        halves = []
        for upper in (False, True):
            low, high = (interleave(b, planes[i], planes[i + 1], upper) for i in (0, 2))
            # An output's two positions lie side by side: four lanes hold two outputs, twice.
            first, second = (_pairs_of_words(b, low, high, of) for of in (False, True))
            lanes = range(0, TILE // VECTORS, 4)
            halves.append(
                [shuffle(b, first, second, [at for lane in lanes for at in _of_lane(lane, j)]) for j in range(2)]
            )
        if VECTORS == 2:  # a half is eight outputs of both positions
            positions += [[halves[0][j], halves[1][j]] for j in range(2)]
        else:  # a half is two positions of all outputs
            positions += [[half[j]] for half in halves for j in range(2)]
    return positions


def _of_lane(lane: int, j: int) -> list[int]:
    """Where position j of the four outputs of a 128-bit lane is in two vectors of (output, position) pairs."""
    width = TILE // VECTORS
    return [lane + j, lane + 2 + j, width + lane + j, width + lane + 2 + j]


@intrinsic
def _decode(typingctx, packed, absmax, out, out_stride, groups):
    """Decode ``groups`` groups of a tile to fp32, times ``absmax[16]``: ``out[k, n] = code * absmax[n]``."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        packed, absmax, out, out_stride, groups = args
        scales = load_tile(b, absmax)
        with cgutils.for_range(b, groups, intp=I64) as loop:
            row = b.add(out, b.mul(loop.index, b.mul(out_stride, i64(GROUP))))
            for vectors in _group(b, b.add(packed, b.mul(loop.index, i64(8 * GROUP)))):
                store_tile(b, [b.fmul(codes, scale) for codes, scale in zip(vectors, scales, strict=True)], row)
                row = b.add(row, out_stride)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@kernel
def _exact_nf4_kernel(arguments, part, parts):
    a = carray(arguments, 11)
    x, x_stride, rows, depth, packed, absmax, n_tiles = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    y, y_stride, block, accumulate = a[7], a[8], a[9], a[10]
    x_offsets, c_offsets = np.arange(rows) * x_stride, np.arange(rows) * y_stride
    xo, co = address_of(x_offsets), address_of(c_offsets)
    first, last = share(n_tiles, part, parts, 1)
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
                        _decode(source, scale, target, 64 * PANEL_TILES, block // GROUP)
                keep = 1 if accumulate != 0 or k > 0 else 0
                multiply_panel(count, tiles, x + 4 * k, xo + 8 * row, panel, length, y + 64 * tile, co + 8 * row, keep)
    keep_alive(panel_memory)
    keep_alive(x_offsets)
    keep_alive(c_offsets)


def exact_nf4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    out: torch.Tensor,
    *,
    accumulate: bool = False,
) -> None:
    """``out (+)= x @ W.T``, x ``[M, K]`` fp32, ``out`` ``[M, N]`` fp32, both with contiguous rows; W as
    ``nf4_packing`` laid it, ``FOR_WORDS``."""
    m, k = x.shape
    launch(
        _exact_nf4_kernel, x.data_ptr(), x.stride(0) * 4, m, k, packed.data_ptr(), absmax.data_ptr(), packed.shape[0],
        out.data_ptr(), out.stride(0) * 4, blocksize, int(accumulate), keep=(x, out),
    )  # fmt: skip
