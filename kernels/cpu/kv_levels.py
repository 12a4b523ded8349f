"""Keys and values as 16-bit integers: a vector of one token and head has ``LEVELS`` levels each way and one fp32 scale.

``level = round(x * LEVELS / largest)``, ``scale = largest / LEVELS``, largest being the vector's largest magnitude: a
value is off by at most half a level, 1.5e-5 of the largest. That is a 128th of what bf16 may do to the largest itself,
and half the bytes of fp32. A vector with a value that is not finite has a scale that is not, and levels of zero; the
products that read it are NaN. A vector below 1e-34, for which the factor overflows, is one of zeros.

A head's page is its 16 vectors' levels, then their 16 scales: ``page_width`` int16 in all, a multiple of 64 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

from manylora.kernels.cpu.emit import (
    I16,
    I32,
    I64,
    V8F,
    V8I,
    VECTORS,
    VF,
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
from manylora.kernels.cpu.target import TARGET
from manylora.kernels.cpu.tiles import float32_view, int16_view
from manylora.kernels.cpu.vectors import reduce_8
from manylora.kernels.ops import PAGE_SIZE

LEVELS: Final = 32767
_V8S = ir.VectorType(I16, 8)


def page_width(head_dim: int) -> int:
    """int16 values of a head's page."""
    return PAGE_SIZE * (head_dim + 2)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What is held of vectors ``[..., head_dim]`` fp32, as fp64: the levels times the scale, as the kernels round."""
    largest = x.abs().amax(-1, keepdim=True)
    # torch.div, as a Python number over a tensor is rounded twice.
    levels = torch.round(x * torch.div(torch.full_like(largest, LEVELS), largest))
    return levels.nan_to_num(0.0, 0.0, 0.0).double() * largest.double() / LEVELS


@intrinsic
def _quantise(typingctx, x, levels, vectors):
    """``8 * vectors`` fp32 values at ``x`` as int16 ``levels``, which may begin where ``x`` does; returns the scale."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        x, levels, vectors = args
        # Of what fits no int32 the processor makes the smallest int32, whose low half is zero.
        nearest = function(b, "llvm.x86.avx.cvt.ps2dq.256", V8I, V8F)
        found = cgutils.alloca_once(b, V8I)
        b.store(ir.Constant(V8I, [0] * 8), found)

        def larger(left: Value, right: Value) -> Value:
            return b.select(b.icmp_signed(">", left, right), left, right)

        with cgutils.for_range(b, vectors, intp=I64) as loop:
            # Bit patterns of magnitudes are in the order of their values, and NaN above all of them.
            bits = load(b, b.add(x, b.mul(loop.index, i64(32))), V8I, 4)
            b.store(larger(b.and_(bits, ir.Constant(V8I, [0x7FFFFFFF] * 8)), b.load(found)), found)
        largest = splat(b, b.bitcast(reduce_8(b, b.load(found), larger), V8F.element))
        factor = b.fdiv(constant(float(LEVELS)), largest)
        scale = b.fdiv(largest, constant(float(LEVELS)))
        with cgutils.for_range(b, vectors, intp=I64) as loop:
            value = load(b, b.add(x, b.mul(loop.index, i64(32))), V8F, 4)
            whole = b.trunc(b.call(nearest, [b.fmul(value, factor)]), _V8S)
            store(b, whole, b.add(levels, b.mul(loop.index, i64(16))), 2)
        return b.extract_element(scale, ir.Constant(I32, 0))

    return types.float32(*[types.int64] * 3), codegen


@njit(nogil=True)
def store_levels(key, value, k_page, v_page, within, head_dim):
    """Put a key and a value, fp32 vectors at these addresses that are overwritten, into place ``within`` of their
    head's pages: the key's levels every sixteenth, the value's side by side."""
    behind = 32 * head_dim + 4 * within
    # The levels of a vector are made in its own memory.
    scale = _quantise(key, key, head_dim // 8)
    float32_view(k_page + behind, 1)[0] = scale
    levels, column = int16_view(key, head_dim), int16_view(k_page, 16 * head_dim)
    for i in range(head_dim):
        column[16 * i + within] = levels[i]
    scale = _quantise(value, v_page + 2 * within * head_dim, head_dim // 8)
    float32_view(v_page + behind, 1)[0] = scale


@intrinsic
def weigh_16(typingctx, weights, scales, factor):
    """Multiply 16 fp32 ``weights`` by ``factor`` and by the ``scales`` of their tokens, in place. What weighs nothing
    is left at that, whatever the scale: the place may never have been written."""

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        weights, scales, factor = args
        factor = splat(b, factor, VF)
        for v in range(VECTORS):
            place, scale = (offset(b, address, 4 * TARGET.lanes * v) for address in (weights, scales))
            weight = b.fmul(load(b, place, VF, 4), factor)
            nothing = b.fcmp_ordered("==", weight, constant(0.0, VF))
            store(b, b.select(nothing, weight, b.fmul(weight, load(b, scale, VF, 4))), place, 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen
