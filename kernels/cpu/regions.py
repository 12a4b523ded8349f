"""Which rows and tiles of a product a part computes: what adds to them can then follow it part by part."""

from __future__ import annotations

from numba import njit

from manylora.kernels.cpu.tiles import share


@njit(nogil=True)
def cut(rows, most_rows, parts):
    """Into how many groups of up to ``most_rows`` rows a product is cut, and each of them into how many shares of its
    tiles. The items, group by group, are shared out to the parts in equal numbers."""
    groups = (rows + most_rows - 1) // most_rows
    if groups == 1:
        return 1, parts
    # Parts get rows of their own if there are enough for all, as each reads less of x then.
    return groups, 1 if groups >= 2 * parts else (2 * parts + groups - 1) // groups


@njit(nogil=True)
def next_region(item, last_item, groups, shares, tiles):
    """The groups ``first .. last - 1`` and tiles of the next of a part's items, and the item behind them: groups that
    are not cut further are taken together."""
    if shares == 1:
        return item, last_item, 0, tiles, last_item
    first, last = share(tiles, item % shares, shares, 1)
    return item // shares, item // shares + 1, first, last, item + 1
