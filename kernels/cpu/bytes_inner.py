"""Inner loops of products in 8-bit integers as LLVM IR: fastest, and the least exact.

As ``nf4_inner`` with 16 bits, in spans of 32 positions:

    y[n] = sum over blocks of  largest[n] * (sum over the block's spans of  scale * sum of code[n, k] * level[k])

``vpdpbusd`` (AVX512-VNNI) adds up four products of bytes in each lane: twice as many as of 16 bits. It wants unsigned
bytes on one side, so a code is ``round(CODE_UNIT * value + CODE_ZERO)``, and from a span's sum ``bias`` is taken away,
``CODE_ZERO`` times the sum of its levels. Without that instruction the same sums take longer.

**The zero lies between two integers**, where the 16 values of NF4 are nearest to codes: with it at 128 they were off by
two thirds more. So 0 itself is off, by 1.3e-3 of a block's largest, but not the 16 values' mean. The bias is rounded,
by half of a product of 1 and 1 at most: 1e-5 of a span's sum.

**Rows of x lie side by side**, those of a group that are multiplied at once, as the micro-kernel reads them: for each
span two words of each row after each other, 4 times, then each row's scale and bias. So one register and constants
address them all, and neighbours lie in the same cache line. Many rows are multiplied with two tiles at once, as reading
a word for each product takes as long as the products.

**Exact positions.** ``EXACT`` positions of x, such as are large in nearly every row, may be left out of the integers
(LLM.int8(), Dettmers et al. 2022). They count as 0 when their spans are rounded, so their neighbours have the levels
for themselves, and an output ends with ``x * w`` of them in fp32, in ascending order, by multiply-adds. The weights
are made of the codes anew for each group of rows, five instructions for 16: columns of their own would be 10 % more
memory to read where few rows wait for that. A table says which they are: ``ENTRY`` numbers for each, then for each span
an int32 with the bits of its own.

**Sums** of a span are exact, and spans are added in order: as with 16 bits, a row's result depends neither on the rows
beside it nor on how wide vectors are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

from manylora.kernels.cpu.emit import (
    F32,
    I8,
    I32,
    I64,
    V8F,
    V8I,
    VECTORS,
    VF,
    VI,
    Builder,
    Value,
    branches,
    constant,
    function,
    fused_multiply_add,
    i64,
    int32_at,
    load,
    load_tile,
    offset,
    prefetch,
    splat,
    store,
    store_tile,
)
from manylora.kernels.cpu.nf4_inner import BYTES, SPAN, WORDS, load_span, products_of_words, scaled_span
from manylora.kernels.cpu.nf4_packing import GROUP
from manylora.kernels.cpu.target import HAS_BYTE_PRODUCTS, TARGET
from manylora.kernels.cpu.tiles import share

CODE_UNIT: Final = 124.12
"""What a difference of 1 is in codes."""
_ZERO_BITS: Final = 5
_ZERO: Final = 4101
CODE_ZERO: Final = _ZERO / 2**_ZERO_BITS
"""What 0 is in codes, as which it is no whole number: 128.16."""
LEVELS: Final = 127
"""Largest magnitude of an integer x."""
SPAN_BYTES: Final = SPAN + 8
"""Of a row and span: its levels, its scale and its bias."""
MOST_ROWS: Final = TARGET.nf4_byte_rows
"""Rows at most that are multiplied with a tile at once."""
PAIR_ROWS: Final = TARGET.nf4_byte_pair_rows
"""Rows at most that are multiplied with two tiles at once; 0: none are."""
MANY_ROWS: Final = 2 * MOST_ROWS + 1
"""Rows from which on two tiles are taken at once."""
EXACT: Final = 8
"""Positions of x that a weight may have multiplied as they are."""
ENTRY: Final = 4
"""Numbers that the kernels need of each of them: itself, and what ``Column`` wants."""
_WORDS_AT: Final = 4 * EXACT * ENTRY

Column = Callable[[Builder, Value, Value, Value], list[Value]]
"""What brings the weights of an exact position, fp32, of a tile's 16 outputs: of the codes and of the largest values at
two addresses, and the position's ``ENTRY`` numbers, int32, at a third."""
Group = Callable[[Builder, Value], list[list[Value]]]
"""What brings codes: of the ``GROUP`` positions and 16 outputs at an address, for each four positions, vectors with an
output's four codes side by side."""


def _dot(b: Builder, total: Value, codes: Value, levels: Value) -> Value:
    """``total`` int32, and in each lane the four products of unsigned ``codes`` and signed ``levels``, exact."""
    if HAS_BYTE_PRODUCTS:
        name = f"llvm.x86.avx512.vpdpbusd.{32 * TARGET.lanes}"
        return b.call(function(b, name, VI, VI, VI, VI), [total, b.bitcast(codes, VI), b.bitcast(levels, VI)])
    eight = ir.Constant(WORDS, [8] * WORDS.count)
    codes, levels = b.bitcast(codes, WORDS), b.bitcast(levels, WORDS)
    even = b.and_(codes, ir.Constant(WORDS, [255] * WORDS.count)), b.ashr(b.shl(levels, eight), eight)
    odd = b.lshr(codes, eight), b.ashr(levels, eight)
    return b.add(total, b.add(products_of_words(b, *even), products_of_words(b, *odd)))


def _micro_kernel(group: Group, column: Column, load_bytes: int, behind: int, shapes: range, tiles: int) -> Any:
    @intrinsic
    def multiply(typingctx, rows, levels, packed, absmax, stride, blocks, spans, c, c_stride, accumulate, exact):
        """``c[r] (+)= W x[r]``, as ``nf4_inner.fused_nf4``, for a group of ``rows`` rows, one of ``shapes``, as
        ``quantiser`` lays it out, and ``tiles`` tiles, whose ``absmax`` are ``stride`` bytes apart. ``exact``: a table
        of exact positions, or 0."""

        def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
            rows, *rest = args
            for count, _ in branches(b, rows, dict.fromkeys(shapes, 1)):
                _emit_rows(b, count, tiles, group, column, load_bytes, behind, *rest)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), codegen

    return multiply


def _emit_rows(
    b: Builder,
    rows: int,
    tiles: int,
    group: Group,
    column: Column,
    load_bytes: int,
    behind: int,
    levels: Value,
    packed: Value,
    absmax: Value,
    stride: Value,
    blocks: Value,
    spans: Value,
    c: Value,
    c_stride: Value,
    accumulate: Value,
    exact: Value,
) -> None:
    def vectors(kind: Any) -> list[list[Value]]:
        return [[cgutils.alloca_once(b, kind) for _ in range(VECTORS * tiles)] for _ in range(rows)]

    def load_tiles(first: Value, stride: Value) -> list[Value]:
        return [vector for t in range(tiles) for vector in load_tile(b, b.add(first, b.mul(stride, i64(t))))]

    def word(address: Value, kind: Any, vector: Any) -> Value:
        return splat(b, load(b, address, kind, 4), vector)

    fma = fused_multiply_add(b, VF)
    all_spans = b.mul(blocks, spans)
    out = [b.add(c, b.mul(c_stride, i64(r))) for r in range(rows)]
    totals, partial, sums = vectors(VF), vectors(VF), vectors(VI)
    if tiles > 1:  # for many rows, whose results do not stay in the caches until they are added to
        for place in out:
            for t in range(tiles):
                prefetch(b, offset(b, place, 64 * t), write=True)
    with b.if_else(b.icmp_signed("!=", accumulate, i64(0))) as (then, otherwise):
        with then:
            for row, place in zip(totals, out, strict=True):
                for total, value in zip(row, load_tiles(place, i64(64)), strict=True):
                    b.store(value, total)
        with otherwise:
            for row in totals:
                for total in row:
                    b.store(constant(0.0, VF), total)
    span_bytes = SPAN // GROUP * load_bytes
    tile_bytes = b.mul(all_spans, i64(span_bytes))
    any_exact = b.icmp_signed("!=", exact, i64(0))
    if behind:
        with b.if_then(any_exact):
            for t in range(tiles):
                columns = b.add(absmax, b.add(b.mul(stride, i64(t)), b.mul(blocks, i64(64))))
                for i in range(behind):
                    prefetch(b, offset(b, columns, 64 * i))
    with cgutils.for_range(b, blocks, intp=I64) as block:
        for row in partial:
            for one in row:
                b.store(constant(0.0, VF), one)
        with cgutils.for_range(b, spans, intp=I64) as within:
            span = b.add(b.mul(block.index, spans), within.index)
            x = b.add(levels, b.mul(span, i64(SPAN_BYTES * rows)))
            factors = [offset(b, x, SPAN * rows + 8 * r) for r in range(rows)]
            for row, factor in zip(sums, factors, strict=True):
                start = word(offset(b, factor, 4), I32, VI)
                for one in row:
                    b.store(start, one)
            first = b.add(packed, b.mul(span, i64(span_bytes)))
            codes = [b.add(first, b.mul(tile_bytes, i64(t))) for t in range(tiles)]
            for at in range(0, SPAN, GROUP):
                fours: list[list[Value]] = [[] for _ in range(GROUP // 4)]
                for place in (offset(b, one, at // GROUP * load_bytes) for one in codes):
                    prefetch(b, b.add(place, b.mul(tile_bytes, i64(tiles))))  # of the tiles that come next
                    for four, more in zip(fours, group(b, place), strict=True):
                        four += more
                for i, four in enumerate(fours, at // 4):
                    for r, own in enumerate(sums):
                        same = word(offset(b, x, 8 * (i // 2 * rows + r) + 4 * (i % 2)), I32, VI)
                        for one, vector in zip(own, four, strict=True):
                            b.store(_dot(b, b.load(one), vector, b.bitcast(same, BYTES)), one)
            for factor, own, row in zip(factors, sums, partial, strict=True):
                scale = word(factor, F32, VF)
                for one, value in zip(own, row, strict=True):
                    b.store(b.call(fma, [b.sitofp(b.load(one), VF), scale, b.load(value)]), value)
        largest = load_tiles(b.add(absmax, b.mul(block.index, i64(64))), stride)
        for row, values in zip(totals, partial, strict=True):
            for total, value, maximum in zip(row, values, largest, strict=True):
                b.store(b.call(fma, [b.load(value), maximum, b.load(total)]), total)
    with b.if_then(any_exact):  # last, as what it reads is in the caches by now
        kept = b.add(levels, b.mul(all_spans, i64(SPAN_BYTES * rows)))
        with cgutils.for_range(b, i64(EXACT), intp=I64) as position:
            entry = b.add(exact, b.mul(position.index, i64(4 * ENTRY)))
            weights = []
            for t in range(tiles):
                own = b.add(packed, b.mul(tile_bytes, i64(t)))
                weights += column(b, own, b.add(absmax, b.mul(stride, i64(t))), entry)
            values = b.add(kept, b.mul(position.index, i64(4)))
            for r, row in enumerate(totals):
                value = word(offset(b, values, 4 * EXACT * r), F32, VF)
                for weight, total in zip(weights, row, strict=True):
                    b.store(b.call(fma, [value, weight, b.load(total)]), total)
    for row, place in zip(totals, out, strict=True):
        store_tile(b, [b.load(total) for total in row], place)


def some_tiles(group: Group, load_bytes: int, column: Column, *, behind: int = 0) -> Any:
    """The product of a group of rows and some tiles whose codes ``group`` brings, ``load_bytes`` for ``GROUP``
    positions. ``behind``: if any position is exact, as many vectors of 64 bytes lie behind a tile's largest values."""
    single = _micro_kernel(group, column, load_bytes, behind, range(1, MOST_ROWS + 1), 1)
    # No smaller groups from MANY_ROWS on.
    pair = _micro_kernel(group, column, load_bytes, behind, range(PAIR_ROWS - 1, PAIR_ROWS + 1), 2)
    of_position = load_bytes // GROUP

    @njit(nogil=True, inline="never")
    def multiply(rows, levels, depth, packed, largest, tiles, block, y, y_stride, accumulate, pairs, exact):
        """A group of rows and ``tiles`` tiles from the first at ``packed``, two at once if there are ``pairs``."""
        blocks, spans = depth // block, block // SPAN
        stride = 64 * (blocks + (behind if exact != 0 else 0))
        tile = 0
        if PAIR_ROWS != 0:
            while pairs and tile + 1 < tiles:
                pair(
                    rows, levels, packed + of_position * tile * depth, largest + tile * stride, stride, blocks, spans,
                    y + 64 * tile, y_stride, accumulate, exact,
                )  # fmt: skip
                tile += 2
        while tile < tiles:
            single(
                rows, levels, packed + of_position * tile * depth, largest + tile * stride, stride, blocks, spans,
                y + 64 * tile, y_stride, accumulate, exact,
            )  # fmt: skip
            tile += 1

    return multiply


def quantiser(change: Callable[[Builder, list[Value]], list[Value]]) -> Any:
    """What makes integers of the values of x, once ``change`` has been made to each span of them, and the positions
    that are exact have become 0; their values are put behind the group's spans, ``EXACT`` of each row."""

    @intrinsic
    def quantise(typingctx, x, x_stride, rows, levels, without):
        """A span of a group of ``rows`` rows, ``SPAN`` fp32 values each at ``x`` and ``x_stride`` bytes on, as int8
        levels, fp32 scales and int32 biases at ``levels``, in the order that the module describes: x is about ``level *
        scale * CODE_UNIT``. Positions whose bits are set in ``without`` count as 0. A value that is not finite makes a
        scale that is not."""

        def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
            x, x_stride, rows, levels, without = args
            add_up = function(b, "llvm.vector.reduce.add.v8i32", I32, V8I)
            masks = _masks(b, without)
            with cgutils.for_range(b, rows, intp=I64) as loop:
                values = load_span(b, b.add(x, b.mul(loop.index, x_stride)))
                pairs = zip(values, masks, strict=True)
                values = change(b, [b.bitcast(b.and_(b.bitcast(value, V8I), mask), V8F) for value, mask in pairs])
                whole, scale = scaled_span(b, values, LEVELS, CODE_UNIT)
                place, step = b.add(levels, b.mul(loop.index, i64(8))), b.mul(rows, i64(8))
                for vector in whole:
                    store(b, b.trunc(vector, ir.VectorType(I8, 8)), place, 4)
                    place = b.add(place, step)
                low, high = b.add(whole[0], whole[1]), b.add(whole[2], whole[3])
                total = b.call(add_up, [b.add(low, high)])
                store(b, scale, place, 4)
                half = ir.Constant(I32, 1 << (_ZERO_BITS - 1))
                bias = b.add(b.mul(total, ir.Constant(I32, -_ZERO)), half)
                store(b, b.ashr(bias, ir.Constant(I32, _ZERO_BITS)), offset(b, place, 4), 4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    @njit(nogil=True)
    def quantised(part, parts, x, x_stride, rows, depth, levels, stride, exact):
        """A part of x as integers: spans of whole groups."""
        groups, spans = groups_of_rows(rows), depth // SPAN
        first, last = share(groups * spans, part, parts, 1)
        for item in range(first, last):
            group, span = item // spans, item % spans
            row, end = rows * group // groups, rows * (group + 1) // groups
            own, without = levels + row * stride, 0
            if exact != 0:
                without = int32_at(exact + _WORDS_AT, span)
                if span == 0:
                    _keep(x + row * x_stride, x_stride, end - row, own + SPAN_BYTES * (end - row) * spans, exact)
            own += SPAN_BYTES * (end - row) * span
            quantise(x + row * x_stride + 4 * SPAN * span, x_stride, end - row, own, without)

    return quantised


def _masks(b: Builder, without: Value) -> list[Value]:
    """For each vector of a span all bits of the positions that count, none of those whose bit is set in ``without``."""
    bits = splat(b, b.trunc(without, I32), V8I)
    own = [ir.Constant(V8I, [1 << (8 * v + lane) for lane in range(8)]) for v in range(SPAN // 8)]
    return [b.sext(b.icmp_signed("==", b.and_(bits, one), ir.Constant(V8I, [0] * 8)), V8I) for one in own]


@intrinsic
def _keep(typingctx, x, x_stride, rows, place, exact):
    """The values of a group's rows at the exact positions of a table, one row's behind another's."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        x, x_stride, rows, place, exact = args
        positions = [b.sext(load(b, offset(b, exact, 4 * ENTRY * i), I32, 4), I64) for i in range(EXACT)]
        with cgutils.for_range(b, rows, intp=I64) as loop:
            own = b.add(x, b.mul(loop.index, x_stride))
            to = b.add(place, b.mul(loop.index, i64(4 * EXACT)))
            for i, position in enumerate(positions):
                store(b, load(b, b.add(own, b.mul(position, i64(4))), F32, 4), offset(b, to, 4 * i), 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


def table_of(positions: Sequence[int], depth: int, places: Sequence[Sequence[int]]) -> torch.Tensor:
    """What the kernels need to know of ``EXACT`` positions, ascending and all different: int32 ``[EXACT * ENTRY + depth
    / SPAN]``. ``places``: what `Column` wants of each, besides itself."""
    if len(set(positions)) != EXACT or positions[0] < 0 or positions[-1] >= depth:
        raise ValueError(f"expected {EXACT} different positions below {depth}, got {positions}")
    words = np.zeros(depth // SPAN, np.uint32)
    for position in positions:
        words[position // SPAN] |= np.uint32(1 << position % SPAN)
    entries = [(position, *place) for position, place in zip(positions, places, strict=True)]
    return torch.from_numpy(np.concatenate((np.array(entries, np.int32).reshape(-1), words.view(np.int32))))


def groups_of(rows: int) -> int:
    """The groups that rows are cut into (see `regions`), nearly equal: 13 rows are 6 + 7, as codes are looked up for
    each."""
    most = PAIR_ROWS if PAIR_ROWS != 0 and rows >= MANY_ROWS else MOST_ROWS
    return (rows + most - 1) // most


groups_of_rows = njit(nogil=True)(groups_of)  # for kernels: called from Python it would be compiled while serving


def work_width(k: int) -> int:
    """fp32 values that hold a row of K inputs as integers, and its exact values."""
    return k // SPAN * SPAN_BYTES // 4 + EXACT
