"""Loops over the micro-kernel shared by all CPU kernels: rows are cut into near-equal groups."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from manylora.kernels.cpu.emit import gemm_tile, gemm_tiles
from manylora.kernels.cpu.target import TARGET

_GROUP = len(TARGET.gemm_tiles) - 1
"""Rows of a micro-kernel at most."""
_TILES_AT_ONCE = TARGET.gemm_tiles


@njit(nogil=True, inline="never")
def gemm_rows(rows, x, x_offsets, panel, stride, depth, c, c_offsets, accumulate):
    """``c[r, 0:16] (+)= x[r, 0:depth] @ panel[0:depth, 0:16]`` for any number of rows.

    Addresses and byte offsets are int64; ``x_offsets`` and ``c_offsets`` are addresses of int64 arrays ``[rows]``.
    """
    groups = (rows + _GROUP - 1) // _GROUP
    done = 0
    for g in range(groups):
        # Near-equal groups: 8 rows are 4 + 4, not 6 + 2, because a small group starves the multipliers.
        size = (rows - done + groups - g - 1) // (groups - g)
        gemm_tile(size, x, x_offsets + 8 * done, panel, stride, depth, c, c_offsets + 8 * done, accumulate)
        done += size


@njit(nogil=True, inline="never")
def gemm_panel(rows, tiles, x, x_offsets, panel, stride, depth, c, c_offsets, accumulate):
    """The same for a panel of several tiles: more columns at once hide the latency of the FMAs of few rows."""
    at_once = _TILES_AT_ONCE[min(rows, _GROUP)]
    t = 0
    if at_once > 1:
        groups = (rows + _GROUP - 1) // _GROUP
        while t + at_once <= tiles:
            done = 0
            for g in range(groups):
                size = (rows - done + groups - g - 1) // (groups - g)
                gemm_tiles(
                    size, x, x_offsets + 8 * done, panel + 64 * t, stride, depth, c + 64 * t, c_offsets + 8 * done,
                    accumulate,
                )  # fmt: skip
                done += size
            t += at_once
    while t < tiles:
        gemm_rows(rows, x, x_offsets, panel + 64 * t, stride, depth, c + 64 * t, c_offsets, accumulate)
        t += 1


@njit(nogil=True)
def share(total, part, parts, grain):
    """The part-th contiguous share of ``total``, in multiples of ``grain``."""
    grains = (total + grain - 1) // grain
    first, last = grains * part // parts * grain, grains * (part + 1) // parts * grain
    return first, min(last, total)


@intrinsic
def address_of(typingctx, array):
    """The address of an array's first element. The array must be handed to ``keep_alive`` after the last use of it."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        data = cgutils.create_struct_proxy(sig.args[0])(context, b, args[0]).data
        return b.ptrtoint(data, ir.IntType(64))

    return types.int64(array), codegen


@intrinsic
def keep_alive(typingctx, array):
    """Nothing at run time: numba frees an array after its last use *by name*, and an address is no use of it."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return context.get_dummy_value()

    return types.void(array), codegen


@intrinsic
def float32_from_bits(typingctx, bits):
    """The fp32 value whose bit pattern is the low half of an int64: how a float travels among integer arguments."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.bitcast(b.trunc(args[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), codegen


@intrinsic
def _float32_pointer(typingctx, address):
    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.inttoptr(args[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.int64), codegen


@njit(nogil=True)
def float32_view(address, count):
    """``count`` fp32 values at ``address`` as an array, for code that the compiler vectorises by itself."""
    return carray(_float32_pointer(address), count)
