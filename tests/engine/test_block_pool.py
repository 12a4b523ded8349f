from __future__ import annotations

import random

import pytest

from manylora.server.engine.scheduling.block_pool import BlockPool


def test_pages_are_distinct_and_come_back() -> None:
    pool = BlockPool(num_pages=5, page_size=16)
    first, second = pool.allocate(2), pool.allocate(3)
    assert first is not None
    assert second is not None
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pool.allocate(1) is None
    pool.free(first)
    assert (pool.num_free, pool.num_used) == (2, 3)
    pool.check_integrity([second])


def test_nothing_is_taken_if_not_all_can_be() -> None:
    pool = BlockPool(num_pages=3, page_size=16)
    assert pool.allocate(4) is None
    assert pool.num_free == 3


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert BlockPool(num_pages=1, page_size=16).pages_for(tokens) == pages


@pytest.mark.parametrize("page", [0, 3, -1])
def test_freeing_what_is_not_in_use_is_an_error(page: int) -> None:
    pool = BlockPool(num_pages=3, page_size=16)
    with pytest.raises(RuntimeError, match=f"page {page} was freed"):
        pool.free([page])


def test_integrity_check_names_the_numbers() -> None:
    pool = BlockPool(num_pages=4, page_size=16)
    pages = pool.allocate(2)
    assert pages is not None
    with pytest.raises(RuntimeError, match=r"2 are in use, but requests hold 1 \(of 4\)"):
        pool.check_integrity([pages[:1]])
    pool._free.append(pages[0])
    with pytest.raises(RuntimeError, match="3 free \\+ 0 cached \\+ 2 used != 4"):
        pool.check_integrity()
    pool._free[0] = pool._free[1]
    pool._users[pages[0]] = 0
    with pytest.raises(RuntimeError, match="not distinct"):
        pool.check_integrity()


def test_random_use_conserves_pages() -> None:
    rng = random.Random(0)
    pool = BlockPool(num_pages=20, page_size=4)
    held: list[list[int]] = []
    for _ in range(500):
        if held and rng.random() < 0.5:
            pool.free(held.pop(rng.randrange(len(held))))
        elif (pages := pool.allocate(rng.randrange(6))) is not None:
            held.append(pages)
        used = [page for pages in held for page in pages]
        assert len(set(used)) == len(used)
        pool.check_integrity(held)
