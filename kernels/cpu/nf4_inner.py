"""Inner loops of the NF4 product as LLVM IR: 16-bit integers, whose products a vector instruction adds in pairs.

fp32 would spend most of its time on making fp32 values of the codes (twelve shuffles for 32 weights, four in 16 bits),
and an FMA does half as many products as ``vpmaddwd``. So both sides become integers, in **spans** of 32 positions:

    y[n] = sum over spans of  absmax[n] * scale * sum over the span of code[n, k] * level[k]

``code`` is the NF4 value times ``CODE_UNIT``, rounded. ``level`` is x times ``LEVELS`` over the span's largest
magnitude, rounded; ``scale`` takes both factors back. The inner sum is exact: 32 products fit an int32.

**What rounding costs.** A code is off by at most 4e-5 of its block's absmax, a value of x by at most 6e-5 of its span's
largest. Products are off by 1e-4 of themselves, 2e-4 if x has outliers: mostly a twelfth or less of what bf16 does to
them, in which a QLoRA base is usually multiplied (``test_rounding_is_far_below_that_of_bf16``).

**Order of summation.** The inner sum has none; a row's spans are added in order, ``fma(inner, absmax * scale, y)``,
whoever does it. A result therefore does not depend on which rows share the batch nor on how wide vectors are: bit for
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from manylora.kernels.cpu.emit import (
    F32,
    I8,
    I16,
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
    load,
    load_tile,
    offset,
    prefetch,
    shuffle,
    splat,
    store,
    store_tile,
)
from manylora.kernels.cpu.nf4_packing import GROUP
from manylora.kernels.cpu.target import HAS_512, TARGET
from manylora.kernels.nf4_code import NF4_CODE

SPAN: Final = 32
"""Positions that share a scale of x; a quantisation block is a multiple of it."""
CODE_UNIT: Final = 8005
"""What 1 is in integer codes: of 7000 to 8191 the one that the 16 codes are nearest to multiples of."""
LEVELS: Final = 8383
"""Largest magnitude of an integer x: as many as ``SPAN`` products with a code of 1 leave room for in an int32."""
SMALLEST: Final = 2.0**-100
"""A span whose magnitudes are all below counts as zeros, as ``LEVELS / largest`` must be finite."""

PAIR_BYTES: Final = 64
"""Two positions of a tile as integers."""

BYTES, WORDS = ir.VectorType(I8, 4 * TARGET.lanes), ir.VectorType(I16, 2 * TARGET.lanes)
_V8S = ir.VectorType(I16, 8)


def _planes() -> list[Value]:
    """The low and the high bytes of the 16 integer codes, repeated in each 128-bit lane for ``vpshufb``."""
    codes = [round(value * CODE_UNIT).to_bytes(2, "little", signed=True) for value in NF4_CODE]
    return [ir.Constant(BYTES, [code[byte] for code in codes] * (TARGET.lanes // 4)) for byte in range(2)]


def _by_name(b: Builder, wide: str, narrow: str, result: Any, left: Value, right: Value) -> Value:
    """The instruction ``wide`` of 512 bits or ``narrow`` of 256, or, for 512 bits where there is none, two of 256."""
    kind = left.type
    if TARGET.lanes == 8 or HAS_512:
        name = narrow if TARGET.lanes == 8 else wide
        return b.call(function(b, name, result, kind, kind), [left, right])
    half, found = ir.VectorType(kind.element, kind.count // 2), ir.VectorType(result.element, result.count // 2)
    both = []
    for first in (0, half.count):
        lanes = list(range(first, first + half.count))
        operands = [shuffle(b, vector, vector, lanes) for vector in (left, right)]
        both.append(b.call(function(b, narrow, found, half, half), operands))
    return shuffle(b, both[0], both[1], list(range(result.count)))


def look_up(b: Builder, table: Value, index: Value) -> Value:
    """``table[index]`` for each byte, within its 128-bit lane."""
    return _by_name(b, "llvm.x86.avx512.pshuf.b.512", "llvm.x86.avx2.pshuf.b", BYTES, table, index)


def products_of_words(b: Builder, left: Value, right: Value) -> Value:
    """``left[2 i] * right[2 i] + left[2 i + 1] * right[2 i + 1]``, int32."""
    return _by_name(b, "llvm.x86.avx512.pmaddw.d.512", "llvm.x86.avx2.pmadd.wd", VI, left, right)


def interleave(b: Builder, low: Value, high: Value, upper: bool) -> Value:
    """int16 of low and high bytes: of the lower or the upper eight bytes of each 128-bit lane (``vpunpck``)."""
    width = low.type.count
    places = [lane + 8 * upper + i for lane in range(0, width, 16) for i in range(8)]
    return b.bitcast(shuffle(b, low, high, [place for i in places for place in (i, width + i)]), WORDS)


def nibbles(b: Builder, address: Value) -> list[Value]:
    """The low and the high four bits of each of the ``8 * GROUP`` bytes at ``address``."""
    codes = load(b, address, BYTES, 1)
    shifted = b.bitcast(b.lshr(b.bitcast(codes, WORDS), ir.Constant(WORDS, [4] * WORDS.count)), BYTES)
    low = ir.Constant(BYTES, [15] * BYTES.count)
    return [b.and_(codes, low), b.and_(shifted, low)]


def _group(b: Builder, address: Value, _: Sequence[Value]) -> list[list[Value]]:
    """The integer codes of the ``GROUP`` positions and 16 outputs at ``address``: for each pair of positions, vectors
    with an output's two codes side by side. ``nf4_packing.FOR_WORDS`` is the order."""
    pairs = []
    for indices in nibbles(b, address):
        low, high = (look_up(b, plane, indices) for plane in _planes())
        vectors = [interleave(b, low, high, upper) for upper in (False, True)]
        pairs += [vectors] if VECTORS == 2 else [[vector] for vector in vectors]
    return pairs


def decoded_pair(b: Builder, address: Value, _: Sequence[Value]) -> list[list[Value]]:
    """The same from a decoded panel, one pair of positions."""
    return [[load(b, offset(b, address, 4 * TARGET.lanes * v), WORDS, 4) for v in range(VECTORS)]]


@intrinsic
def decode_nf4(typingctx, packed, panel, groups):
    """Decode ``groups`` groups of a tile's codes at ``packed`` to integers, ``PAIR_BYTES`` a pair of positions."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        packed, panel, groups = args
        with cgutils.for_range(b, groups, intp=I64) as loop:
            place = b.add(panel, b.mul(loop.index, i64(GROUP // 2 * PAIR_BYTES)))
            for i, pair in enumerate(_group(b, b.add(packed, b.mul(loop.index, i64(8 * GROUP))), ())):
                for v, vector in enumerate(pair):
                    store(b, vector, offset(b, place, i * PAIR_BYTES + 4 * TARGET.lanes * v), 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


Group = Callable[[Builder, Value, Sequence[Value]], list[list[Value]]]
"""What brings weights: of some positions at an address, given the block's absmax, for each pair of positions vectors
with an output's two integers side by side."""


def multiply_words(group: Group, positions: int, n_bytes: int, rows: int, *, fetched: bool) -> Any:
    """The micro-kernel for up to ``rows`` rows whose weights ``group`` brings, ``positions`` of them from ``n_bytes``
    bytes. ``fetched``: those of the next tile lie behind, and are fetched into the cache meanwhile."""

    @intrinsic
    def multiply(
        typingctx,
        rows,
        levels,
        scales,
        stride,
        weights,
        absmax,
        blocks,
        spans,
        c,
        c_stride,
        accumulate,
    ):
        def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
            rows, *rest = args
            for count, _ in branches(b, rows, dict.fromkeys(shapes, 1)):
                _emit_rows(b, count, group, positions, n_bytes, fetched, *rest)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), codegen

    shapes = range(1, rows + 1)
    return multiply


def _emit_rows(
    b: Builder,
    rows: int,
    group: Group,
    positions: int,
    n_bytes: int,
    fetched: bool,
    levels: Value,
    scales: Value,
    stride: Value,
    weights: Value,
    absmax: Value,
    blocks: Value,
    spans: Value,
    c: Value,
    c_stride: Value,
    accumulate: Value,
) -> None:
    def places(address: Value, stride: Value) -> list[Value]:
        return [b.add(address, b.mul(stride, i64(r))) for r in range(rows)]

    fma = fused_multiply_add(b, VF)
    x, factors, out = places(levels, stride), places(scales, stride), places(c, c_stride)
    totals = [[cgutils.alloca_once(b, VF) for _ in range(VECTORS)] for _ in range(rows)]
    sums = [[cgutils.alloca_once(b, VI) for _ in range(VECTORS)] for _ in range(rows)]
    with b.if_else(b.icmp_signed("!=", accumulate, i64(0))) as (then, otherwise):
        with then:
            for row, place in zip(totals, out, strict=True):
                for total, value in zip(row, load_tile(b, place), strict=True):
                    b.store(value, total)
        with otherwise:
            for row in totals:
                for total in row:
                    b.store(constant(0.0, VF), total)
    # The next tile's codes: by itself the processor asks too late for more than it keeps in its caches.
    ahead = b.mul(b.mul(blocks, spans), i64(SPAN // positions * n_bytes))
    with cgutils.for_range(b, blocks, intp=I64) as block:
        largest = load_tile(b, b.add(absmax, b.mul(block.index, i64(64))))
        with cgutils.for_range(b, spans, intp=I64) as within:
            span = b.add(b.mul(block.index, spans), within.index)
            for row in sums:
                for one in row:
                    b.store(ir.Constant(VI, [0] * TARGET.lanes), one)
            with cgutils.for_range(b, i64(SPAN // positions), intp=I64) as loop:
                at = b.add(b.mul(span, i64(SPAN // positions)), loop.index)
                if fetched:
                    prefetch(b, b.add(b.add(weights, ahead), b.mul(at, i64(n_bytes))))
                for i, pair in enumerate(group(b, b.add(weights, b.mul(at, i64(n_bytes))), largest)):
                    for row, own in zip(x, sums, strict=True):
                        place = offset(b, b.add(row, b.mul(at, i64(2 * positions))), 4 * i)
                        both = b.bitcast(splat(b, load(b, place, I32, 4), VI), WORDS)
                        for one, vector in zip(own, pair, strict=True):
                            b.store(b.add(b.load(one), products_of_words(b, vector, both)), one)
            for factor, own, row in zip(factors, sums, totals, strict=True):
                scale = splat(b, load(b, b.add(factor, b.mul(span, i64(4))), F32, 4), VF)
                for one, total, maximum in zip(own, row, largest, strict=True):
                    value = b.sitofp(b.load(one), VF)
                    b.store(b.call(fma, [value, b.fmul(maximum, scale), b.load(total)]), total)
    for row, place in zip(totals, out, strict=True):
        store_tile(b, [b.load(total) for total in row], place)


FUSED_ROWS: Final = TARGET.nf4_fused_rows
PANEL_ROWS: Final = TARGET.nf4_panel_rows
fused_nf4 = multiply_words(_group, GROUP, 8 * GROUP, FUSED_ROWS, fetched=True)
"""``fused_nf4(rows, levels, scales, stride, packed, absmax, blocks, spans, c, c_stride, accumulate)``: ``c[r] (+)=
W x[r]`` for up to ``FUSED_ROWS`` rows of integers (``quantise``), ``stride`` bytes apart, and the 16 outputs of a tile
of ``blocks`` quantisation blocks, ``spans`` spans each. Addresses, and strides in bytes."""
panel_nf4 = multiply_words(decoded_pair, 2, PAIR_BYTES, PANEL_ROWS, fetched=False)
"""The same for up to ``PANEL_ROWS`` rows and a panel of ``decode_nf4``."""


def _largest(b: Builder, vectors: Sequence[Value]) -> Value:
    """The largest of all lanes, int32, in every lane."""

    def larger(left: Value, right: Value) -> Value:
        return b.select(b.icmp_signed(">", left, right), left, right)

    found = vectors[0]
    for vector in vectors[1:]:
        found = larger(found, vector)
    for step in (4, 2, 1):
        found = larger(found, shuffle(b, found, found, [i ^ step for i in range(8)]))
    return found


def load_span(b: Builder, x: Value) -> list[Value]:
    """The ``SPAN`` fp32 values at ``x``."""
    return [load(b, offset(b, x, 32 * i), V8F, 4) for i in range(SPAN // 8)]


def scaled_span(b: Builder, values: Sequence[Value], levels: int, unit: float) -> tuple[list[Value], Value]:
    """A span's fp32 values as whole numbers up to ``levels``, int32, and what one of them times a code of which
    ``unit`` are 1 stands for, fp32."""
    nearest = function(b, "llvm.x86.avx.cvt.ps2dq.256", V8I, V8F)
    # Bit patterns of magnitudes are in the order of their values, and NaN above all of them.
    bits = [b.and_(b.bitcast(value, V8I), ir.Constant(V8I, [0x7FFFFFFF] * 8)) for value in values]
    peak = b.bitcast(_largest(b, bits), V8F)
    tiny = b.fcmp_ordered("<", peak, constant(SMALLEST))
    factor = b.select(tiny, constant(0.0), b.fdiv(constant(float(levels)), peak))
    scale = b.select(tiny, constant(0.0), b.fmul(peak, constant(1.0 / (levels * unit))))
    whole = [b.call(nearest, [b.fmul(value, factor)]) for value in values]
    return whole, b.extract_element(scale, ir.Constant(I32, 0))


@intrinsic
def quantise(typingctx, x, levels, scales, spans):
    """A row of ``SPAN * spans`` fp32 values at ``x`` as int16 ``levels``, and an fp32 scale a span: ``x`` is about
    ``level * scale * CODE_UNIT``. A span with a value that is not finite has a scale that is not."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        x, levels, scales, spans = args
        with cgutils.for_range(b, spans, intp=I64) as loop:
            target = b.add(levels, b.mul(loop.index, i64(2 * SPAN)))
            values = load_span(b, b.add(x, b.mul(loop.index, i64(4 * SPAN))))
            whole, scale = scaled_span(b, values, LEVELS, CODE_UNIT)
            for i, vector in enumerate(whole):
                store(b, b.trunc(vector, _V8S), offset(b, target, 16 * i), 2)
            store(b, scale, b.add(scales, b.mul(loop.index, i64(4))), 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen
