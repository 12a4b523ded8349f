"""Loops over a vector of fp32 values as LLVM IR: normalisation, softmax, activations, and what else is no product.

Lengths are given in vectors of eight. Sums are taken lane by lane, then across the lanes, always in the same order: in
eight lanes also where registers have more, as the order is part of the result. What has no sum takes whole registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from manylora.kernels.cpu.emit import (
    F32,
    I32,
    I64,
    TILE,
    V8F,
    V8I,
    VECTORS,
    VF,
    Builder,
    Value,
    constant,
    function,
    fused_multiply_add,
    i64,
    load,
    offset,
    shuffle,
    splat,
    store,
)
from manylora.kernels.cpu.target import TARGET


def _each_vector(b: Builder, vectors: Value, emit: Callable[[Any, Value], None]) -> None:
    """Emit a loop over ``8 * vectors`` fp32 values, a register at a time, and the rest in eights: ``emit`` is given the
    vector type and the offset in bytes."""
    per_register = TARGET.lanes // 8
    registers = vectors if per_register == 1 else b.sdiv(vectors, i64(per_register))
    with cgutils.for_range(b, registers, intp=I64) as loop:
        emit(VF, b.mul(loop.index, i64(4 * TARGET.lanes)))
    if per_register > 1:
        done = b.mul(registers, i64(per_register))
        with cgutils.for_range(b, b.sub(vectors, done), intp=I64) as loop:
            emit(V8F, b.mul(b.add(done, loop.index), i64(32)))


def _splats(b: Builder, scalar: Value) -> Callable[[Any], Value]:
    """A scalar in all lanes of the vector type that ``_each_vector`` gives, made outside of its loop."""
    of = {kind.count: splat(b, scalar, kind) for kind in {8: V8F, TARGET.lanes: VF}.values()}
    return lambda kind: of[kind.count]


@intrinsic
def scale_16(typingctx, address, factor):
    """Multiply the 16 fp32 values at ``address`` by ``factor``, in place."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        factor = splat(b, args[1], VF)
        for v in range(TILE // TARGET.lanes):
            place = offset(b, args[0], 4 * TARGET.lanes * v)
            store(b, b.fmul(load(b, place, VF, 4), factor), place, 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def multiply_16(typingctx, address, factors):
    """Multiply the 16 fp32 values at ``address`` by those at ``factors``, in place."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        for v in range(TILE // TARGET.lanes):
            place, factor = (offset(b, address, 4 * TARGET.lanes * v) for address in args)
            store(b, b.fmul(load(b, place, VF, 4), load(b, factor, VF, 4)), place, 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


_LOWEST = -87.3
"""Arguments of ``_exp`` below it count as that."""


_MAGIC = 1.5 * 2.0**23 + 127
"""Added to a small number it leaves the nearest integer, plus the bias of an exponent, in the low bits."""


def _exp(b: Builder, x: Value, *, bounded: bool = False) -> Value:
    """e^x of each lane, to about 2 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, a degree-6 polynomial for e^r, times 2^n.

    The reduction and coefficients are those of the Cephes library (expf). Arguments are clamped to [-87.3, 88.3], where
    fp32 neither underflows nor overflows, unless they are known to be ``bounded`` by these; NaN stays NaN.
    """
    kind, integers = x.type, ir.VectorType(I32, x.type.count)
    fma = fused_multiply_add(b, kind)
    if not bounded:
        low, high = constant(_LOWEST, kind), constant(88.3, kind)
        x = b.select(b.fcmp_ordered("<", x, low), low, x)
        x = b.select(b.fcmp_ordered(">", x, high), high, x)
    biased = b.call(fma, [x, constant(1.44269504088896341, kind), constant(_MAGIC, kind)])
    n = b.fsub(biased, constant(_MAGIC, kind))
    r = b.call(fma, [n, constant(-0.693359375, kind), x])
    r = b.call(fma, [n, constant(2.12194440e-4, kind), r])
    p = constant(1.9875691500e-4, kind)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = b.call(fma, [p, r, constant(coefficient, kind)])
    p = b.fadd(b.call(fma, [p, b.fmul(r, r), r]), constant(1.0, kind))
    # Of NaN the power is anything, and p is NaN.
    return b.fmul(p, b.bitcast(b.shl(b.bitcast(biased, integers), ir.Constant(integers, [23] * kind.count)), kind))


def _tanh(b: Builder, x: Value) -> Value:
    """tanh of each lane, to about 2 ulp: near zero an odd polynomial, as 1 - 2 / (e^2x + 1) would cancel there.

    The bound and coefficients are those of the Cephes library (tanhf). NaN stays NaN.
    """
    kind = x.type
    fma = fused_multiply_add(b, kind)
    magnitude = b.call(function(b, f"llvm.fabs.v{kind.count}f32", kind, kind), [x])
    square = b.fmul(x, x)
    p = constant(-5.70498872745e-3, kind)
    for coefficient in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
        p = b.call(fma, [p, square, constant(coefficient, kind)])
    near = b.call(fma, [b.fmul(p, square), x, x])
    power = _exp(b, b.fadd(magnitude, magnitude))
    one = constant(1.0, kind)
    far = b.fsub(one, b.fdiv(constant(2.0, kind), b.fadd(power, one)))
    far = b.select(b.fcmp_ordered("<", x, constant(0.0, kind)), b.fneg(far), far)
    return b.select(b.fcmp_ordered("<", magnitude, constant(0.625, kind)), near, far)


def _gelu(b: Builder, x: Value) -> Value:
    """GELU of each lane in its tanh form, ``x / 2 * (1 + tanh(u))`` with ``u = sqrt(2 / pi) (x + 0.044715 x^3)``
    (Hendrycks and Gimpel 2016), written as ``x / (1 + e^-2u)``: the same, and nothing cancels for negative x."""
    kind = x.type
    fma = fused_multiply_add(b, kind)
    cubic = b.call(fma, [b.fmul(b.fmul(x, x), constant(0.044715, kind)), x, x])
    return b.fdiv(x, b.fadd(constant(1.0, kind), _exp(b, b.fmul(cubic, constant(-1.5957691216057308, kind)))))


def reduce_8(b: Builder, vector: Value, combine: Callable[[Value, Value], Value]) -> Value:
    """Fold eight lanes into one, always in the same order: 0+4, 1+5, ... then 0+2, 1+3, then 0+1."""
    undefined = ir.Constant(vector.type, ir.Undefined)
    for step in (4, 2, 1):
        mask = [(i + step) % 8 for i in range(8)]
        vector = combine(vector, b.shuffle_vector(vector, undefined, ir.Constant(V8I, mask)))
    return b.extract_element(vector, ir.Constant(I32, 0))


def _eight(b: Builder, vectors: Sequence[Value], combine: Callable[[Value, Value], Value]) -> Value:
    """Fold the sixteen lanes of a tile into eight: 0+8, 1+9, ..."""
    if len(vectors) == 1:
        wide = vectors[0]
        vectors = [shuffle(b, wide, wide, list(range(first, first + 8))) for first in (0, 8)]
    return combine(*vectors)


def _max(b: Builder, left: Value, right: Value) -> Value:
    return b.select(b.fcmp_unordered(">", left, right), left, right)


@intrinsic
def softmax_16(typingctx, address, tiles, scale):
    """Replace ``s`` (``16 * tiles`` fp32 values) by ``exp(scale * (s - max s))``, or zero where that is below 1e-38;
    returns their sum: lane by lane, in sixteen lanes, then across the lanes."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        address, tiles, scale = args
        lanes = range(VECTORS)

        def larger(left: Value, right: Value) -> Value:
            return _max(b, left, right)

        def places(index: Value) -> list[Value]:
            return [offset(b, b.add(address, b.mul(index, i64(64))), 4 * TARGET.lanes * v) for v in lanes]

        peaks = [cgutils.alloca_once(b, VF) for _ in lanes]
        totals = [cgutils.alloca_once(b, VF) for _ in lanes]
        for peak, total, place in zip(peaks, totals, places(i64(0)), strict=True):
            b.store(load(b, place, VF, 4), peak)
            b.store(constant(0.0, VF), total)
        with cgutils.for_range(b, tiles, intp=I64) as loop:
            for peak, place in zip(peaks, places(loop.index), strict=True):
                value, found = load(b, place, VF, 4), b.load(peak)
                # One instruction. It may pass NaN by, whose own exponential then spoils the sum.
                b.store(b.select(b.fcmp_ordered(">", value, found), value, found), peak)
        top = splat(b, reduce_8(b, _eight(b, [b.load(peak) for peak in peaks], larger), larger), VF)
        factor = splat(b, scale, VF)
        with cgutils.for_range(b, tiles, intp=I64) as loop:
            for total, place in zip(totals, places(loop.index), strict=True):
                exponent = b.fmul(b.fsub(load(b, place, VF, 4), top), factor)
                # Masked positions must weigh nothing at all, and a clamped exponential is not quite nothing. None is
                # above zero, but in a row that is NaN.
                nothing = b.fcmp_ordered("<", exponent, constant(_LOWEST, VF))
                value = b.select(nothing, constant(0.0, VF), _exp(b, exponent, bounded=True))
                store(b, value, place, 4)
                b.store(b.fadd(value, b.load(total)), total)
        add = b.fadd
        return reduce_8(b, _eight(b, [b.load(total) for total in totals], add), add)

    return types.float32(types.int64, types.int64, types.float32), codegen


@intrinsic
def highest_512(typingctx, address):
    """The largest of 512 fp32 values; NaN if one of them is."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        # Several chains, as one would wait for its own last comparison each time.
        chains, step = 4, 4 * TARGET.lanes
        places = [offset(b, args[0], step * i) for i in range(chains)]
        peaks = [cgutils.alloca_once_value(b, load(b, place, VF, 4)) for place in places]
        unordered = cgutils.alloca_once_value(b, ir.Constant(ir.VectorType(ir.IntType(1), TARGET.lanes), None))
        with cgutils.for_range(b, i64(512 // (chains * TARGET.lanes)), intp=I64) as loop:
            for place, peak in zip(places, peaks, strict=True):
                value = load(b, b.add(place, b.mul(loop.index, i64(chains * step))), VF, 4)
                b.store(_max(b, value, b.load(peak)), peak)
                b.store(b.or_(b.load(unordered), b.fcmp_unordered("uno", value, value)), unordered)
        found = [b.load(peak) for peak in peaks]
        top = _max(b, _max(b, found[0], found[1]), _max(b, found[2], found[3]))
        mask = b.bitcast(b.load(unordered), ir.IntType(TARGET.lanes))
        any_nan = b.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0))
        undefined = ir.Constant(VF, ir.Undefined)
        halves = [
            b.shuffle_vector(top, undefined, ir.Constant(V8I, list(range(first, first + 8))))
            for first in range(0, TARGET.lanes, 8)
        ]
        eight = halves[0] if len(halves) == 1 else _max(b, *halves)
        highest = reduce_8(b, eight, lambda left, right: _max(b, left, right))
        return b.select(any_nan, ir.Constant(F32, float("nan")), highest)

    return types.float32(types.int64), codegen


@intrinsic
def scale_8(typingctx, address, vectors, factor):
    """Multiply ``8 * vectors`` fp32 values by ``factor``, in place."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        address, vectors, factor = args
        factors = _splats(b, factor)

        def scale(kind: Any, at: Value) -> None:
            place = b.add(address, at)
            store(b, b.fmul(load(b, place, kind, 4), factors(kind)), place, 4)

        _each_vector(b, vectors, scale)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def rms_norm_8(typingctx, x, weight, out, vectors, epsilon):
    """``out = x / sqrt(mean(x^2) + epsilon) * weight`` over ``8 * vectors`` fp32 values."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        x, weight, out, vectors, epsilon = args
        fma = fused_multiply_add(b)
        sqrt = function(b, "llvm.sqrt.f32", F32, F32)
        total = cgutils.alloca_once(b, V8F)
        b.store(constant(0.0), total)
        with cgutils.for_range(b, vectors, intp=I64) as loop:
            value = load(b, b.add(x, b.mul(loop.index, i64(32))), V8F, 4)
            b.store(b.call(fma, [value, value, b.load(total)]), total)
        count = b.sitofp(b.mul(vectors, i64(8)), F32)
        mean = b.fdiv(reduce_8(b, b.load(total), b.fadd), count)
        factor = _splats(b, b.fdiv(ir.Constant(F32, 1.0), b.call(sqrt, [b.fadd(mean, epsilon)])))

        def normalise(kind: Any, at: Value) -> None:
            value = b.fmul(load(b, b.add(x, at), kind, 4), factor(kind))
            store(b, b.fmul(value, load(b, b.add(weight, at), kind, 4)), b.add(out, at), 4)

        _each_vector(b, vectors, normalise)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.float32), codegen


def _silu(b: Builder, x: Value) -> Value:
    """``x * sigmoid(x)``."""
    return b.fdiv(x, b.fadd(constant(1.0, x.type), _exp(b, b.fneg(x))))


def _gated(activate: Callable[[Builder, Value], Value]) -> Any:
    @intrinsic
    def gated_8(typingctx, gate, up, out, vectors):
        def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
            gate, up, out, vectors = args

            def multiply(kind: Any, at: Value) -> None:
                value = activate(b, load(b, b.add(gate, at), kind, 4))
                store(b, b.fmul(value, load(b, b.add(up, at), kind, 4)), b.add(out, at), 4)

            _each_vector(b, vectors, multiply)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return gated_8


silu_mul_8, gelu_mul_8 = _gated(_silu), _gated(_gelu)
"""``out = silu(gate) * up``, and GELU in its tanh form, over ``8 * vectors`` fp32 values: ``(gate, up, out, vectors)``,
three addresses."""


@intrinsic
def softcap_8(typingctx, address, vectors, factor, cap):
    """Replace ``8 * vectors`` fp32 values ``s`` by ``cap * tanh(factor * s)``."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        address, vectors, factor, cap = args
        factors, caps = _splats(b, factor), _splats(b, cap)

        def bound(kind: Any, at: Value) -> None:
            place = b.add(address, at)
            value = _tanh(b, b.fmul(load(b, place, kind, 4), factors(kind)))
            store(b, b.fmul(value, caps(kind)), place, 4)

        _each_vector(b, vectors, bound)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.float32), codegen


@intrinsic
def gelu_8(typingctx, x, out, vectors):
    """``out = gelu(x)`` over ``8 * vectors`` fp32 values, in its tanh form."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        x, out, vectors = args

        def activate(kind: Any, at: Value) -> None:
            store(b, _gelu(b, load(b, b.add(x, at), kind, 4)), b.add(out, at), 4)

        _each_vector(b, vectors, activate)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def layer_norm_8(typingctx, x, weight, bias, out, vectors, epsilon):
    """``out = (x - mean) / sqrt(variance + epsilon) * weight + bias`` over ``8 * vectors`` fp32 values.

    The mean first, then the mean square of what differs from it: in one pass the two would cancel.
    """

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        x, weight, bias, out, vectors, epsilon = args
        fma = fused_multiply_add(b)
        sqrt = function(b, "llvm.sqrt.f32", F32, F32)
        count = b.sitofp(b.mul(vectors, i64(8)), F32)
        total = cgutils.alloca_once(b, V8F)
        b.store(constant(0.0), total)
        with cgutils.for_range(b, vectors, intp=I64) as loop:
            value = load(b, b.add(x, b.mul(loop.index, i64(32))), V8F, 4)
            b.store(b.fadd(value, b.load(total)), total)
        mean = _splats(b, b.fdiv(reduce_8(b, b.load(total), b.fadd), count))
        b.store(constant(0.0), total)
        with cgutils.for_range(b, vectors, intp=I64) as loop:
            value = b.fsub(load(b, b.add(x, b.mul(loop.index, i64(32))), V8F, 4), mean(V8F))
            b.store(b.call(fma, [value, value, b.load(total)]), total)
        variance = b.fdiv(reduce_8(b, b.load(total), b.fadd), count)
        factor = _splats(b, b.fdiv(ir.Constant(F32, 1.0), b.call(sqrt, [b.fadd(variance, epsilon)])))

        def normalise(kind: Any, at: Value) -> None:
            value = b.fmul(b.fsub(load(b, b.add(x, at), kind, 4), mean(kind)), factor(kind))
            value = b.fadd(b.fmul(value, load(b, b.add(weight, at), kind, 4)), load(b, b.add(bias, at), kind, 4))
            store(b, value, b.add(out, at), 4)

        _each_vector(b, vectors, normalise)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, types.float32), codegen
