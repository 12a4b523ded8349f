"""Which rows and tiles of a product a part computes: what adds to them can then follow it part by part.

Rows are cut into groups, tiles into chunks, and a part takes consecutive pairs of the two, chunk by chunk: of each
chunk it takes, all groups but in its first and its last one.
"""

from __future__ import annotations

from typing import Final

from numba import njit

CODE_BYTES: Final = 128 << 10
"""Of packed codes that are multiplied with all groups before the next are touched: they stay in L2."""


@njit(nogil=True)
def chunk_tiles(groups, depth):
    """Tiles that each group of rows takes before the next group does: more where there are many groups, so that what
    is read again stays in L2, be it codes or x."""
    return 1 if groups == 1 else 2 * max(1, min(groups // 3, CODE_BYTES // (16 * depth)))


@njit(nogil=True)
def items_of(groups, depth, tiles):
    """How many pairs of a group and a chunk there are; parts share them out."""
    at_once = chunk_tiles(groups, depth)
    return (tiles + at_once - 1) // at_once * groups


@njit(nogil=True)
def next_region(item, last_item, groups, depth, tiles):
    """Of a part's pairs ``item .. last_item - 1`` the first that make up a rectangle: its groups ``first .. last - 1``
    and tiles, in the same way, and the pair behind them."""
    at_once = chunk_tiles(groups, depth)
    group, tile = item % groups, item // groups * at_once
    chunks = (last_item - item) // groups
    if group == 0 and chunks > 0:
        return 0, groups, tile, min(tile + chunks * at_once, tiles), item + chunks * groups
    last_group = min(groups, group + last_item - item)
    return group, last_group, tile, min(tile + at_once, tiles), item + last_group - group
