"""Loops over a vector of fp32 values as LLVM IR: normalisation, softmax, SiLU, and what else is no product.

Lengths are given in vectors of eight. Sums are taken lane by lane, then across the lanes, always in the same order.
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
    V8F,
    V8I,
    Builder,
    Value,
    constant,
    function,
    i64,
    load,
    offset,
    splat,
    store,
)


@intrinsic
def scale_16(typingctx, address, factor):
    """Multiply the 16 fp32 values at ``address`` by ``factor``, in place."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        factor = splat(b, args[1])
        for half in range(2):
            place = offset(b, args[0], 32 * half)
            store(b, b.fmul(load(b, place, V8F, 4), factor), place, 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


def _exp(b: Builder, x: Value) -> Value:
    """e^x of eight lanes, to about 2 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, a degree-6 polynomial for e^r, times 2^n.

    The reduction and coefficients are those of the Cephes library (expf). Arguments are clamped to [-87.3, 88.3], where
    fp32 neither underflows nor overflows; NaN stays NaN.
    """
    fma = function(b, "llvm.fma.v8f32", V8F, V8F, V8F, V8F)
    rint = function(b, "llvm.rint.v8f32", V8F, V8F)
    low, high = constant(-87.3), constant(88.3)
    x = b.select(b.fcmp_ordered("<", x, low), low, x)
    x = b.select(b.fcmp_ordered(">", x, high), high, x)
    n = b.call(rint, [b.fmul(x, constant(1.44269504088896341))])
    r = b.call(fma, [n, constant(-0.693359375), x])
    r = b.call(fma, [n, constant(2.12194440e-4), r])
    p = constant(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = b.call(fma, [p, r, constant(coefficient)])
    p = b.fadd(b.call(fma, [p, b.fmul(r, r), r]), constant(1.0))
    # NaN has no integer: convert 0 there instead, p is NaN all the same.
    exponent = b.fptosi(b.select(b.fcmp_ordered("ord", n, n), n, constant(0.0)), V8I)
    bits = b.shl(b.add(exponent, ir.Constant(V8I, [127] * 8)), ir.Constant(V8I, [23] * 8))
    return b.fmul(p, b.bitcast(bits, V8F))


def _reduce(b: Builder, vector: Value, combine: Callable[[Value, Value], Value]) -> Value:
    """Fold eight lanes into one, always in the same order: 0+4, 1+5, ... then 0+2, 1+3, then 0+1."""
    undefined = ir.Constant(V8F, ir.Undefined)
    for step in (4, 2, 1):
        mask = [(i + step) % 8 for i in range(8)]
        vector = combine(vector, b.shuffle_vector(vector, undefined, ir.Constant(V8I, mask)))
    return b.extract_element(vector, ir.Constant(I32, 0))


def _max(b: Builder, left: Value, right: Value) -> Value:
    return b.select(b.fcmp_unordered(">", left, right), left, right)


@intrinsic
def softmax_8(typingctx, address, vectors, scale):
    """Replace ``s`` (``8 * vectors`` fp32 values) by ``exp(scale * (s - max s))``; returns nothing, see ``sum_8``."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        address, vectors, scale = args
        peak = cgutils.alloca_once(b, V8F)
        b.store(load(b, address, V8F, 4), peak)
        with cgutils.for_range(b, vectors, intp=I64) as loop:
            value = load(b, b.add(address, b.mul(loop.index, i64(32))), V8F, 4)
            b.store(_max(b, value, b.load(peak)), peak)
        top = splat(b, _reduce(b, b.load(peak), lambda left, right: _max(b, left, right)))
        factor = splat(b, scale)
        with cgutils.for_range(b, vectors, intp=I64) as loop:
            place = b.add(address, b.mul(loop.index, i64(32)))
            store(b, _exp(b, b.fmul(b.fsub(load(b, place, V8F, 4), top), factor)), place, 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def sum_8(typingctx, address, vectors):
    """The sum of ``8 * vectors`` fp32 values: lane by lane, then across the lanes."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        total = cgutils.alloca_once(b, V8F)
        b.store(constant(0.0), total)
        with cgutils.for_range(b, args[1], intp=I64) as loop:
            place = b.add(args[0], b.mul(loop.index, i64(32)))
            b.store(b.fadd(load(b, place, V8F, 4), b.load(total)), total)
        return _reduce(b, b.load(total), b.fadd)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def scale_8(typingctx, address, vectors, factor):
    """Multiply ``8 * vectors`` fp32 values by ``factor``, in place."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        factor = splat(b, args[2])
        with cgutils.for_range(b, args[1], intp=I64) as loop:
            place = b.add(args[0], b.mul(loop.index, i64(32)))
            store(b, b.fmul(load(b, place, V8F, 4), factor), place, 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def rms_norm_8(typingctx, x, weight, out, vectors, epsilon):
    """``out = x / sqrt(mean(x^2) + epsilon) * weight`` over ``8 * vectors`` fp32 values."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        x, weight, out, vectors, epsilon = args
        fma = function(b, "llvm.fma.v8f32", V8F, V8F, V8F, V8F)
        sqrt = function(b, "llvm.sqrt.f32", F32, F32)
        total = cgutils.alloca_once(b, V8F)
        b.store(constant(0.0), total)
        with cgutils.for_range(b, vectors, intp=I64) as loop:
            value = load(b, b.add(x, b.mul(loop.index, i64(32))), V8F, 4)
            b.store(b.call(fma, [value, value, b.load(total)]), total)
        count = b.sitofp(b.mul(vectors, i64(8)), F32)
        mean = b.fdiv(_reduce(b, b.load(total), b.fadd), count)
        factor = splat(b, b.fdiv(ir.Constant(F32, 1.0), b.call(sqrt, [b.fadd(mean, epsilon)])))
        with cgutils.for_range(b, vectors, intp=I64) as loop:
            step = b.mul(loop.index, i64(32))
            value = b.fmul(load(b, b.add(x, step), V8F, 4), factor)
            store(b, b.fmul(value, load(b, b.add(weight, step), V8F, 4)), b.add(out, step), 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.float32), codegen


@intrinsic
def silu_mul_8(typingctx, gate, up, out, vectors):
    """``out = gate * sigmoid(gate) * up`` over ``8 * vectors`` fp32 values."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        gate, up, out, vectors = args
        with cgutils.for_range(b, vectors, intp=I64) as loop:
            step = b.mul(loop.index, i64(32))
            g = load(b, b.add(gate, step), V8F, 4)
            silu = b.fdiv(g, b.fadd(constant(1.0), _exp(b, b.fneg(g))))
            store(b, b.fmul(silu, load(b, b.add(up, step), V8F, 4)), b.add(out, step), 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen
