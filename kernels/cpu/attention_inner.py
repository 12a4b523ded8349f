"""The two products of attention as LLVM IR: micro-kernels like ``emit``'s, whose panels are the pages of a sequence.

Pages lie anywhere, so a micro-kernel is given a list of their addresses, in the order in which they are multiplied, and
asks for what comes a few entries later while it multiplies. The scores of several pages are computed at once: few rows
alone would not hide the latency of their FMAs. A tile of outputs stays in registers over all pages.

Panels hold fp32, or int16 with the fp32 scales of a page's 16 tokens behind them (``kv_levels``).

**Order of summation**: that of ``emit``. A score is one chain over the head, times its token's scale at the end; an
output one chain over the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

from manylora.kernels.cpu.emit import (
    I64,
    Builder,
    Rows,
    Value,
    branches,
    i64,
    load,
    load_tile,
    offset,
    prefetch,
    shapes_of,
    word_tile,
)
from manylora.kernels.cpu.target import TARGET

AHEAD: Final = 4
"""How many entries later the panel is that is asked for: as many as are multiplied at once. So many are read beyond the
end of the list."""
_GROUP: Final = len(TARGET.gemm_tiles) - 1
_TILES_AT_ONCE: Final = TARGET.gemm_tiles
Columns = Callable[[Builder, Value], list[Value]]


def _entry(b: Builder, panels: Value, index: Value) -> Value:
    return load(b, b.add(panels, b.mul(index, i64(8))), I64, 8)


def _scores(several: bool, columns: Columns, tile_bytes: int) -> Any:
    """``c[r, 16 t + n] = x[r, 0:depth] . panel t[0:depth, n]``, times that of the scales behind the panel, if it is of
    integers, for one panel or as many as ``TARGET.gemm_tiles`` says."""
    shapes = shapes_of(TARGET.gemm_tiles, several)

    @intrinsic
    def scores(typingctx, rows, x, x_offsets, panels, depth, c, c_offsets):
        def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
            rows, x, x_offsets, panels, depth, c, c_offsets = args
            behind = b.mul(depth, i64(tile_bytes))
            for count, tiles in branches(b, rows, shapes):
                state = Rows.at(b, count, tiles, x, x_offsets, c, c_offsets)
                state.start(i64(0))
                own, later = ([_entry(b, panels, i64(t + far)) for t in range(tiles)] for far in (0, AHEAD))
                with cgutils.for_range(b, depth, intp=I64) as loop:
                    at = b.mul(loop.index, i64(tile_bytes))
                    for panel in later:
                        prefetch(b, b.add(panel, at))
                    state.multiply(loop.index, [v for panel in own for v in columns(b, b.add(panel, at))])
                if columns is word_tile:
                    for panel in later:
                        prefetch(b, b.add(panel, behind))
                    state.scale([v for panel in own for v in load_tile(b, b.add(panel, behind))])
                state.finish()
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return scores


def _outputs(several: bool, columns: Columns, tile_bytes: int) -> Any:
    """``c[r] = sum over pages p of x[r, 16 p : 16 p + 16] @ panel p`` for one tile of columns, ``first`` bytes behind
    the panels' begin, or as many as ``TARGET.gemm_tiles`` says; of the last page ``last`` rows count. A panel's rows
    are ``stride`` bytes."""
    shapes = shapes_of(TARGET.gemm_tiles, several)

    @intrinsic
    def outputs(typingctx, rows, x, x_offsets, panels, pages, last, first, stride, c, c_offsets):
        def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
            rows, x, x_offsets, panels, pages, last, first, stride, c, c_offsets = args
            final = b.sub(pages, i64(1))
            for count, tiles in branches(b, rows, shapes):
                state = Rows.at(b, count, tiles, x, x_offsets, c, c_offsets)
                state.start(i64(0))
                with cgutils.for_range(b, pages, intp=I64) as page:
                    own = b.add(_entry(b, panels, page.index), first)
                    later = b.add(_entry(b, panels, b.add(page.index, i64(AHEAD))), first)
                    depth = b.select(b.icmp_signed("==", page.index, final), last, i64(16))
                    before = b.mul(page.index, i64(16))
                    with cgutils.for_range(b, depth, intp=I64) as loop:
                        at = b.mul(loop.index, stride)
                        places = [offset(b, at, tile_bytes * t) for t in range(tiles)]
                        for place in places[:: 64 // tile_bytes]:
                            prefetch(b, b.add(later, place))
                        weights = [v for place in places for v in columns(b, b.add(own, place))]
                        state.multiply(b.add(before, loop.index), weights)
                state.finish()
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), codegen

    return outputs


def _loops(columns: Columns, tile_bytes: int) -> tuple[Any, Any]:
    scores_tile, scores_tiles = (_scores(several, columns, tile_bytes) for several in (False, True))
    outputs_tile, outputs_tiles = (_outputs(several, columns, tile_bytes) for several in (False, True))

    @njit(nogil=True, inline="never")
    def scores_of_pages(rows, x, x_offsets, panels, pages, depth, c, c_offsets):
        groups = (rows + _GROUP - 1) // _GROUP
        # Near-equal groups: 9 rows are 5 + 4, not 8 + 1, because a small group starves the multipliers.
        at_once = _TILES_AT_ONCE[(rows + groups - 1) // groups]
        if _TILES_AT_ONCE[rows // groups] != at_once:
            at_once = 1
        t = 0
        while t < pages:
            several = at_once > 1 and t + at_once <= pages
            done = 0
            for g in range(groups):
                size = (rows - done + groups - g - 1) // (groups - g)
                xs, cs = x_offsets + 8 * done, c_offsets + 8 * done
                if several:
                    scores_tiles(size, x, xs, panels + 8 * t, depth, c + 64 * t, cs)
                else:
                    scores_tile(size, x, xs, panels + 8 * t, depth, c + 64 * t, cs)
                done += size
            t += at_once if several else 1

    @njit(nogil=True, inline="never")
    def outputs_of_pages(rows, tiles, x, x_offsets, panels, pages, last, c, c_offsets):
        groups = (rows + _GROUP - 1) // _GROUP
        stride = tile_bytes * tiles
        done = 0
        for g in range(groups):
            size = (rows - done + groups - g - 1) // (groups - g)
            at_once = _TILES_AT_ONCE[size]
            xs, cs = x_offsets + 8 * done, c_offsets + 8 * done
            t = 0
            while at_once > 1 and t + at_once <= tiles:
                outputs_tiles(size, x, xs, panels, pages, last, tile_bytes * t, stride, c + 64 * t, cs)
                t += at_once
            while t < tiles:
                outputs_tile(size, x, xs, panels, pages, last, tile_bytes * t, stride, c + 64 * t, cs)
                t += 1
            done += size

    return scores_of_pages, outputs_of_pages


scores_of_pages, outputs_of_pages = _loops(load_tile, 64)
"""``scores_of_pages(rows, x, x_offsets, panels, pages, depth, c, c_offsets)`` and ``outputs_of_pages(rows, tiles, x,
x_offsets, panels, pages, last, c, c_offsets)``, for any number of rows. ``panels`` is the address of an int64 array of
addresses, ``pages + AHEAD`` at least; the rest is as in ``tiles.gemm_rows``."""
integer_scores_of_pages, integer_outputs_of_pages = _loops(word_tile, 32)
"""The same for pages of int16."""
