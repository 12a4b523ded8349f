"""Tests for faults that ``mutations.py`` makes and the neighbouring files have no eye for; and of lm_head's product."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from manylora.kernels.cuda.dense_linear import BN, dense_linear
from manylora.kernels.cuda.lora_op import ROWS, TritonLora
from manylora.kernels.cuda.nf4_words import pack
from manylora.kernels.cuda.sampling import launch
from manylora.kernels.cuda.sampling_buffers import Row, SamplingBuffers
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_routing import StaticRouting
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.lora_weights import LoraPair, LoraVectors, LoraWeights
from manylora.kernels.sites import SITES
from manylora.server.model.synthetic import synthetic_nf4
from tests.kernels.shapes import SHAPES
from tests.kernels.test_cuda_linear import DTYPE, ON_GPU, Site, close, give_vectors, make_pool

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ROUNDING = 2.0**-7 if ON_GPU else 300 * 2.0**-24
"""Relative to the sum of the magnitudes: a sum of fewer than 300 terms in fp32, or what is rounded to bfloat16."""

Adapter = dict[tuple[str, int], LoraPair]
Pairs = list[tuple[int, int, float]]


def adapter(rank: int, *projections: str, seed: int, scale: float = 1.0) -> Adapter:
    """No two layers have the same rank or scale."""
    random = torch.Generator().manual_seed(seed)
    return {
        (p, layer): LoraPair(
            torch.randn(rank + 3 * layer, SHAPES.in_features[p], generator=random),
            torch.randn(SHAPES.out_features[p], rank + 3 * layer, generator=random),
            scale + layer,
        )
        for p in projections
        for layer in range(SHAPES.layers_of(p))
    }


def pool_of(adapters: Mapping[int, Adapter]) -> LoraPool:
    """Its pages hold NaN before they are written."""
    pool = LoraPool(SHAPES, max_slots=4, max_pages=12, max_rank=64, dtype=DTYPE, device=DEVICE)
    for tensor in (*pool.a.values(), *pool.b.values()):
        tensor.fill_(float("nan"))
    for slot, pairs in adapters.items():
        pool.write(slot, LoraWeights(pairs))
    return pool


def from_the_file(
    x: torch.Tensor, adapters: Mapping[int, Adapter], pairs: Pairs, site: str, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The deltas in fp64 from the matrices as they were before any pool held them, and the sums of their magnitudes."""
    y = torch.zeros(2, x.shape[0], SHAPES.site_offsets(site)[-1], dtype=torch.float64)
    columns = SHAPES.site_offsets(site)
    for row, slot, scale in pairs:
        for j, p in enumerate(SITES[site]):
            if (pair := adapters[slot].get((p, layer))) is not None:
                a, b = (matrix.to(DTYPE).double() for matrix in (pair.a, pair.b))
                one = x[row].cpu().double()
                y[0, row, columns[j] : columns[j + 1]] += scale * pair.scale * (b @ (a @ one))
                y[1, row, columns[j] : columns[j + 1]] += abs(scale * pair.scale) * (b.abs() @ (a.abs() @ one.abs()))
    return y[0], y[1]


def rows_of(n: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def added(op: TritonLora, routing: object, x: torch.Tensor, site: str, layer: int) -> torch.Tensor:
    y = torch.zeros(x.shape[0], SHAPES.site_offsets(site)[-1], dtype=DTYPE, device=DEVICE)
    op.add_(y, x, routing, site, layer)  # type: ignore[arg-type]
    return y.cpu()


def agrees(y: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return bool(((y.double() - expected[0]).abs() <= ROUNDING * expected[1]).all())  # false for NaN


# --- weights and pages against what they were made from ---------------------------------------------------------------


def test_nested_scales_of_weights_with_many_outer_ones() -> None:
    """A weight of over 256 blocks has several outer scales, and its rows do not end where theirs do."""
    random = torch.Generator().manual_seed(0)
    weights = [synthetic_nf4(n, 192, random) for n in (200, 90, 301)]
    packed = pack(weights, torch.bfloat16)
    assert packed.nested
    assert torch.equal(packed.scales_fp32(), torch.cat([one.absmax_fp32().view(-1, 3) for one in weights]))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("site", ["qkv", "o"])
def test_deltas_are_those_of_the_files(site: str, layer: int) -> None:
    """The other tests' reference reads the pool itself, so a pool that is filled wrongly would look right to them."""
    projections = SITES[site]
    adapters = {
        0: adapter(1, projections[0], seed=1, scale=0.5),
        1: adapter(16, *projections, seed=2, scale=-2.0),
        3: adapter(30, projections[-1], seed=3, scale=0.25),
    }
    pool = pool_of({0: adapter(61, *projections, seed=4), 2: adapter(5, *projections, seed=5)})
    pool.clear(0)  # pages out of order, and with another's numbers in them
    for slot, one in adapters.items():
        pool.write(slot, LoraWeights(one))
    op, x = TritonLora(pool), rows_of(7, SHAPES.in_features[projections[0]])
    pairs = [(0, 0, 1.0), (1, 1, 0.5), (2, 3, 1.0), (4, 3, -1.5), (4, 1, 1.0), (6, 0, 2.0)]
    segments = LoraSegments.from_pairs(pairs, DEVICE)
    assert segments is not None
    assert agrees(added(op, segments, x, site, layer), from_the_file(x, adapters, pairs, site, layer))


def test_a_slot_named_twice_for_a_row_has_the_sum_of_its_scales() -> None:
    segments = LoraSegments.from_pairs([(1, 0, 0.5), (0, 0, 1.0), (1, 0, 0.25), (1, 2, 3.0)])
    assert segments is not None
    assert segments.rows.tolist() == [0, 1, 1]
    assert segments.scales.tolist() == [1.0, 0.75, 3.0]
    assert segments.offsets.tolist() == [0, 2, 3]


# --- routing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 15, 16, 31, 32])
def test_a_single_row_at_the_edge_of_a_tile_of_tokens(row: int) -> None:
    adapters = {1: adapter(4, "o", seed=row)}
    op, x, pairs = TritonLora(pool_of(adapters)), rows_of(33, 64), [(row, 1, 1.0)]
    segments = LoraSegments.from_pairs(pairs, DEVICE)
    assert segments is not None
    assert agrees(added(op, segments, x, "o", 0), from_the_file(x, adapters, pairs, "o", 0))


def test_what_an_earlier_step_left_in_h_reaches_no_row() -> None:
    """The shrink writes the places of its pairs only; what lies at the others is anything, here NaN."""
    adapters = {0: adapter(20, "o", seed=1), 2: adapter(5, "o", seed=2)}
    op, x, pairs = TritonLora(pool_of(adapters)), rows_of(9, 64), [(1, 0, 1.0), (4, 2, 1.0), (4, 0, 2.0)]
    segments = LoraSegments.from_pairs(pairs, DEVICE)
    assert segments is not None
    routing = op.route(segments, 9)
    op.buffers(routing, 64)[2].fill_(float("nan"))
    assert agrees(added(op, routing, x, "o", 1), from_the_file(x, adapters, pairs, "o", 1))


def test_a_static_routing_follows_every_change_of_the_batch() -> None:
    """One change at a time: scales, rows, slots, levels, and a slot that gets another adapter."""
    adapters = {0: adapter(20, "o", seed=1), 1: adapter(5, "o", seed=2), 2: adapter(16, "o", seed=3)}
    pool = pool_of(adapters)
    op, x = TritonLora(pool), rows_of(20, 64)
    static = StaticRouting(pool, max_rows=20, rows_per_block=ROWS, levels=2)
    address = static.routing.buffer.data_ptr()
    everyone = [(row, 0, 1.0) for row in range(18)]
    steps: list[Pairs] = [
        everyone,
        [(row, 0, 0.5) for row in range(18)],
        [(row + 2, 0, 0.5) for row in range(18)],
        [(row + 2, 1, 0.5) for row in range(18)],
        [(3, 0, 1.0), (3, 2, 2.0), (5, 1, 1.0)],
        [(3, 0, 1.0), (5, 2, 2.0), (5, 1, 1.0)],  # the same numbers of rows and slots
        [(3, 0, 1.0), (5, 0, 1.0), (7, 1, 1.0)],
        [(3, 0, 1.0), (5, 1, 1.0), (7, 1, 1.0)],  # the same rows, scales and slots
        everyone,
    ]
    for pairs in steps:
        segments = LoraSegments.from_pairs(pairs, DEVICE)
        assert segments is not None
        assert static.fits(segments)
        static.fill(segments)
        assert agrees(added(op, static.routing, x, "o", 1), from_the_file(x, adapters, pairs, "o", 1)), pairs
    pool.clear(0)
    adapters[0] = adapter(3, "o", seed=4)
    pool.write(0, LoraWeights(adapters[0]))
    segments = LoraSegments.from_pairs(everyone, DEVICE)
    assert segments is not None
    static.fill(segments)
    assert agrees(added(op, static.routing, x, "o", 1), from_the_file(x, adapters, everyone, "o", 1))
    assert static.routing.buffer.data_ptr() == address
    three = LoraSegments.from_pairs([(0, 0, 1.0), (0, 1, 1.0), (0, 2, 1.0)])
    assert three is not None
    assert not static.fits(three)


def test_a_static_routing_holds_the_longest_lists() -> None:
    """Every row composed of adapters without pages, but with vectors at every projection: a piece for each of them."""
    vectors = {(p, 0): LoraVectors(bias=torch.ones(SHAPES.out_features[p])) for site in SITES.values() for p in site}
    del vectors["lm_head", 0]
    pool = LoraPool(SHAPES, max_slots=8, max_pages=1, max_rank=16, dtype=DTYPE, device=DEVICE)
    for slot in range(8):
        pool.write(slot, LoraWeights({}, vectors))
    static = StaticRouting(pool, max_rows=8, rows_per_block=ROWS, levels=2)
    segments = LoraSegments.from_pairs([(row, (row + i) % 8, 1.0) for row in range(8) for i in (0, 1)], DEVICE)
    assert segments is not None
    assert static.fits(segments)
    static.fill(segments)
    counts = static.routing.counts["qkv"].tolist()
    assert counts[:5] == [0, 0, 14, 28, 42], "no entries; a piece for each slot and level but 0 at 1, 7 at 0"


def test_gains_of_composed_adapters_are_all_of_the_bases_product() -> None:
    """Not of what the adapter before left there."""
    pool = make_pool(vectors=True)
    one = Site("qkv", pool=pool)
    random = torch.Generator().manual_seed(1)
    vectors = {
        slot: (1 + torch.randn(one.n, generator=random), torch.randn(one.n, generator=random)) for slot in (0, 3)
    }
    for slot, (gain, bias) in vectors.items():
        give_vectors(pool, slot, gain, bias)
    x, pairs = one.x(3), [(1, 0, 0.7), (1, 3, -1.0), (2, 3, 1.0)]
    expected, bound = one.exact(x, pairs)
    base = x.double() @ one.words.dequantize().double().T
    for row, slot, scale in pairs:
        gain, bias = (vector.to(DEVICE).double() for vector in vectors[slot])
        expected[row] += scale * ((gain - 1) * base[row] + bias)
        bound[row] += 4 * bound[row] + ((gain - 1) * base[row]).abs() * ROUNDING
    assert close(one.run(x, pairs), (expected, bound))


# --- lm_head ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 200, 192), (17, BN, 100), (70, 2 * BN + 1, 65)])
def test_dense_linear_matches_fp64(rows: int, n: int, k: int) -> None:
    """Tails of rows, of columns and of k, with NaN wherever none of it is to be read or written."""
    x = torch.full((rows + 1, k + 64), float("nan"), dtype=DTYPE, device=DEVICE)
    w = torch.full((n + 1, k + 64), float("nan"), dtype=DTYPE, device=DEVICE)
    x[:rows, :k], w[:n, :k] = rows_of(rows, k), rows_of(n, k, 2)
    out = torch.full((rows + 1, n + 64), float("nan"), device=DEVICE)
    dense_linear(x[:rows, :k], w[:n, :k], wide=not ON_GPU, out=out[:rows, :n])
    exact = x[:rows, :k].double() @ w[:n, :k].double().T
    bound = x[:rows, :k].double().abs() @ w[:n, :k].double().abs().T * (k + 8) * 2.0**-24
    assert ((out[:rows, :n].double() - exact).abs() <= bound).all()
    assert out[rows].isnan().all()
    assert out[:, n:].isnan().all()


# --- sampling over several blocks -------------------------------------------------------------------------------------


def test_ties_across_blocks_go_to_the_first_token() -> None:
    """Blocks of 16 of 200 tokens: the first maximum is in another lane and a later block than others are."""
    logits = torch.zeros(3, 200)
    logits[0, [37, 50, 85, 133, 199]] = 2.0
    logits[1, [101, 102, 64 + 37]] = 2.0
    rows = [Row(temperature=0.0), Row(temperature=0.0), Row(point=float(np.nextafter(1.0, 0.0)))]
    buffers = SamplingBuffers(3, 200, DEVICE, max_edits=1, cap=8)
    buffers.fill(rows)
    launch(logits.to(DEVICE), buffers, 3, block=16)
    assert buffers.read(3)[0].tolist() == [37, 101, 199]
