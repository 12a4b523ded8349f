"""The fused NF4 linear kernel with LoRA in its epilogue, in the interpreter (or on a GPU), against fp64.

Bounds: an fp32 sum of depth d rounds at most d times relative to the sum of the magnitudes (Higham, Accuracy and
Stability, section 3.1); both products and the few additions around them are such sums. On a GPU the operands are
bfloat16, products of two of them are exact in fp32, h is rounded to bfloat16 once (2^-9) and so is the result.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from manylora.kernels.cuda.configs import ROW_TILES, configs_for, shipped
from manylora.kernels.cuda.linear import LinearAdapters, LinearKernels
from manylora.kernels.cuda.lora_op import TritonLora
from manylora.kernels.cuda.nf4_words import Nf4Words, pack
from manylora.kernels.cuda.scratch import Scratch
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.lora_weights import LoraVectors, LoraWeights
from manylora.kernels.reference import lora_magnitude, lora_reference
from manylora.kernels.sites import SITES, LoraShapes
from manylora.server.model.synthetic import synthetic_adapter, synthetic_nf4
from tests.kernels.ordered_dot import ordered_dot  # noqa: F401 - a fixture

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SHAPES = LoraShapes(
    n_layers=2,
    in_features={p: 192 for p in ("q", "k", "v", "o", "gate", "up", "lm_head")} | {"down": 640, "embed": 100},
    out_features={
        "q": 136,
        "k": 56,
        "v": 72,
        "o": 192,
        "gate": 320,
        "up": 320,
        "down": 192,
        "lm_head": 64,
        "embed": 192,
    },
)
"""Tiles of 128 columns straddle q, k and v; K is 3 or 10 blocks of 64, neither a multiple of the 4 of an iteration;
down's K has two shares of the shrink."""

Pairs = list[tuple[int, int, float]]


class Site:
    """One site's weight and kernels, and its exact answers."""

    def __init__(self, site: str, *, nested: bool = True, bias: bool = False, pool: LoraPool | None = None) -> None:
        random = torch.Generator(DEVICE).manual_seed(len(site))
        self.site, self.pool = site, pool
        self.k = SHAPES.in_features[SITES[site][0]]
        weights = [synthetic_nf4(SHAPES.out_features[p], self.k, random, nested=nested) for p in SITES[site]]
        self.words: Nf4Words = pack(weights, DTYPE)
        self.n = self.words.shape[0]
        self.bias = torch.randn(self.n, device=DEVICE, generator=random).to(DTYPE) if bias else None
        self.scratch = Scratch(DEVICE)
        self.kernels = LinearKernels(configs_for(DEVICE), self.scratch, fast=ON_GPU, wide=not ON_GPU)
        self.op = None if pool is None else TritonLora(pool, self.scratch)

    def x(self, rows: int, seed: int = 5) -> torch.Tensor:
        return torch.randn(rows, self.k, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)

    def run(self, x: torch.Tensor, pairs: Pairs | None = None, layer: int = 1, **options: object) -> torch.Tensor:
        adapters = None
        segments = None if pairs is None else LoraSegments.from_pairs(pairs, DEVICE)
        if segments is not None:
            assert self.op is not None
            done = torch.zeros(1, dtype=torch.int32, device=DEVICE)
            adapters = LinearAdapters(self.op, self.op.route(segments, x.shape[0]), self.site, layer, done)
        out = torch.full((x.shape[0], self.n), float("nan"), dtype=DTYPE, device=DEVICE)
        self.kernels.fused(x, self.words, self.bias, None, adapters, out=out, **options)  # type: ignore[arg-type]
        for name in ("tickets", "lora tickets"):
            assert not self.scratch.zeros(name, 1).any(), f"{name} are not back at zero"
        return out

    def exact(self, x: torch.Tensor, pairs: Pairs | None = None, layer: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """The result in fp64, and how far off it may be."""
        w = self.words.dequantize().double()
        y, magnitude = x.double() @ w.T, x.double().abs() @ w.abs().T
        if self.bias is not None:
            y, magnitude = y + self.bias.double(), magnitude + self.bias.double().abs()
        of_adapters = torch.zeros_like(y)
        if pairs is not None:
            assert self.pool is not None
            y = lora_reference(y, x, self.pool, pairs, self.site, layer)
            of_adapters = lora_magnitude(x, self.pool, pairs, self.site, layer)
        # fp32: h is a sum of K products, whose magnitudes are about sqrt(K) times their sum's.
        rounding = 2.0**-7 if torch.bfloat16 == DTYPE else 2.0**-24
        in_h = rounding if torch.bfloat16 == DTYPE else self.k * self.k**0.5 * 2.0**-24
        return y, magnitude * (self.k + 300) * 2.0**-24 + rounding * y.abs() + in_h * of_adapters


def close(y: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return bool(((y.double() - expected[0]).abs() <= expected[1]).all())  # false for NaN


def make_pool(*, vectors: bool = False) -> LoraPool:
    """Ranks 1, 8, 16, 64 and 256 on different projections; slot 4 is empty, slot 6 was used before by another."""
    pool = LoraPool(SHAPES, max_slots=8, max_pages=60, dtype=DTYPE, device=DEVICE, vectors=vectors)
    every = ("q", "k", "v", "o", "gate", "up", "down")
    for slot, (rank, projections) in enumerate(
        [(16, every), (1, ("q", "gate", "down")), (8, ("v", "up")), (64, ("k", "q", "down", "gate"))]
    ):
        pool.write(slot, synthetic_adapter(SHAPES, rank, seed=slot, projections=projections))
    pool.write(5, synthetic_adapter(SHAPES, 256, seed=5, projections=("q", "v", "down")))
    pool.write(6, synthetic_adapter(SHAPES, 100, seed=6, projections=every))
    pool.clear(6)
    pool.write(6, synthetic_adapter(SHAPES, 20, seed=7, projections=("v", "down", "up")))
    return pool


def give_vectors(pool: LoraPool, slot: int, gain: torch.Tensor, bias: torch.Tensor) -> None:
    """Slot 0, 3 or 4 of ``make_pool`` written anew, with a gain and a bias ``[N]`` at qkv in layer 1; slot 3 has no
    pages of v."""
    pages = {0: (16, ("q", "k", "v")), 3: (64, ("k", "q")), 4: (1, ())}[slot]
    columns, vectors = SHAPES.site_offsets("qkv"), {}
    for p, first, last in zip(SITES["qkv"], columns, columns[1:], strict=False):
        vectors[p, 1] = LoraVectors(gain[first:last], bias[first:last])
    pairs = synthetic_adapter(SHAPES, pages[0], seed=slot, projections=pages[1]).pairs
    pool.clear(slot)
    pool.write(slot, LoraWeights(pairs, vectors))


@pytest.fixture(scope="module")
def pool() -> LoraPool:
    return make_pool()


# --- the base --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 128])
@pytest.mark.parametrize("site", ["qkv", "down"])
def test_base_matches_fp64(site: str, rows: int, nested: bool) -> None:
    one = Site(site, nested=nested, bias=rows % 2 == 1)
    x = one.x(rows)
    assert close(one.run(x), one.exact(x))


def test_one_hot_rows_read_out_single_weights_exactly() -> None:
    """value * scale, rounded once: every product but one is zero, so nothing else can round."""
    one = Site("down")
    x = torch.eye(one.k, dtype=DTYPE, device=DEVICE)[:200:7]
    assert torch.equal(one.run(x), one.words.dequantize(DTYPE).T[:200:7])


def test_dequantised_weights_are_exact() -> None:
    for nested in (True, False):
        one = Site("qkv", nested=nested)
        assert torch.equal(one.kernels.dequantize(one.words, DTYPE), one.words.dequantize(DTYPE))


@pytest.mark.usefixtures("ordered_dot")
@pytest.mark.parametrize("site", ["qkv", "down"])
def test_a_rows_bits_do_not_depend_on_its_batch(site: str) -> None:
    one = Site(site)
    x = one.x(128)
    y = one.run(x)
    assert torch.equal(y, one.run(x)), "the same again"
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert torch.equal(one.run(x[order]), y[order]), "permuted"
    for rows in (1, 16, 17, 33, 64):
        assert torch.equal(one.run(x[:rows]), y[:rows]), f"only {rows} rows: another tile"


def test_the_residual_is_added_in_place() -> None:
    one = Site("o", bias=True)
    x = one.x(20)
    residual = torch.randn(20, one.n, generator=torch.Generator().manual_seed(3)).to(DEVICE, DTYPE)
    expected, bound = one.exact(x)
    before = residual.clone()
    got = one.kernels.fused(x, one.words, one.bias, residual, None)
    assert got is residual
    assert close(got, (expected + before.double(), bound + before.double().abs() * 2.0 ** (-8 if ON_GPU else -23)))


def test_rows_may_be_slices_of_wider_ones() -> None:
    one = Site("o")
    wide = torch.full((9, one.k + 64), float("nan"), dtype=DTYPE, device=DEVICE)
    wide[:, : one.k] = one.x(9)
    assert torch.equal(one.run(wide[:, : one.k]), one.run(one.x(9)))


def test_every_number_of_splits_is_right() -> None:
    one = Site("down")
    x = one.x(5)
    for splits in (1, 2, 3, 10):
        assert close(one.run(x, splits=splits), one.exact(x)), splits


def test_wrong_shapes_are_named() -> None:
    one = Site("o")
    with pytest.raises(ValueError, match=r"W \[192, 192\] takes .* rows \[M, 192\], got .* \[3, 191\]"):
        one.run(one.x(3)[:, 1:])
    with pytest.raises(ValueError, match=r"the output of 3 rows must be \[3, 192\], got \[4, 192\]"):
        one.kernels.fused(one.x(3), one.words, None, one.x(4), None)


# --- adapters in the epilogue ---------------------------------------------------------------------------------------


def _distinct(rows: int) -> Pairs:
    return [(row, row % 7, 1.0) for row in range(rows)]


def _identical(rows: int) -> Pairs:
    return [(row, 0, 0.5) for row in range(rows)]


def _skewed_with_base_rows(rows: int) -> Pairs:
    return [(row, 3 if row % 3 else row % 6, 1.5) for row in range(rows) if row % 4]


def _unsorted(rows: int) -> Pairs:
    return [(row * 7 % rows, row % 4, 1.0 + row / 10) for row in range(rows)]


def _composed(rows: int) -> Pairs:
    return [(row, slot, scale) for row in range(0, rows, 2) for slot, scale in ((0, 0.7), (3, -1.0), (6, 0.3))]


BATCHES = (_distinct, _identical, _skewed_with_base_rows, _unsorted, _composed)


@pytest.mark.parametrize("make", BATCHES, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize(("site", "rows"), [("qkv", 17), ("down", 33), ("gate_up", 5)])
def test_adapters_match_fp64(make: Callable[[int], Pairs], site: str, rows: int, pool: LoraPool) -> None:
    one = Site(site, pool=pool, bias=True)
    x, pairs = one.x(rows), make(rows)
    y = one.run(x, pairs)
    assert close(y, one.exact(x, pairs))
    base = one.run(x)
    # A row with none of these slots at this site is a base row too.
    held = {slot for slot in range(7) if any(int(pool.ranks[p][slot, 1]) for p in SITES[site])}
    untouched = sorted(set(range(rows)) - {row for row, slot, _ in pairs if slot in held})
    assert torch.equal(y[untouched], base[untouched]), "a base row differs from the kernel without adapters"
    assert not torch.equal(y, base)


def test_adapters_after_several_splits(pool: LoraPool) -> None:
    """Whoever adds up the splits of a tile also expands: each tile exactly once."""
    one = Site("down", pool=pool)
    x, pairs = one.x(18), _composed(18)
    for splits in (2, 3):
        y = one.run(x, pairs, splits=splits)
        assert close(y, one.exact(x, pairs)), splits
        assert torch.equal(y[1::2], one.run(x, splits=splits)[1::2]), "base rows"


def test_many_rows_over_many_tiles_of_tokens(pool: LoraPool) -> None:
    """128 rows: tiles of 64 tokens, most of which a segment does not reach."""
    one = Site("qkv", pool=pool)
    x, pairs = one.x(128), [(row, row // 40, 1.0) for row in range(128) if row // 40 < 4]
    assert close(one.run(x, pairs), one.exact(x, pairs))


@pytest.mark.usefixtures("ordered_dot")
def test_an_adapted_rows_bits_do_not_depend_on_its_batch(pool: LoraPool) -> None:
    one = Site("down", pool=pool)
    x, pairs = one.x(20), [*_composed(20), (1, 5, 1.0), (3, 1, 2.0)]
    y = one.run(x, pairs)
    assert torch.equal(y, one.run(x, list(reversed(pairs)))), "pairs in another order"
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1)).tolist()
    place = {row: i for i, row in enumerate(order)}
    shuffled = one.run(x[order], [(place[row], slot, scale) for row, slot, scale in pairs])
    assert torch.equal(shuffled, y[order]), "rows in another order"
    for row in (0, 1, 2, 3, 5):
        alone = one.run(x[row : row + 1], [(0, slot, scale) for other, slot, scale in pairs if other == row] or None)
        assert torch.equal(alone[0], y[row]), f"row {row} alone"


def test_a_neighbours_overflow_stays_its_own(pool: LoraPool) -> None:
    """An adapter that gives infinities (or NaN) must not reach a row that does not use it."""
    poisoned = make_pool()
    page = poisoned.pages_of(0)["down"][0]
    poisoned.b["down"][page] = float("inf")
    one = Site("down", pool=poisoned)
    x, pairs = one.x(6), [(0, 0, 1.0), (2, 3, 1.0), (3, 0, -1.0)]
    y, alone = one.run(x, pairs), one.run(x, [(2, 3, 1.0)])
    assert not torch.isfinite(y[[0, 3]]).any()
    assert torch.equal(y[[1, 2, 4, 5]], alone[[1, 2, 4, 5]])


def test_pages_that_were_never_written_are_never_read() -> None:
    fresh = LoraPool(SHAPES, max_slots=2, max_pages=20, dtype=DTYPE, device=DEVICE)
    for tensor in (*fresh.a.values(), *fresh.b.values()):
        tensor.fill_(float("nan"))
    fresh.write(1, synthetic_adapter(SHAPES, 5, seed=1, projections=("q", "down")))
    for site in ("qkv", "down"):
        one = Site(site, pool=fresh)
        x, pairs = one.x(4), [(0, 1, 1.0), (2, 0, 1.0), (3, 1, 0.5)]
        assert close(one.run(x, pairs), one.exact(x, pairs))


def test_gain_and_bias_of_an_adapter() -> None:
    """``y += scale * ((gain - 1) * base + bias)``, with the layer's own bias left out of ``base``; slot 4 has no
    pages."""
    vectors = make_pool(vectors=True)
    one = Site("qkv", pool=vectors, bias=True)
    gain = 1 + 0.2 * torch.randn(one.n, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(one.n, generator=torch.Generator().manual_seed(2))
    give_vectors(vectors, 3, gain, bias)
    give_vectors(vectors, 4, gain * 2, -bias)
    x, pairs = one.x(6), [(0, 3, 1.0), (1, 4, 0.5), (2, 0, 1.0), (4, 3, -2.0)]
    y = one.run(x, pairs)
    expected, bound = one.exact(x, pairs)
    base = x.double() @ one.words.dequantize().double().T
    for row, slot, scale in pairs:
        if slot in (3, 4):
            of_slot = (gain, bias) if slot == 3 else (gain * 2, -bias)
            added, offset = (vector.to(DEVICE).double() for vector in of_slot)
            delta = scale * ((added - 1) * base[row] + offset)
            expected[row] += delta
            bound[row] = 4 * bound[row] + delta.abs() * 2.0 ** (-7 if ON_GPU else -20)
    assert close(y, (expected, bound))
    vectors.clear(3)
    assert torch.equal(one.run(x[:1], [(0, 3, 1.0)]), one.run(x[:1])), "cleared slots leave no vectors behind"


# --- configurations -------------------------------------------------------------------------------------------------


def test_shipped_configurations_are_whole() -> None:
    for arch, configs in shipped().items():
        assert sorted(configs.tiles) == list(ROW_TILES), arch
        for n, k in ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (576, 576)):
            splits = configs.splits_of(n, k)
            assert 1 <= splits <= k // 64
        assert configs.tile(1).bm == 16
        assert configs.tile(17).bm == 32
        assert configs.tile(1000).bm == 64
