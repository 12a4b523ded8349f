"""What parts of a product compute: each row and tile once, and the same for whoever follows."""

from __future__ import annotations

from types import FunctionType

import pytest

from manylora.kernels.cpu import available

pytestmark = pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")


@pytest.mark.parametrize("depth", [64, 1536])
def test_parts_cover_everything_once(depth: int) -> None:
    from manylora.kernels.cpu.regions import items_of, next_region
    from manylora.kernels.cpu.tiles import share

    for groups in (1, 2, 3, 7, 40):
        for tiles in (1, 2, 5, 36, 61):
            for parts in (1, 2, 6, 9):
                seen: dict[tuple[int, int], int] = {}
                for part in range(parts):
                    item, last = share(items_of(groups, depth, tiles), part, parts, 1)
                    regions = 0
                    while item < last:
                        group, last_group, tile, last_tile, item = next_region(item, last, groups, depth, tiles)
                        assert group < last_group <= groups
                        assert tile < last_tile <= tiles
                        regions += 1
                        for g in range(group, last_group):
                            for t in range(tile, last_tile):
                                assert (g, t) not in seen
                                seen[g, t] = part
                    assert regions <= 3, "what begins in the middle, whole chunks, what ends in the middle"
                assert len(seen) == groups * tiles


def test_rows_are_cut_without_compiling_anything() -> None:
    """It is asked for with each product that has adapters, while serving, and kernels cut rows by the same."""
    from manylora.kernels.cpu import bytes_inner, nf4_linear

    for module in (bytes_inner, nf4_linear):
        assert isinstance(module.groups_of, FunctionType)
    assert all(bytes_inner.groups_of(rows) == bytes_inner.groups_of_rows(rows) for rows in range(1, 60))
