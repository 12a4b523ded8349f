"""Loops over the micro-kernel shared by all CPU kernels: rows are cut into near-equal groups."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from manylora.kernels.cpu.emit import (
    BYTE_TILE,
    WORD_TILE,
    byte_gemm_tile,
    byte_gemm_tiles,
    gemm_tile,
    gemm_tiles,
    half_gemm_tile,
    half_gemm_tiles,
    word_gemm_tile,
    word_gemm_tiles,
)
from manylora.kernels.cpu.target import TARGET

_GROUP = len(TARGET.gemm_tiles) - 1
"""Rows of a micro-kernel at most."""
_TILES_AT_ONCE = TARGET.gemm_tiles


def _loops(tile: Any, tiles_at_once: Any, tile_bytes: int) -> tuple[Any, Any]:
    """``gemm_rows`` and ``gemm_panel`` over two micro-kernels, in whose panels tiles are ``tile_bytes`` apart."""

    @njit(nogil=True, inline="never")
    def rows_of_a_tile(rows, x, x_offsets, panel, stride, depth, c, c_offsets, accumulate, ahead):
        groups = (rows + _GROUP - 1) // _GROUP
        done = 0
        for g in range(groups):
            # Near-equal groups: 8 rows are 4 + 4, not 6 + 2, because a small group starves the multipliers.
            size = (rows - done + groups - g - 1) // (groups - g)
            tile(size, x, x_offsets + 8 * done, panel, stride, depth, c, c_offsets + 8 * done, accumulate, ahead)
            done += size

    @njit(nogil=True, inline="never")
    def rows_of_a_panel(rows, tiles, x, x_offsets, panel, stride, depth, c, c_offsets, accumulate, ahead):
        at_once = _TILES_AT_ONCE[min(rows, _GROUP)]
        t = 0
        if at_once > 1:
            groups = (rows + _GROUP - 1) // _GROUP
            while t + at_once <= tiles:
                done = 0
                for g in range(groups):
                    size = (rows - done + groups - g - 1) // (groups - g)
                    tiles_at_once(
                        size, x, x_offsets + 8 * done, panel + tile_bytes * t, stride, depth, c + 64 * t,
                        c_offsets + 8 * done, accumulate, ahead,
                    )  # fmt: skip
                    done += size
                t += at_once
        while t < tiles:
            rows_of_a_tile(
                rows, x, x_offsets, panel + tile_bytes * t, stride, depth, c + 64 * t, c_offsets, accumulate, ahead
            )  # fmt: skip
            t += 1

    return rows_of_a_tile, rows_of_a_panel


gemm_rows, gemm_panel = _loops(gemm_tile, gemm_tiles, 64)
"""``gemm_rows(rows, x, x_offsets, panel, stride, depth, c, c_offsets, accumulate, ahead)``: ``c[r, 0:16] (+)= x[r,
0:depth] @ panel[0:depth, 0:16]`` for any number of rows. ``gemm_panel(rows, tiles, ...)``: the same for a panel of
several tiles, as more columns at once hide the latency of the FMAs of few rows.

Addresses and byte offsets are int64; ``x_offsets`` and ``c_offsets`` are addresses of int64 arrays ``[rows]``. The
panel ``ahead`` bytes further on, which is wanted next, is fetched into the cache meanwhile; 0: none."""
half_gemm_rows, half_gemm_panel = _loops(half_gemm_tile, half_gemm_tiles, 32)
"""The same for panels of bf16."""
word_gemm_rows, word_gemm_panel = _loops(word_gemm_tile, word_gemm_tiles, WORD_TILE)
byte_gemm_rows, byte_gemm_panel = _loops(byte_gemm_tile, byte_gemm_tiles, BYTE_TILE)
"""The same for panels of int16 and of int8, each of which stands for its own value; a panel's tiles lie one behind the
other."""


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


def _pointer_to(kind: Any, of: Any) -> Any:
    @intrinsic
    def pointer(typingctx, address):
        def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
            return b.inttoptr(args[0], kind.as_pointer())

        return types.CPointer(of)(types.int64), codegen

    return pointer


_float32_pointer = _pointer_to(ir.FloatType(), types.float32)
_int16_pointer = _pointer_to(ir.IntType(16), types.int16)


@njit(nogil=True)
def float32_view(address, count):
    """``count`` fp32 values at ``address`` as an array, for code that the compiler vectorises by itself."""
    return carray(_float32_pointer(address), count)


@njit(nogil=True)
def int16_view(address, count):
    """The same of int16."""
    return carray(_int16_pointer(address), count)


@intrinsic
def _int64_pointer(typingctx, address):
    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.inttoptr(args[0], ir.IntType(64).as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@njit(nogil=True)
def int64_view(address, count):
    """The same of int64 values."""
    return carray(_int64_pointer(address), count)
