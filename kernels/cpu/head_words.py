"""Logits on the CPU, ``y = x @ W.T`` with W in bf16 and both sides rounded to integers of 16 bits, as ``nf4_inner``'s.

An output's weights are whole numbers of at most ``CODE_UNIT``, which its largest is: they are off by 6.2e-5 of that at
most, and x by 6.0e-5 of the largest of its span. The table stays as it was packed (``bf16_linear.pack_bf16``):
embeddings are looked up in it exactly, and nothing is held twice. A tile becomes integers as it is multiplied, again
for each of several groups of rows: that costs less than to write them down and read them back.

An FMA does half as many products as ``vpdpwssd``: 32 rows take three quarters of the time of fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from llvmlite import ir
from numba import carray

from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.emit import (
    TILE,
    VECTORS,
    VF,
    VI,
    Builder,
    Value,
    bf16_row,
    constant,
    fused_multiply_add,
    load,
    offset,
    shuffle,
)
from manylora.kernels.cpu.nf4_inner import CODE_UNIT, SMALLEST, WORDS, multiply_words
from manylora.kernels.cpu.nf4_linear import groups_and_tiles, quantise_kernel
from manylora.kernels.cpu.target import TARGET
from manylora.kernels.cpu.threads import launch
from manylora.kernels.cpu.tiles import share

_ROW_BYTES: Final = 32
"""A tile's weights of one position."""
_MAGIC: Final = 1.5 * 2.0**23
"""Added to a number of less than 2^22, it leaves the nearest whole one in the low bits."""


def _pair(b: Builder, address: Value, largest: Sequence[Value]) -> list[list[Value]]:
    """The weights of two positions and 16 outputs at ``address`` as integers, an output's two side by side."""
    factors = [b.fdiv(constant(float(CODE_UNIT), VF), one) for one in largest]
    return [_pair_of_two(b, address, factors) if VECTORS == 2 else [_pair_of_one(b, address, factors[0])]]


def _nearest(b: Builder, values: Value, factors: Value) -> Value:
    """``values * factors``, rounded once, in the low halves of int32."""
    return b.bitcast(b.call(fused_multiply_add(b, VF), [values, factors, constant(_MAGIC, VF)]), VI)


def _pair_of_two(b: Builder, address: Value, factors: Sequence[Value]) -> list[Value]:
    rows = [bf16_row(b, offset(b, address, _ROW_BYTES * position)) for position in range(2)]
    first, second = ([_nearest(b, *one) for one in zip(row, factors, strict=True)] for row in rows)
    low, sixteen = ir.Constant(VI, [0xFFFF] * TARGET.lanes), ir.Constant(VI, [16] * TARGET.lanes)
    both = [b.or_(b.and_(one, low), b.shl(other, sixteen)) for one, other in zip(first, second, strict=True)]
    return [b.bitcast(vector, WORDS) for vector in both]


def _pair_of_one(b: Builder, address: Value, factors: Value) -> Value:
    """A register holds both positions: outputs 0 to 7 of the first and of the second in low halves, 8 to 15 in high
    ones. So one shuffle of words puts them in place."""
    words = load(b, address, VI, 4)
    halves = b.shl(words, ir.Constant(VI, [16] * 16)), b.and_(words, ir.Constant(VI, [0xFFFF0000] * 16))
    whole = []
    for first, half in zip((0, 8), halves, strict=True):
        of_half = shuffle(b, factors, factors, 2 * list(range(first, first + 8)))
        whole.append(b.bitcast(_nearest(b, b.bitcast(half, VF), of_half), WORDS))
    places = [32 * (output // 8) + 2 * (output % 8) + 16 * position for output in range(16) for position in range(2)]
    low, high = whole
    return shuffle(b, low, high, places)


_ROWS: Final = TARGET.head_rows
_some = groups_and_tiles(multiply_words(_pair, 2, 2 * _ROW_BYTES, _ROWS, fetched=True), _ROWS, _ROW_BYTES)


@kernel
def _head_kernel(arguments, part, parts):
    a = carray(arguments, 13)
    rows, depth, levels, stride, packed, largest, y, y_stride = a[2], a[3], a[4], a[5], a[6], a[7], a[9], a[10]
    # A part has tiles for all rows, as memory brings each once: a vocabulary is more than caches hold.
    first, last = share(a[8], part, parts, 1)
    groups = (rows + _ROWS - 1) // _ROWS
    _some(rows, 0, groups, first, last, levels, stride, depth, packed, largest, depth, y, y_stride, 0)


def head_maxima(weight: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each output of a bf16 weight ``[N, K]``, fp32 ``[N]`` and zeros up to a whole tile. One
    below ``SMALLEST`` counts as zero, as its weights do then: relative to it they would not be finite."""
    maxima = torch.zeros(-(-weight.shape[0] // TILE) * TILE)
    found = weight.abs().amax(1).float()
    maxima[: weight.shape[0]] = torch.where(found < SMALLEST, 0.0, found)
    return maxima


def head_linear(
    x: torch.Tensor, tiles: torch.Tensor, maxima: torch.Tensor, out: torch.Tensor, work: torch.Tensor
) -> None:
    """``out = x @ W.T``, x ``[M, K]`` fp32, K a multiple of ``SPAN``, W packed by `pack_bf16` and its `head_maxima`;
    ``out`` ``[M, 16 * tiles]`` fp32. ``work``: as ``nf4_linear.nf4_linear``'s."""
    m, k = x.shape
    launch(
        quantise_kernel, x.data_ptr(), x.stride(0) * 4, m, k, work.data_ptr(), work.stride(0) * 4, tiles.data_ptr(),
        maxima.data_ptr(), tiles.shape[0], out.data_ptr(), out.stride(0) * 4, 0, 0, then=_head_kernel,
        keep=(x, tiles, maxima, out, work),
    )  # fmt: skip
