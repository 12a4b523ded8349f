"""Batched LoRA against the fp64 reference, for every implementation and every kind of batch."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Callable
from itertools import chain
from typing import Literal

import pytest
import torch

from manylora.kernels import lora_page
from manylora.kernels.cpu import available
from manylora.kernels.lora import BatchedLora, Implementation, SiteAdapters
from manylora.kernels.lora_page import INTEGERS
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.lora_weights import LoraPair, LoraWeights
from manylora.kernels.reference import lora_reference, pool_matrices
from manylora.kernels.sites import SITES
from tests.kernels.shapes import SHAPES, pool_of, random_weights
from tests.kernels.test_cpu_ops import nf4

ALL = ("q", "k", "v", "o", "gate", "up", "down", "lm_head")
IMPLEMENTATIONS: list[object] = [
    pytest.param("cpu", marks=pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")),
    pytest.param(
        "triton", marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here")
    ),
    "torch",
]

PAGE_DTYPES = [torch.float32, torch.bfloat16, *INTEGERS]
ROWS = 45
ADAPTERS = 6

Pairs = list[tuple[int, int, float]]


def _identical() -> Pairs:
    return [(row, 2, 1.0) for row in range(ROWS)]


def _distinct() -> Pairs:
    return [(row, row, 1.0) for row in range(ADAPTERS)]


def _uniform() -> Pairs:
    return [(row, row % ADAPTERS, 1.0) for row in range(ROWS)]


def _skewed() -> Pairs:
    """Zipf-like: one adapter has most rows."""
    return [(row, 0 if row % 5 else row // 5 % ADAPTERS, 1.0) for row in range(ROWS)]


def _with_base_rows() -> Pairs:
    """Every third row belongs to the base, said by slot -1 or by silence."""
    return [(row, -1 if row % 2 else row % ADAPTERS, 0.5) for row in range(ROWS) if row % 3]


def _unsorted() -> Pairs:
    return [(row * 7 % ROWS, row % ADAPTERS, 1.0 + row / 10) for row in range(ROWS)]


def _composed() -> Pairs:
    """Rows with several adapters, each with its own scale; -1 takes an adapter away again."""
    return list(chain.from_iterable([(row, 1, 0.7), (row, 4, -1.0), (row, 2, 0.3)] for row in range(0, ROWS, 4)))


def _single_row() -> Pairs:
    return [(11, 3, 2.0)]


BATCHES = (_identical, _distinct, _uniform, _skewed, _with_base_rows, _unsorted, _composed, _single_row)


@pytest.fixture(scope="module", params=PAGE_DTYPES, ids=str)
def pool(request: pytest.FixtureRequest) -> LoraPool:
    """Six adapters, in pages of each type beside fp32 activations; references read the pages, rounded as they are."""
    return _six(request.param)


def _six(page_dtype: torch.dtype) -> LoraPool:
    return pool_of(
        random_weights(1, ("q",), 1, 0.5),
        random_weights(8, ("q", "v"), 2, 2.0),
        random_weights(16, ALL, 3),
        random_weights(64, ("q", "k", "v", "gate", "down"), 4, 0.25),
        random_weights(20, ("k", "gate", "down", "lm_head"), 5),
        random_weights(33, ("o", "up"), 6),
        page_dtype=page_dtype,
    )


def _skip_unless_read(implementation: Implementation, pool: LoraPool) -> None:
    if implementation == "triton" and pool.page_dtype != pool.dtype:
        pytest.skip("on a GPU pages have the activations' type")


def _inputs(site: str) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    x = torch.randn(ROWS, SHAPES.in_features[SITES[site][0]], generator=random)
    y = torch.randn(ROWS, SHAPES.site_offsets(site)[-1], generator=random)
    return x, y


def _bound(x: torch.Tensor, pool: LoraPool, pairs: Pairs, site: str, layer: int) -> torch.Tensor:
    """What fp32 may err by: each of the two products of depth d rounds at most d times, relative to the sum of the
    absolute values (Higham, Accuracy and Stability, section 3.1); plus the final additions."""
    absolute = LoraPool(SHAPES, max_slots=pool.max_slots, max_pages=pool.max_pages)
    absolute.page_scales = pool.page_scales
    for p in pool.a:
        absolute.a[p], absolute.b[p] = pool.a[p].abs(), pool.b[p].abs()
        absolute.page_table[p], absolute.ranks[p], absolute.scaling[p] = (
            pool.page_table[p], pool.ranks[p], pool.scaling[p].abs(),
        )  # fmt: skip
    magnitude = lora_reference(
        torch.ones(ROWS, SHAPES.site_offsets(site)[-1]),
        x.abs(),
        absolute,
        [(row, slot, abs(scale)) for row, slot, scale in pairs],
        site,
        layer,
    )
    depth = x.shape[1] + 64 + 8
    return magnitude * depth * 2.0**-24


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("make", BATCHES, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("site", ["qkv", "down", "lm_head"])
def test_matches_the_reference(
    implementation: Implementation, make: Callable[[], Pairs], site: str, pool: LoraPool
) -> None:
    _skip_unless_read(implementation, pool)
    pairs, layer = make(), 0 if site == "lm_head" else 1
    segments = LoraSegments.from_pairs(pairs)
    assert segments is not None
    x, y = _inputs(site)
    before = y.clone()
    BatchedLora(pool, implementation).add_(y, x, segments, site, layer)
    expected = lora_reference(before, x, pool, pairs, site, layer)
    assert ((y - expected).abs() <= _bound(x, pool, pairs, site, layer)).all()
    assert torch.equal(y, before) == torch.equal(expected, before.double())
    untouched = sorted(set(range(ROWS)) - {row for row, slot, _ in pairs if slot >= 0})
    assert torch.equal(y[untouched], before[untouched]), "a base row was changed"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_alone_gives_the_same_bits_as_in_a_batch(implementation: Implementation, pool: LoraPool) -> None:
    _skip_unless_read(implementation, pool)
    if implementation == "torch":
        pytest.skip("torch's own matmul sums in another order for other row counts; it promises closeness only")
    if implementation == "triton" and not torch.cuda.is_available():
        pytest.skip("the interpreter multiplies tiles with numpy, whose rows are not independent to the bit; GPUs' are")
    op = BatchedLora(pool, implementation)
    for site in SITES:
        x, y = _inputs(site)
        alone = y.clone()
        segments = LoraSegments.from_pairs(_uniform())
        assert segments is not None
        op.add_(y, x, segments, site, 0)
        for row, slot, scale in _uniform():
            single = LoraSegments.from_pairs([(0, slot, scale)])
            assert single is not None
            op.add_(alone[row : row + 1], x[row : row + 1], single, site, 0)
        assert torch.equal(alone, y)


def _many(count: int) -> Pairs:
    """So many adapters, in an order that is not that of their rows."""
    return [(row * 7 % count, row, 1.0 + row / 10) for row in range(count)]


@pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")
@pytest.mark.parametrize("more", ["", "a row twice", "a long segment"])
@pytest.mark.parametrize("threads", [1, 2])
def test_many_adapters_at_once(threads: int, more: str) -> None:
    """So many that a part of the kernel takes some as a whole, unless a row has two or a segment is long; each row as
    it is alone, to the bit."""
    count = 19
    ranks = [(4, 16, 20, 33)[i % 4] for i in range(count)]
    pool = pool_of(*(random_weights(rank, ALL, i) for i, rank in enumerate(ranks)), max_pages=60)
    op, pairs = BatchedLora(pool, "cpu"), _many(count)
    if more == "a row twice":
        pairs += [(3, 5, 0.5)]
    elif more == "a long segment":
        pairs += [(row, 2, 0.5) for row in range(count, count + 9)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for site in ("qkv", "down"):
            x, y = _inputs(site)
            alone, expected = y.clone(), lora_reference(y, x, pool, pairs, site, 1)
            segments = LoraSegments.from_pairs(pairs)
            assert segments is not None
            op.add_(y, x, segments, site, 1)
            assert ((y - expected).abs() <= _bound(x, pool, pairs, site, 1)).all()
            for row in {row for row, _, _ in pairs}:
                own = LoraSegments.from_pairs([(0, slot, scale) for other, slot, scale in pairs if other == row])
                assert own is not None
                op.add_(alone[row : row + 1], x[row : row + 1], own, site, 1)
            assert torch.equal(alone, y)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")
@pytest.mark.parametrize("twice", [False, True])
def test_the_parts_of_a_kernel_may_run_in_any_order(twice: bool) -> None:
    """Threads take them as they come: no two parts add to the same row of a column, or its sum would have another
    order. Here the last is run first, with a row of two adapters and without."""
    from manylora.kernels.cpu.threads import queued, recorded

    count, parts = 19, 4
    pool = pool_of(*(random_weights(16, ("down",), i) for i in range(count)), max_pages=60)
    pairs = _many(count) + ([(row, (row + 9) % count, 0.5) for row in range(count)] if twice else [])
    segments = LoraSegments.from_pairs(pairs)
    assert segments is not None
    x, y = _inputs("down")
    expected = y.clone()
    BatchedLora(pool, "cpu").add_(expected, x, segments, "down", 1)
    before = y.clone()
    with recorded() as made, queued():
        BatchedLora(pool, "cpu").add_(y, x, segments, "down", 1)
    y.copy_(before)
    program = list(made[0]._program)[2:]
    for address, arguments in zip(program[::4], program[1::4], strict=True):
        kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(address)
        for part in reversed(range(parts)):
            kernel(arguments, part, parts)
    assert torch.equal(y, expected)


@pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")
@pytest.mark.parametrize("page_dtype", PAGE_DTYPES, ids=str)
def test_adapters_of_one_row_are_added_in_order(page_dtype: torch.dtype) -> None:
    """Pages of several rows are added at once, those of one are not: as if one adapter came after the other."""
    pool = pool_of(*(random_weights(16, ("q", "k", "v"), i) for i in range(9)), max_pages=60, page_dtype=page_dtype)
    pairs = [(0, 0, 1.0), (1, 1, 1.0), (0, 2, 0.5), (2, 3, 1.0), (1, 4, 1.0), (1, 5, 1.0), (3, 6, 2.0), (0, 7, 1.0)]
    random = torch.Generator().manual_seed(4)
    x = torch.randn(4, SHAPES.in_features["q"], generator=random)
    y = torch.randn(4, SHAPES.site_offsets("qkv")[-1], generator=random)
    lora, one_by_one = BatchedLora(pool, "cpu"), y.clone()
    for pair in pairs:
        single = LoraSegments.from_pairs([pair])
        assert single is not None
        lora.add_(one_by_one, x, single, "qkv", 0)
    together = LoraSegments.from_pairs(pairs)
    assert together is not None
    lora.add_(y, x, together, "qkv", 0)
    assert torch.equal(y, one_by_one)


@pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")
@pytest.mark.parametrize("page_dtype", PAGE_DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 2, 3, 4, 1, 33, 1, 70), (4, 4, 5, 5, 6, 4, 6, 7, 7, 8), (1,) * 11], ids=str)
def test_how_rows_are_taken_together_changes_no_bit(sizes: tuple[int, ...], page_dtype: torch.dtype) -> None:
    """Segments of one row to more than a part takes at once, or of the same few, two at once, of one page and of
    several; each row as if alone."""
    pool = pool_of(
        *(random_weights((8, 16, 40)[i // 3 % 3], ("q", "k", "v"), i) for i in range(len(sizes))),
        max_pages=60, page_dtype=page_dtype,
    )  # fmt: skip
    slots = [slot for slot, size in enumerate(sizes) for _ in range(size)]
    random = torch.Generator().manual_seed(3)
    order = torch.randperm(len(slots), generator=random).tolist()
    x = torch.randn(len(slots), SHAPES.in_features["q"], generator=random)
    y = torch.randn(len(slots), SHAPES.site_offsets("qkv")[-1], generator=random)
    alone, expected = y.clone(), y.clone()
    segments = LoraSegments.from_pairs([(row, slots[place], 1.0) for row, place in enumerate(order)])
    assert segments is not None
    lora = BatchedLora(pool, "cpu")
    lora.add_(y, x, segments, "qkv", 1)
    for row, place in enumerate(order):
        own = LoraSegments.from_pairs([(0, slots[place], 1.0)])
        assert own is not None
        lora.add_(alone[row : row + 1], x[row : row + 1], own, "qkv", 1)
    assert torch.equal(alone, y)
    far = (y.double() - lora_reference(
        expected, x, pool, [(row, slots[place], 1.0) for row, place in enumerate(order)], "qkv", 1
    )).abs().max()  # fmt: skip
    assert far < 1e-4, "the bound itself is tested above"


@pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")
@pytest.mark.parametrize("arithmetic", ["int16", "int8"])
@pytest.mark.parametrize("rows", [1, 8, 13, 30])
def test_halves_beside_the_product_give_its_bits(arithmetic: Literal["int16", "int8"], rows: int) -> None:
    """``Ops.linear`` runs the two halves with the product's kernels; it must be the product, then ``add_``. Row 1 has
    two adapters."""
    from manylora.kernels.cpu.ops import NumbaOps

    ops = NumbaOps(arithmetic)
    k, n = SHAPES.in_features["q"], SHAPES.site_offsets("qkv")[-1]
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(5))
    weight = ops.prepare_linear([nf4(n, k, seed=1, blocksize=32)], torch.arange(n) / n)
    held = getattr(torch, arithmetic)
    pool = pool_of(*(random_weights(16, ("q", "k", "v"), i) for i in range(3)), page_dtype=held)
    pairs = [(row, row % 3, 1.0) for row in range(rows)] + [(row, 2, 0.5) for row in range(rows) if row == 1]
    segments = LoraSegments.from_pairs(pairs)
    assert segments is not None
    lora = BatchedLora(pool, "cpu")
    for into in (None, torch.ones(rows, n)):
        expected = ops.linear(x, weight, add_to=None if into is None else into.clone())
        lora.add_(expected, x, segments, "qkv", 1)
        adapters = SiteAdapters(lora, segments, "qkv", 1)
        with ops.together():
            got = torch.empty(rows, n) if into is None else into.clone()
            made = ops.linear(x, weight, add_to=None if into is None else got, adapters=adapters)
            if into is None:
                ops.flush()
                got.copy_(made)
        assert torch.equal(got, expected)


@pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")
@pytest.mark.parametrize("site", SITES)
def test_bf16_pages_give_the_bits_of_the_same_values_in_fp32(site: str) -> None:
    half = _six(torch.bfloat16)
    widened = _six(torch.float32)
    for p in half.a:
        widened.a[p].copy_(half.a[p])
        widened.b[p].copy_(half.b[p])
    layer = 0 if site == "lm_head" else 1
    for make in BATCHES:
        segments = LoraSegments.from_pairs(make())
        x, y = _inputs(site)
        other = y.clone()
        BatchedLora(half, "cpu").add_(y, x, segments, site, layer)  # type: ignore[arg-type]
        BatchedLora(widened, "cpu").add_(other, x, segments, site, layer)  # type: ignore[arg-type]
        assert torch.equal(y, other), make.__name__


@pytest.mark.parametrize("rank", [1, 16, 17])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e18])
@pytest.mark.parametrize("held", INTEGERS, ids=str)
def test_integers_are_near_what_they_were_made_of(rank: int, size: float, held: torch.dtype) -> None:
    """Each value is off by half of a level, 1/32767 or 1/127 of the largest of its rank, at most, however large the
    ranks are beside each other; the product of the two scales is rounded once more, to fp32."""
    most = INTEGERS[held]
    weights = random_weights(rank, ("q",), 3)
    given = weights.pairs["q", 1]
    uneven = torch.logspace(0, -3, rank)
    pair = LoraPair(given.a * uneven[:, None] * size, given.b * uneven.flip(0), given.scale)
    pool = pool_of(LoraWeights({("q", 1): pair}), page_dtype=held)
    matrices = pool_matrices(pool, "q", 0, 1)
    assert matrices is not None
    (a, b, scaling), (true_a, true_b) = matrices, (pair.a.double(), pair.b.double())
    assert scaling == pair.scale
    largest_a, largest_b = true_a.abs().amax(1), true_b.abs().amax(0)
    for r in range(rank):
        found = torch.outer(a[:, r].double(), b[r].double())
        true = torch.outer(true_a[r], true_b[:, r])
        half_a, half_b = largest_a[r] / (2 * most), largest_b[r] / (2 * most)
        bound = half_a * true_b[:, r].abs() + half_b * (true_a[r].abs() + half_a)[:, None] + 2.0**-23 * true.abs()
        assert ((found - true).abs() <= bound * (1 + 1e-9)).all()
    assert int(pool.a["q"].abs().max()) == int(pool.b["q"].abs().max()) == most


@pytest.mark.parametrize("held", INTEGERS, ids=str)
def test_a_rank_of_zeros_adds_nothing(held: torch.dtype) -> None:
    pair = random_weights(3, ("q",), 3).pairs["q", 0]
    pair.a[1] = 0.0
    pool = pool_of(LoraWeights({("q", 0): pair}), page_dtype=held)
    page = int(pool.page_table["q"][0, 0])
    assert (pool.page_scales["q"][page, 0] > 0).tolist() == [True, False, True, *[False] * 13]
    assert torch.isfinite(pool.page_scales["q"]).all()


@pytest.mark.parametrize("kernels", [True, False])
def test_what_bytes_would_change_is_refused(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value far above the others of its rank leaves them no levels. Not if the others are zeros."""
    if kernels and not available():
        pytest.skip("no AVX2 and FMA here")
    monkeypatch.setattr(lora_page, "cpu_kernels_available", lambda: kernels)
    weights = random_weights(3, ("q",), 1)
    pair = weights.pairs["q", 1]
    words, small = (pool_of(weights, page_dtype=held) for held in INTEGERS)
    assert small.overflows(weights) is None
    pair.a[0] *= 1e-3  # a rank of its own size
    assert small.overflows(weights) is None
    pair.a[1:, 5] = 100 * pair.a.abs().max()
    refusal = small.overflows(weights)
    assert refusal is not None
    assert re.match(r"`q` of layer 1: its delta would be off by \d\d% in 8-bit integers", refusal)
    assert refusal.endswith("(start the server with --lora-dtype int16)")
    assert words.overflows(weights) is None
    pair.a[:, 6:], pair.a[:, :5] = 0, 0
    assert small.overflows(weights) is None


@pytest.mark.parametrize("held", INTEGERS, ids=str)
def test_what_integers_cannot_hold_is_refused(held: torch.dtype) -> None:
    pool = pool_of(random_weights(1, ("q",), 1), page_dtype=held)
    a, b = torch.full((1, SHAPES.in_features["q"]), 1e30), torch.full((SHAPES.out_features["q"], 1), 1e30)
    refusal = pool.overflows(LoraWeights({("q", 0): LoraPair(a, b, 1.0)}))
    assert refusal is not None
    assert "`q` of layer 0: A times B has values above 3.40282e+38" in refusal
    assert pool.overflows(LoraWeights({("q", 0): LoraPair(a, b / 1e30, 1.0)})) is None
    a[0, 0] = float("nan")
    assert "layer 0: A has values above" in str(pool.overflows(LoraWeights({("q", 0): LoraPair(a, b, 1.0)})))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rank", [1, 15, 16, 17, 64, 256])
def test_rank(implementation: Implementation, rank: int) -> None:
    pool = pool_of(random_weights(4, ("o",), 1), random_weights(rank, ("o",), 2))
    pairs = [(row, row % 2, 1.0) for row in range(ROWS)]
    segments = LoraSegments.from_pairs(pairs)
    assert segments is not None
    x, y = _inputs("o")
    expected = lora_reference(y, x, pool, pairs, "o", 1)
    BatchedLora(pool, implementation).add_(y, x, segments, "o", 1)
    bound = _bound(x, pool, pairs, "o", 1) * (1 + rank / 64)
    assert ((y - expected).abs() <= bound).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_reused_slot_keeps_nothing_of_its_last_adapter(implementation: Implementation) -> None:
    pool = pool_of(random_weights(64, ALL, 1), max_pages=4)
    for tensor in (*pool.a.values(), *pool.b.values()):
        tensor[tensor == 0] = float("nan")  # what was never written must never be read
    pool.clear(0)
    pool.write(0, random_weights(5, ("q",), 2))
    pairs = [(row, 0, 1.0) for row in range(3)]
    segments = LoraSegments.from_pairs(pairs)
    assert segments is not None
    x, y = _inputs("qkv")
    expected = lora_reference(y, x, pool, pairs, "qkv", 0)
    before = y.clone()
    BatchedLora(pool, implementation).add_(y, x, segments, "qkv", 0)
    assert torch.isfinite(y).all()
    assert ((y - expected).abs() <= _bound(x, pool, pairs, "qkv", 0)).all()
    width = SHAPES.out_features["q"]
    assert torch.equal(y[:, width:], before[:, width:]), "k and v have no delta any more"


def test_embedding_delta(pool: LoraPool) -> None:
    pool = pool_of(
        random_weights(8, ("embed",), 1, 0.5), random_weights(40, ("embed", "q"), 2), random_weights(4, ("q",), 3)
    )
    ids = torch.randint(0, 100, (12,), generator=torch.Generator().manual_seed(1))
    pairs = [(0, 0, 1.0), (3, 0, 0.5), (4, 1, 1.0), (5, 2, 1.0), (11, 1, 2.0)]
    segments = LoraSegments.from_pairs(pairs)
    assert segments is not None
    y = torch.zeros(12, 96)
    BatchedLora(pool).add_embedding_(y, ids, segments)
    expected = torch.zeros(12, 96, dtype=torch.float64)
    for row, slot, scale in pairs:
        rank = int(pool.ranks["embed"][slot, 0])
        if rank:
            pages = [int(page) for page in pool.page_table["embed"][slot] if page >= 0]
            a = torch.cat([pool.a["embed"][page, 0, ids[row]] for page in pages])[:rank].double()
            b = torch.cat([pool.b["embed"][page, 0] for page in pages])[:rank].double()
            expected[row] += scale * float(pool.scaling["embed"][slot, 0]) * (a @ b)
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_segments_select_renumbers_rows() -> None:
    segments = LoraSegments.from_pairs([(0, 3, 1.0), (2, 3, 0.5), (5, 1, 1.0), (6, 1, 2.0)])
    assert segments is not None
    kept = segments.select(torch.tensor([2, 4, 6]))
    assert kept is not None
    assert kept.rows.tolist() == [2, 0]
    assert kept.scales.tolist() == [2.0, 0.5]
    assert kept.slot_list == (1, 3)
    assert segments.select(torch.tensor([1])) is None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_wrong_shapes_are_named(implementation: Implementation, pool: LoraPool) -> None:
    segments = LoraSegments.from_pairs(_single_row())
    assert segments is not None
    x, y = _inputs("qkv")
    with pytest.raises(ValueError, match=r"x \[T, 96\] to y \[T, 128\], got x \[45, 95\]"):
        BatchedLora(pool, implementation).add_(y, x[:, 1:], segments, "qkv", 0)
