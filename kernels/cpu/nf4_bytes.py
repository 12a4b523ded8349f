"""``y = W x`` on the CPU with W in NF4 and both sides rounded to integers of 8 bits: fastest, and the least exact.

As ``nf4_linear`` with 16 bits, in spans of 32 positions:

    y[n] = sum over blocks of  absmax[n] * (sum over the block's spans of  scale * sum of code[n, k] * level[k])

A code is looked up as a byte, so that 64 of them take one shuffle, and ``vpdpbusd`` (AVX512-VNNI) adds up four products
in each lane: twice as many as of 16 bits. It wants unsigned bytes on one side: what is multiplied is ``code + 128``,
from which ``bias``, 128 times the sum of the span's levels, is taken away. Without that instruction the same sums take
longer.

**What rounding costs.** A code is off by at most 3.6e-3 of its block's absmax, a value of x by at most 3.9e-3 of its
span's largest: what llama.cpp does to x (its Q8_0 has the same spans), and three times what bf16 does to both (in
logits too: ``bench/accuracy.py``). Sums are exact, and spans are added in order: as with 16 bits, a row's
result depends neither on the rows beside it nor on how wide vectors are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from llvmlite import ir
from numba import carray
from numba.core import cgutils, types
from numba.extending import intrinsic

from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.emit import (
    F32,
    I8,
    I32,
    I64,
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
    load,
    load_tile,
    offset,
    prefetch,
    splat,
    store,
    store_tile,
)
from manylora.kernels.cpu.nf4_inner import BYTES, SPAN, WORDS, look_up, nibbles, products_of_words, scaled_span
from manylora.kernels.cpu.nf4_linear import Between, integer_product, quantised, shared_out
from manylora.kernels.cpu.nf4_packing import GROUP
from manylora.kernels.cpu.target import HAS_BYTE_PRODUCTS, TARGET
from manylora.kernels.nf4_code import NF4_CODE

CODE_UNIT: Final = 123
"""What 1 is in integer codes: of 64 to 127 the one that the 16 codes are nearest to multiples of."""
LEVELS: Final = 127
"""Largest magnitude of an integer x."""
_OFFSET: Final = 128
"""What is added to codes for them to be positive."""
_LOAD: Final = 8 * GROUP
"""Bytes of ``GROUP`` positions of a tile."""
MOST_ROWS: Final = TARGET.nf4_byte_rows
"""Rows at most that are multiplied with codes as they are looked up."""


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


def _group(b: Builder, address: Value) -> list[list[Value]]:
    """The codes of the ``GROUP`` positions and 16 outputs at ``address``: for each four positions, vectors with an
    output's four codes side by side. ``nf4_packing.FOR_BYTES`` is the order."""
    table = ir.Constant(BYTES, [_OFFSET + round(value * CODE_UNIT) for value in NF4_CODE] * (BYTES.count // 16))
    vectors = [look_up(b, table, indices) for indices in nibbles(b, address)]
    return [vectors] if VECTORS == 2 else [[vector] for vector in vectors]


@intrinsic
def _multiply(typingctx, rows, levels, scales, stride, packed, absmax, blocks, spans, c, c_stride, accumulate):
    """``c[r] (+)= W x[r]``, as ``nf4_inner.fused_nf4``, for up to ``MOST_ROWS`` rows of ``_quantise``. The biases lie
    behind the scales."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        rows, *rest = args
        for count, _ in branches(b, rows, dict.fromkeys(range(1, MOST_ROWS + 1), 1)):
            _emit_rows(b, count, *rest)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11), codegen


def _emit_rows(
    b: Builder,
    rows: int,
    levels: Value,
    scales: Value,
    stride: Value,
    packed: Value,
    absmax: Value,
    blocks: Value,
    spans: Value,
    c: Value,
    c_stride: Value,
    accumulate: Value,
) -> None:
    def places(address: Value, stride: Value) -> list[Value]:
        return [b.add(address, b.mul(stride, i64(r))) for r in range(rows)]

    def vectors(kind: Any) -> list[list[Value]]:
        return [[cgutils.alloca_once(b, kind) for _ in range(VECTORS)] for _ in range(rows)]

    fma = fused_multiply_add(b, VF)
    all_spans = b.mul(blocks, spans)
    x, factors, out = places(levels, stride), places(scales, stride), places(c, c_stride)
    biases = places(b.add(scales, b.mul(all_spans, i64(4))), stride)
    totals, partial, sums = vectors(VF), vectors(VF), vectors(VI)
    with b.if_else(b.icmp_signed("!=", accumulate, i64(0))) as (then, otherwise):
        with then:
            for row, place in zip(totals, out, strict=True):
                for total, value in zip(row, load_tile(b, place), strict=True):
                    b.store(value, total)
        with otherwise:
            for row in totals:
                for total in row:
                    b.store(constant(0.0, VF), total)
    loads = SPAN // GROUP
    ahead = b.mul(all_spans, i64(loads * _LOAD))  # the next tile's codes, as in nf4_inner
    with cgutils.for_range(b, blocks, intp=I64) as block:
        for row in partial:
            for one in row:
                b.store(constant(0.0, VF), one)
        with cgutils.for_range(b, spans, intp=I64) as within:
            span = b.add(b.mul(block.index, spans), within.index)
            for row, bias in zip(sums, biases, strict=True):
                start = splat(b, load(b, b.add(bias, b.mul(span, i64(4))), I32, 4), VI)
                for one in row:
                    b.store(start, one)
            with cgutils.for_range(b, i64(loads), intp=I64) as loop:
                at = b.add(b.mul(span, i64(loads)), loop.index)
                codes = b.add(packed, b.mul(at, i64(_LOAD)))
                prefetch(b, b.add(codes, ahead))
                for i, four in enumerate(_group(b, codes)):
                    for row, own in zip(x, sums, strict=True):
                        place = offset(b, b.add(row, b.mul(at, i64(GROUP))), 4 * i)
                        same = b.bitcast(splat(b, load(b, place, I32, 4), VI), BYTES)
                        for one, vector in zip(own, four, strict=True):
                            b.store(_dot(b, b.load(one), vector, same), one)
            for factor, own, row in zip(factors, sums, partial, strict=True):
                scale = splat(b, load(b, b.add(factor, b.mul(span, i64(4))), F32, 4), VF)
                for one, value in zip(own, row, strict=True):
                    b.store(b.call(fma, [b.sitofp(b.load(one), VF), scale, b.load(value)]), value)
        largest = load_tile(b, b.add(absmax, b.mul(block.index, i64(64))))
        for row, values in zip(totals, partial, strict=True):
            for total, value, maximum in zip(row, values, largest, strict=True):
                b.store(b.call(fma, [b.load(value), maximum, b.load(total)]), total)
    for row, place in zip(totals, out, strict=True):
        store_tile(b, [b.load(total) for total in row], place)


@intrinsic
def _quantise(typingctx, x, levels, scales, all_spans, spans):
    """A row's ``SPAN * spans`` fp32 values at ``x`` as int8 ``levels``, an fp32 scale a span, and behind the row's
    ``all_spans`` scales an int32 bias a span: ``x`` is about ``level * scale * CODE_UNIT``. A span with a value that is
    not finite has a scale that is not."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        x, levels, scales, all_spans, spans = args
        biases = b.add(scales, b.mul(all_spans, i64(4)))
        add_up = function(b, "llvm.vector.reduce.add.v8i32", I32, V8I)
        narrow = ir.VectorType(I8, 8)
        with cgutils.for_range(b, spans, intp=I64) as loop:
            target, index = b.add(levels, b.mul(loop.index, i64(SPAN))), b.mul(loop.index, i64(4))
            whole, scale = scaled_span(b, b.add(x, b.mul(loop.index, i64(4 * SPAN))), LEVELS, CODE_UNIT)
            for i, vector in enumerate(whole):
                store(b, b.trunc(vector, narrow), offset(b, target, 8 * i), 1)
            low, high = b.add(whole[0], whole[1]), b.add(whole[2], whole[3])
            store(b, scale, b.add(scales, index), 4)
            total = b.call(add_up, [b.add(low, high)])
            store(b, b.mul(total, ir.Constant(I32, -_OFFSET)), b.add(biases, index), 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


_quantised, _product = quantised(_quantise, 1), shared_out(_multiply, MOST_ROWS, 1)


@kernel
def _quantise_bytes_kernel(arguments, part, parts):
    a = carray(arguments, 14)
    _quantised(part, parts, a[0], a[1], a[2], a[3], a[4], a[5], a[13])


@kernel
def _nf4_bytes_kernel(arguments, part, parts):
    a = carray(arguments, 13)
    rows, depth, levels, stride, packed, absmax, n_tiles = a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    y, y_stride, block, accumulate = a[9], a[10], a[11], a[12]
    _product(part, parts, rows, levels, stride, depth, packed, absmax, n_tiles, y, y_stride, block, accumulate)


def work_width(k: int) -> int:
    """Of ``nf4_bytes_linear``'s ``work`` for K inputs."""
    return k // 4 + 2 * (k // SPAN)


def nf4_bytes_linear(
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
    """``out (+)= x @ W.T``, as ``nf4_linear.nf4_linear``, of a weight packed ``FOR_BYTES``. ``work``: ``[M,
    work_width(K)]`` fp32 for x as integers, a row's K levels, then its scales, then its biases."""
    integer_product(
        _quantise_bytes_kernel, _nf4_bytes_kernel, x, packed, absmax, blocksize, out, work, accumulate=accumulate,
        between=between,
    )  # fmt: skip
