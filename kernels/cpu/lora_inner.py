"""The products of adapters as LLVM IR: micro-kernels like ``emit``'s, for few rows of each of several pages.

A row alone, or a few, are too few chains of FMAs for their latency, and one page at a time too few requests to memory:
so several pages' are multiplied at once, each by its own rows. Each sum is the chain it would be alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from numba.core import cgutils, types
from numba.extending import intrinsic

from manylora.kernels.cpu.emit import (
    I64,
    Builder,
    Rows,
    Value,
    addresses,
    branches,
    byte_tile,
    half_tile,
    i64,
    load_tile,
    prefetch,
    word_tile,
)
from manylora.kernels.cpu.target import TARGET

APART: Final = 4
"""Products that ``*_gemm_apart`` computes at once: enough chains of FMAs for what memory brings."""


def _gemm_apart(columns: Callable[[Builder, Value], list[Value]]) -> Callable[..., Any]:
    """``c[i] = x[i][0:depth] @ panel[i][0:depth]`` of one row and one tile each, for up to ``APART`` panels at once: a
    row alone is one chain of FMAs, which waits for itself. All but ``count``, ``panel_stride``, ``depth`` and
    ``ahead`` are addresses of int64 arrays ``[count]``: of rows, panels and outputs. ``ahead``: as in ``gemm``."""

    @intrinsic
    def gemm(typingctx, count, x, panels, panel_stride, depth, c, ahead):
        def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
            count, x, panels, panel_stride, depth, c, ahead = args
            for n, _ in branches(b, count, dict.fromkeys(range(1, APART + 1), 1)):
                each = zip(*(addresses(b, array, n) for array in (x, panels, c)), strict=True)
                products = [(Rows(b, 1, [own_x], [own_c]), panel) for own_x, panel, own_c in each]
                for state, _ in products:
                    state.start(i64(0))
                with cgutils.for_range(b, depth, intp=I64) as loop:
                    at = b.mul(loop.index, panel_stride)
                    for state, panel in products:
                        place = b.add(panel, at)
                        prefetch(b, b.add(place, ahead))
                        state.multiply(loop.index, columns(b, place))
                for state, _ in products:
                    state.finish()
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return gemm  # type: ignore[no-any-return]


gemm_apart, half_gemm_apart = _gemm_apart(load_tile), _gemm_apart(half_tile)
word_gemm_apart, byte_gemm_apart = _gemm_apart(word_tile), _gemm_apart(byte_tile)

FEW: Final = range(4, 8) if TARGET.lanes == 16 else range(0)
"""Rows of which two panels' are multiplied at once: so many alone are as many chains of FMAs, too few. Where a tile is
two vectors they are twice as many."""


def _gemm_two(columns: Callable[[Builder, Value], list[Value]]) -> Callable[..., Any]:
    """``c[i, r] = x[i, r][0:depth] @ panel[i][0:depth]`` of one tile, for two panels and ``rows`` rows each, one of
    ``FEW``. ``x`` and ``c`` are addresses of int64 arrays ``[2, rows]`` of rows' addresses. ``ahead``: as in
    ``gemm``."""

    @intrinsic
    def gemm(typingctx, rows, x, first_panel, second_panel, panel_stride, depth, c, ahead):
        def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
            rows, x, first_panel, second_panel, panel_stride, depth, c, ahead = args
            for n, _ in branches(b, rows, dict.fromkeys(FEW or (1,), 1)):
                own_x, own_c = addresses(b, x, 2 * n), addresses(b, c, 2 * n)
                first, second = Rows(b, 1, own_x[:n], own_c[:n]), Rows(b, 1, own_x[n:], own_c[n:])
                for state in (first, second):
                    state.start(i64(0))
                with cgutils.for_range(b, depth, intp=I64) as loop:
                    at = b.mul(loop.index, panel_stride)
                    for state, panel in ((first, first_panel), (second, second_panel)):
                        place = b.add(panel, at)
                        prefetch(b, b.add(place, ahead))
                        state.multiply(loop.index, columns(b, place))
                for state in (first, second):
                    state.finish()
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return gemm  # type: ignore[no-any-return]


gemm_two, half_gemm_two = _gemm_two(load_tile), _gemm_two(half_tile)
word_gemm_two, byte_gemm_two = _gemm_two(word_tile), _gemm_two(byte_tile)


def _add_apart(columns: Callable[[Builder, Value], list[Value]]) -> Callable[..., Any]:
    """``c[i][16 t + n] += x[i][0:depth] @ panel[i][t][0:depth, n]`` of one row each and ``tiles`` tiles, for up to
    ``APART`` panels at once. ``x``, ``panels``, ``later`` and ``c`` are addresses of int64 arrays ``[count]``. A tile's
    rows are ``row_stride`` bytes apart, tiles ``tile_stride``; what lies ``far`` tiles further on is asked for, and
    behind the last tile the first ones of ``later``."""

    @intrinsic
    def add(typingctx, count, x, panels, later, row_stride, tile_stride, depth, tiles, c, far):
        def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
            count, x, panels, later, row_stride, tile_stride, depth, tiles, c, far = args
            for n, _ in branches(b, count, dict.fromkeys(range(1, APART + 1), 1)):
                each = list(zip(*(addresses(b, array, n) for array in (x, panels, later, c)), strict=True))
                with cgutils.for_range(b, tiles, intp=I64) as tile:
                    place, ahead = b.mul(tile.index, tile_stride), b.add(tile.index, far)
                    behind = b.icmp_signed(">=", ahead, tiles)
                    ahead = b.mul(b.select(behind, b.sub(ahead, tiles), ahead), tile_stride)
                    column = b.mul(tile.index, i64(64))
                    products = []
                    for own_x, panel, after, own_c in each:
                        state = Rows(b, 1, [own_x], [b.add(own_c, column)])
                        state.start(i64(1))
                        wanted = b.add(b.select(behind, after, panel), ahead)
                        products.append((state, b.add(panel, place), wanted))
                    with cgutils.for_range(b, depth, intp=I64) as loop:
                        at = b.mul(loop.index, row_stride)
                        for state, panel, wanted in products:
                            prefetch(b, b.add(wanted, at))
                            state.multiply(loop.index, columns(b, b.add(panel, at)))
                    for state, _, _ in products:
                        state.finish()
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), codegen

    return add  # type: ignore[no-any-return]


add_apart, half_add_apart = _add_apart(load_tile), _add_apart(half_tile)
word_add_apart, byte_add_apart = _add_apart(word_tile), _add_apart(byte_tile)
