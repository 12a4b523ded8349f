"""The pool's books: what fits, what is refused and why, what is free after any sequence of writes and clears."""

from __future__ import annotations

import math
import random
import threading

import pytest
import torch

from manylora.kernels.lora_pool import LoraPool, PoolFull, _highest
from manylora.kernels.lora_weights import LoraPair, LoraVectors, LoraWeights, TableRows
from tests.kernels.shapes import SHAPES, random_weights

VOCAB, HIDDEN = SHAPES.out_features["lm_head"], SHAPES.out_features["embed"]
WIDE = 8 * VOCAB * HIDDEN


def pool_of(**options: object) -> LoraPool:
    return LoraPool(SHAPES, **{"max_slots": 4, "max_pages": 6, "max_rank": 64, "table_bytes": WIDE} | options)  # type: ignore[arg-type]


def with_table(name: str, ids: list[int], dtype: torch.dtype = torch.float32) -> LoraWeights:
    return LoraWeights({}, {}, {name: TableRows(torch.tensor(ids), torch.ones(len(ids), HIDDEN, dtype=dtype))})


def with_bias(projection: str = "q", value: float = 1.0) -> LoraWeights:
    bias = torch.full((SHAPES.out_features[projection],), value)
    return LoraWeights({}, {(projection, 0): LoraVectors(bias=bias)})


def test_each_reason_not_to_fit_names_what_to_do() -> None:
    pool = pool_of(table_bytes=5000)
    assert pool.fits(random_weights(64, ("q", "embed"), 1)) is None
    assert pool.fits(random_weights(65, ("q",), 1)) == "its rank 65 is above the server's --max-rank 64"
    assert pool_of(max_pages=2).fits(random_weights(33, ("v",), 1)) == "it needs 3 pages of `v`, the pool has 2"
    assert pool.fits(with_bias()) is None
    assert "keeps no room" in str(pool_of(vectors=False).fits(with_bias()))
    assert pool.fits(with_table("embed", [0, 99])) is None
    reason = pool.fits(with_table("embed", list(range(14))))
    n_bytes = 14 * (HIDDEN * 4 + 8)
    assert reason is not None
    assert f"`embed` need {n_bytes} bytes" in reason
    assert "5000" in reason
    assert "--table-memory" in reason
    assert pool.fits(with_table("embed", [3, 100])) == "it replaces row 100 of `embed`, the base has 100"


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (LoraWeights({("q", 1): LoraPair(torch.ones(1, 96), torch.full((64, 1), 7e4), 1.0)}), "`q` of layer 1: B has"),
        (LoraWeights({("q", 0): LoraPair(torch.full((1, 96), -7e4), torch.ones(64, 1), 1.0)}), "`q` of layer 0: A has"),
        (LoraWeights({("q", 0): LoraPair(torch.ones(1, 96), torch.ones(64, 1), 1e39)}), "layer 0: the scale has"),
        (with_bias("v", float("inf")), "`v` of layer 0: the bias has values above 3.40282e+38, more than"),
        (LoraWeights({}, {("o", 1): LoraVectors(gain=torch.full((96,), float("nan")))}), "layer 1: the gain has"),
        (LoraWeights({}, {}, {"lm_head": TableRows(torch.tensor([5]), torch.full((1, 96), 7e4))}), "`lm_head`: its"),
    ],
)  # fmt: skip
def test_values_that_the_pools_types_cannot_hold(weights: LoraWeights, words: str) -> None:
    pool = pool_of(dtype=torch.float16)
    assert pool.overflows(random_weights(4, ("q",), 1)) is None
    assert pool.overflows(with_bias("v", 1e38)) is None, "vectors are fp32 in any pool"
    reason = pool.overflows(weights)
    assert reason is not None
    assert words in reason
    assert "  " not in reason
    if "bias" not in words and "gain" not in words and "scale" not in words:
        assert pool_of().overflows(weights) is None
        assert "above 65504, more than torch.float16 holds" in reason


def test_writing_more_than_is_free_changes_nothing() -> None:
    pool = pool_of(table_bytes=4000)
    pool.write(0, random_weights(60, ("q",), 1))
    pool.write(1, with_table("embed", [1, 2, 3, 4, 5]))
    free, version = pool.free_pages(), pool.version
    assert (free["q"], free["v"], free["table bytes"]) == (2, 6, 4000 - 5 * (HIDDEN * 4 + 8))
    with pytest.raises(PoolFull, match=r"3 pages of `q` are needed, 2 of 6 are free"):
        pool.write(2, random_weights(33, ("v", "q"), 2))
    with pytest.raises(PoolFull, match=r"2352 table bytes are needed, 2040 of 4000 are free"):
        pool.write(2, with_table("embed", [0, 1, 2, 3, 4, 5]))
    with pytest.raises(ValueError, match="slot 1 holds an adapter"):
        pool.write(1, random_weights(1, ("v",), 2))
    with pytest.raises(ValueError, match="without room for gains"):
        pool_of(vectors=False).write(0, with_bias())
    assert not pool.has_room(with_table("embed", [0, 1, 2, 3, 4, 5]))
    assert (pool.free_pages(), pool.version) == (free, version)
    pool.check_integrity()


def test_a_failed_write_keeps_its_pages_until_the_slot_is_cleared() -> None:
    pool = pool_of()
    before = pool.free_pages()
    wrong = LoraWeights(random_weights(20, ("q",), 1).pairs, {("q", 0): LoraVectors(gain=torch.ones(1))})
    with pytest.raises(RuntimeError, match="shape"):  # one value must not become the gain of all outputs
        pool.write(2, wrong)
    assert pool.free_pages()["q"] == 4
    pool.check_integrity()
    pool.clear(2)
    assert pool.free_pages() == before


def random_adapter(choice: random.Random) -> LoraWeights:
    projections = tuple(choice.sample(("q", "k", "down", "lm_head", "embed"), choice.randint(0, 3)))
    pairs = random_weights(choice.randint(1, 64), projections, choice.randint(0, 99)).pairs
    vectors = with_bias(choice.choice(("q", "o", "embed"))).vectors if choice.random() < 0.4 else {}
    tables = {}
    for name in ("embed", "lm_head"):
        if choice.random() < 0.4:
            vocab = SHAPES.in_features["embed"] if name == "embed" else VOCAB
            ids = sorted(choice.sample(range(vocab), choice.choice((1, 5, 40, vocab))))
            tables |= with_table(name, ids, choice.choice((torch.bfloat16, torch.float16, torch.float32))).tables
    return LoraWeights(pairs, vectors, tables)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_lost_over_many_writes_and_clears(dtype: torch.dtype) -> None:
    choice = random.Random(4)
    pool = pool_of(dtype=dtype, table_bytes=VOCAB * HIDDEN * 5)
    total, held, refused = pool.free_pages(), {}, 0
    assert pool.nbytes == 0
    for _ in range(300):
        slot = choice.randrange(4)
        if slot in held:
            pool.clear(slot)
            del held[slot]
        else:
            weights = random_adapter(choice)
            needed = pool.pages_needed(weights)
            room = all(pool.free_pages()[kind] >= count for kind, count in needed.items())
            assert room == pool.has_room(weights)
            if not room:
                refused += 1
                with pytest.raises(PoolFull):
                    pool.write(slot, weights)
            else:
                pool.write(slot, weights)
                held[slot] = needed
                contents = pool.contents(slot)
                assert contents.tables == set(weights.tables) == set(pool.tables_of(slot))
                assert {p: len(pages) for p, pages in contents.pages.items()} | (
                    {"table bytes": contents.table_bytes} if weights.tables else {}
                ) == needed
        expected = {kind: n - sum(one.get(kind, 0) for one in held.values()) for kind, n in total.items()}
        assert pool.free_pages() == expected
        pool.check_integrity()
    assert refused > 10
    for slot in range(4):
        pool.clear(slot)
        assert not pool.contents(slot).touches("q")
        assert pool.tables_of(slot) == {}
    assert pool.free_pages() == total
    assert pool.nbytes == 0


def test_integrity_notices_what_is_lost() -> None:
    pool = pool_of()
    pool.write(0, LoraWeights(random_weights(20, ("q",), 1).pairs, {}, with_table("embed", [1, 7]).tables))
    pool.check_integrity()
    pool._free["q"].append(pool.pages_of(0)["q"][0])
    with pytest.raises(RuntimeError, match=r"`q`: 2 held \+ 5 free pages are not the 6"):
        pool.check_integrity()
    pool._free["q"].pop()
    pool._free_table_bytes += 8
    with pytest.raises(RuntimeError, match=r"tables: 784 bytes held \+ .* are not the"):
        pool.check_integrity()
    pool._free_table_bytes -= 8
    pool._tables[0] = {}
    with pytest.raises(RuntimeError, match=r"slot 0: tables of 0 bytes, booked 784"):
        pool.check_integrity()


def test_slots_written_by_several_threads_at_once() -> None:
    """Each thread fills and empties its own slots; the pool never has two of them on one page."""
    pool = pool_of(max_slots=8, max_pages=16, table_bytes=WIDE * 2)
    total, wrong = pool.free_pages(), []

    def run(thread: int) -> None:
        choice = random.Random(thread)
        for i in range(60):
            slot = 2 * thread + i % 2
            pool.clear(slot)
            value = float(100 * thread + i)
            ids = sorted(choice.sample(range(100), 3))
            weights = LoraWeights(
                {("q", layer): LoraPair(torch.full((24, 96), value), torch.ones(64, 24), value) for layer in range(2)},
                {("q", 0): LoraVectors(gain=torch.full((64,), value))},
                {"embed": TableRows(torch.tensor(ids), torch.full((3, 96), value))},
            )
            pool.write(slot, weights)
            pages = pool.pages_of(slot)["q"]
            table = pool.tables_of(slot)["embed"]
            good = (
                all(bool((pool.a["q"][page][:, :, :8] == value).all()) for page in pages)
                and bool((pool.sites["qkv"].gain[slot, 0, :64] == value).all())
                and bool((pool.sites["qkv"].gain[slot, 1] == 1).all())
                and table.ids is not None and table.ids.tolist() == ids
                and bool((table.rows == value).all())
                and bool((pool.scaling["q"][slot] == value).all())
            )  # fmt: skip
            if not good:
                wrong.append((thread, i))

    version = pool.version
    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    pool.check_integrity()
    assert pool.version == version + 4 * (60 + 58), "no write and no clear may be missed by who looks at the version"
    for slot in range(8):
        pool.clear(slot)
    assert pool.free_pages() == total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_largest_magnitude(dtype: torch.dtype) -> None:
    for seed in range(20):
        values = torch.randn(seed % 5 + 1, 7, generator=torch.Generator().manual_seed(seed)).to(dtype)
        values = values.abs() if seed % 3 == 0 else -values.abs() if seed % 3 == 1 else values
        assert _highest(values) == float(values.abs().max())
        assert _highest(values.T) == float(values.abs().max())
        for odd in (math.inf, -math.inf):
            assert _highest(torch.cat((values, torch.full_like(values, odd)))) == math.inf
        for sign in (1, -1):
            nan = torch.full_like(values, math.nan).copysign(torch.tensor(sign, dtype=dtype))
            assert math.isnan(_highest(torch.cat((values, nan))))
    assert _highest(torch.zeros(3, dtype=dtype)) == _highest(torch.empty(0, 3, dtype=dtype)) == 0.0
