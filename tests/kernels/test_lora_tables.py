"""The embedding and the output layer: pairs, gains, biases and replaced rows, against fp64 from the adapters' own
tensors. Bounds as in test_lora_vectors."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from manylora.kernels.cpu import available
from manylora.kernels.lora import BatchedLora
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.lora_weights import LoraPair, LoraVectors, LoraWeights, TableRows
from manylora.kernels.reference import absolute, embedding_reference, site_reference
from manylora.kernels.sites import LoraShapes

VOCAB, HIDDEN = 112, 96
SHAPES = LoraShapes(
    n_layers=1,
    in_features={p: HIDDEN for p in ("q", "k", "v", "o", "gate", "up", "down", "lm_head")} | {"embed": VOCAB},
    out_features={"q": 64, "k": 32, "v": 32, "o": 96, "gate": 80, "up": 80, "down": 96, "lm_head": VOCAB}
    | {"embed": HIDDEN},
)
ROWS = 23
IMPLEMENTATIONS: list[Any] = [
    pytest.param("cpu", marks=pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")),
    pytest.param("triton", marks=pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton here")),
    "torch",
]

Pairs = list[tuple[int, int, float]]


def table(seed: int, ids: list[int], dtype: torch.dtype) -> TableRows:
    random = torch.Generator().manual_seed(seed)
    return TableRows(torch.tensor(ids), torch.randn(len(ids), HIDDEN, generator=random).to(dtype))


def pair(seed: int, rank: int, projection: str) -> dict[tuple[str, int], LoraPair]:
    random, n, k = torch.Generator().manual_seed(seed), SHAPES.out_features, SHAPES.in_features
    a, b = (torch.randn(size, generator=random) for size in ((rank, k[projection]), (n[projection], rank)))
    return {(projection, 0): LoraPair(a, b, 0.5)}


def vectors(seed: int, projection: str, *, gain: bool = True) -> dict[tuple[str, int], LoraVectors]:
    random, n = torch.Generator().manual_seed(seed), SHAPES.out_features[projection]
    own_gain = 1 + 0.3 * torch.randn(n, generator=random) if gain else None
    return {(projection, 0): LoraVectors(own_gain, torch.randn(n, generator=random))}


EVERYONE = list(range(VOCAB))
ADAPTERS = {
    0: LoraWeights(pair(1, 20, "embed") | pair(2, 5, "lm_head"), vectors(3, "embed") | vectors(4, "lm_head")),
    1: LoraWeights(pair(5, 4, "q"), {}, {"embed": table(6, [3, 40, 111], torch.bfloat16)}),
    2: LoraWeights({}, {}, {"embed": table(7, EVERYONE, torch.float32), "lm_head": table(8, EVERYONE, torch.bfloat16)}),
    3: LoraWeights(pair(9, 33, "embed"), {}, {"lm_head": table(10, list(range(1, 100, 3)), torch.float32)}),
    4: LoraWeights({}, vectors(11, "embed", gain=False), {"lm_head": table(12, [0, 7, 8, 15, 16, 50], torch.float16)}),
    6: LoraWeights(pair(13, 8, "lm_head")),
}
"""Slot 5 is empty. bf16 rows stay bf16 beside fp32 activations, whole tables have no list of ids."""


def pool_of(adapters: dict[int, LoraWeights], implementation: str) -> LoraPool:
    with pytest.MonkeyPatch.context() as patch:
        if implementation == "triton":  # as on a GPU: rows as they are
            patch.setattr(LoraPool, "suits_cpu_kernels", False)
        pool = LoraPool(SHAPES, max_slots=7, max_pages=12, max_rank=48, table_bytes=10**6)
    for store in pool.sites.values():
        for tensor in (store.a, store.b, store.gain, store.bias):
            tensor.fill_(float("nan"))
    pool.write(2, LoraWeights({}, vectors(99, "embed"), {"lm_head": table(98, [1, 2], torch.bfloat16)}))
    pool.clear(2)
    for slot, weights in adapters.items():
        assert pool.fits(weights) is None
        pool.write(slot, weights)
    assert implementation == "torch" or pool.tables_of(2)["lm_head"].tiled == (implementation == "cpu")
    for slot in (2, 3, 4):  # or a GPU's kernel would be compiled while serving
        assert pool.tables_of(slot)["lm_head"].plain().shape[0] % 16 == 0
    return pool


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def lora(request: pytest.FixtureRequest) -> BatchedLora:
    return BatchedLora(pool_of(ADAPTERS, request.param), request.param)


MIXED: Pairs = [(row, row % 7, 1.0) for row in range(ROWS) if row % 8]
COMPOSED: Pairs = [(row, slot, 1.0) for row in range(0, ROWS, 2) for slot in (2, 3 if row % 4 else 0)]
COMPOSED += [(1, 0, 0.5), (1, 6, -2.0), (3, 6, 1.0), (3, 4, 1.0), (3, 0, -1.0)]
EMBED_COMPOSED = [*COMPOSED, (5, 4, 0.5), (5, 0, 2.0)]
LM_HEAD_COMPOSED = [(row, slot, c) for row, slot, c in COMPOSED if slot != 3]


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (ROWS,), generator=random)
    ids[[1, 8, 15]] = torch.tensor([3, 40, 111])  # those that slot 1 replaces, in its rows
    x = torch.randn(ROWS, HIDDEN, generator=random)
    return ids, x, torch.randn(VOCAB, HIDDEN, generator=random)


def magnitudes(pairs: Pairs) -> tuple[dict[int, LoraWeights], Pairs]:
    return {s: absolute(w) for s, w in ADAPTERS.items()}, [(row, slot, abs(c)) for row, slot, c in pairs]


@pytest.mark.parametrize("pairs", [MIXED, EMBED_COMPOSED], ids=["mixed", "composed"])
def test_the_embedding_matches_fp64(lora: BatchedLora, pairs: Pairs) -> None:
    ids, _, embedding = inputs()
    segments = LoraSegments.from_pairs(pairs)
    assert segments is not None
    assert lora.touches("embed", segments)
    y, base = embedding[ids], embedding[ids]
    lora.add_embedding_(y, ids, segments)
    exact = embedding_reference(base, ids, ADAPTERS, pairs)
    bound = embedding_reference(base.abs(), ids, *magnitudes(pairs)) * 60 * 2.0**-24
    assert ((y - exact).abs() <= bound).all()
    untouched = [row for row in range(ROWS) if row not in {r for r, slot, _ in pairs if slot not in (5, 6)}]
    assert torch.equal(y[untouched], base[untouched])
    if pairs is MIXED:  # rows 1 and 15 are the file's own, to the bit
        assert torch.equal(y[[1, 15]], ADAPTERS[1].tables["embed"].rows[[0, 2]].float())
        assert torch.equal(y[22], base[22]), "a token that slot 1 does not replace"


@pytest.mark.parametrize("pairs", [MIXED, LM_HEAD_COMPOSED], ids=["mixed", "composed"])
def test_logits_match_fp64(lora: BatchedLora, pairs: Pairs) -> None:
    _, x, head = inputs()
    segments = LoraSegments.from_pairs(pairs)
    assert segments is not None
    base = x @ head.T
    y = torch.full((ROWS, VOCAB + 16), float("nan"))[:, :VOCAB]  # logits are a slice of a wider tensor
    y.copy_(base)
    lora.add_(y, x, segments, "lm_head", 0)
    exact = site_reference(base, base, x, ADAPTERS, pairs, SHAPES, "lm_head", 0)
    used = magnitudes(pairs)
    size = site_reference(base.abs(), base.abs(), x.abs(), *used, SHAPES, "lm_head", 0)
    assert ((y - exact).abs() <= size * (HIDDEN + 60) * 2.0**-24).all()
    for row, slot, _ in pairs:
        if slot == 4 and pairs is MIXED:
            kept = [token for token in range(VOCAB) if token not in (0, 7, 8, 15, 16, 50)]
            assert torch.equal(y[row, kept], base[row, kept])
            assert (y[row, [0, 50]] != base[row, [0, 50]]).all()


@pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")
@pytest.mark.parametrize("pairs", [MIXED, LM_HEAD_COMPOSED], ids=["mixed", "composed"])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(pairs: Pairs) -> None:
    lora = BatchedLora(pool_of(ADAPTERS, "cpu"), "cpu")
    ids, x, head = inputs()
    logits, embedded = x @ head.T, head[ids]
    y, e = logits.clone(), embedded.clone()
    segments = LoraSegments.from_pairs(pairs)
    assert segments is not None
    lora.add_(y, x, segments, "lm_head", 0)
    lora.add_embedding_(e, ids, segments)
    for row in range(ROWS):
        alone, embedded_alone = logits[row : row + 1].clone(), embedded[row : row + 1].clone()
        own = LoraSegments.from_pairs([(0, slot, c) for other, slot, c in pairs if other == row])
        if own is not None:
            lora.add_(alone, x[row : row + 1], own, "lm_head", 0)
            lora.add_embedding_(embedded_alone, ids[row : row + 1], own)
        assert torch.equal(alone[0], y[row]), f"logits of row {row}"
        assert torch.equal(embedded_alone[0], e[row]), f"embedding of row {row}"


@pytest.mark.parametrize("pairs", [MIXED, [(1, 4, 1.0), (5, 3, 1.0)], [(1, 0, 1.0)]], ids=["all", "rows", "gain"])
def test_within_a_queue(lora: BatchedLora, pairs: Pairs) -> None:
    """Logits of x that is still to be computed: the tables' part is torch, and must not come first."""
    if lora.implementation != "cpu":
        pytest.skip("the others do not queue")
    from manylora.kernels.cpu.ops import NumbaOps

    ops, (_, x, head) = NumbaOps(), inputs()
    segments = LoraSegments.from_pairs(pairs)
    assert segments is not None
    prepared, norm = ops.prepare_embedding(head.bfloat16(), head=True), torch.ones(HIDDEN)
    expected = ops.logits(ops.rms_norm(x, norm, 1e-5), prepared)
    lora.add_(expected, ops.rms_norm(x, norm, 1e-5), segments, "lm_head", 0)
    kept = torch.zeros(ROWS, VOCAB)
    with ops.together():
        hidden = ops.rms_norm(x, norm, 1e-5)
        y = ops.logits(hidden, prepared)
        lora.add_(y, hidden, segments, "lm_head", 0)
        ops.flush()
        kept.copy_(y)
    assert torch.equal(kept, expected)


def test_what_has_no_meaning_is_refused(lora: BatchedLora) -> None:
    """Half a table, or two tables for one row."""
    ids, x, head = inputs()

    def compute(projection: str, pairs: Pairs) -> None:
        segments = LoraSegments.from_pairs(pairs)
        assert segments is not None
        if projection == "embed":
            lora.add_embedding_(head[ids], ids, segments)
        else:
            lora.add_(x @ head.T, x, segments, "lm_head", 0)

    for projection, other in (("embed", 1), ("lm_head", 4)):
        with pytest.raises(ValueError, match=rf"slot 2 replaces rows of `{projection}` and .* scale 1 only, got 0\.5"):
            compute(projection, [(0, 2, 0.5), (3, 2, 1.0)])
        with pytest.raises(ValueError, match=rf"two adapters that replace rows of `{projection}`"):
            compute(projection, [(4, 2, 1.0), (5, other, 1.0), (4, other, 1.0)])
