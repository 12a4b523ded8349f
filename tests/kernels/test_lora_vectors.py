"""Gains and biases of adapters through the linear layer, on every path, against fp64 from the adapters' own tensors.

Bounds: every result is an fp32 sum of at most K + 300 rounded terms, and the base's product, which gains multiply, is
itself one; relative to the sums of the magnitudes (Higham, Accuracy and Stability, section 3.1).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from manylora.kernels.cpu import available
from manylora.kernels.lora import BatchedLora, SiteAdapters
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.lora_weights import LoraPair, LoraVectors, LoraWeights
from manylora.kernels.ops import Ops
from manylora.kernels.reference import absolute, site_reference
from manylora.kernels.sites import LAYER_PROJECTIONS, SITES, LoraShapes
from manylora.kernels.torch_ops import TorchOps
from manylora.server.model.synthetic import synthetic_nf4

SHAPES = LoraShapes(
    n_layers=2,
    in_features={p: 192 for p in ("q", "k", "v", "gate", "up", "lm_head")} | {"o": 128, "down": 320, "embed": 112},
    out_features={
        "q": 64, "k": 32, "v": 48, "o": 192, "gate": 80, "up": 80, "down": 192, "lm_head": 112, "embed": 192,
    },
)  # fmt: skip
ROWS = 21
PATHS = [
    pytest.param("cpu", marks=pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")),
    pytest.param("cpu, torch adapters", marks=pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")),
    "torch",
    *(
        pytest.param(
            path, marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here")
        )
        for path in ("fused", "dense", "fused, torch adapters")
    ),
]

Pairs = list[tuple[int, int, float]]


def adapter(
    seed: int, rank: int = 0, *, pairs: tuple[str, ...] = (), gain: tuple[str, ...] = (), bias: tuple[str, ...] = (),
    layers: tuple[int, ...] = (0, 1),
) -> LoraWeights:  # fmt: skip
    """Random tensors on the projections named; gains and biases in ``layers`` only (layer 0 if the model has one)."""
    random = torch.Generator().manual_seed(seed)
    made = {
        (p, layer): LoraPair(
            torch.randn(rank, SHAPES.in_features[p], generator=random),
            torch.randn(SHAPES.out_features[p], rank, generator=random),
            0.5 + layer,
        )
        for p in pairs
        for layer in range(SHAPES.layers_of(p))
    }
    vectors = {}
    for p in dict.fromkeys((*gain, *bias)):
        n = SHAPES.out_features[p]
        for layer in range(SHAPES.layers_of(p)):
            if layer in layers or SHAPES.layers_of(p) == 1:
                own_gain = 1 + 0.3 * torch.randn(n, generator=random) if p in gain else None
                vectors[p, layer] = LoraVectors(own_gain, torch.randn(n, generator=random) if p in bias else None)
    return LoraWeights(made, vectors)


EVERY = (*LAYER_PROJECTIONS, "lm_head")
ADAPTERS = {
    0: adapter(1, 8, pairs=EVERY),
    1: adapter(2, 16, pairs=EVERY, gain=EVERY, bias=EVERY),
    2: adapter(3, gain=EVERY, bias=("q", "down")),  # no pages at all
    3: adapter(4, 20, pairs=("v", "down"), gain=("q", "o", "down", "up"), layers=(1,)),
    4: adapter(5, 33, pairs=("k", "up", "lm_head"), bias=("k", "up", "lm_head"), layers=(0,)),
}
"""Slot 5 is empty."""
PLAIN = {slot: LoraWeights(weights.pairs) for slot, weights in ADAPTERS.items()}


def pool_of(adapters: dict[int, LoraWeights]) -> LoraPool:
    """What was never written is NaN, and slot 1 was another's before."""
    pool = LoraPool(SHAPES, max_slots=6, max_pages=10, max_rank=48)
    for store in pool.sites.values():
        for tensor in (store.a, store.b, store.gain, store.bias):
            tensor.fill_(float("nan"))
    pool.write(1, adapter(9, 40, pairs=EVERY, gain=("v", "gate"), bias=EVERY))
    pool.clear(1)
    for slot, weights in adapters.items():
        pool.write(slot, weights)
    return pool


def make_ops(path: str) -> Ops:
    if path.startswith("cpu"):
        from manylora.kernels.cpu.ops import NumbaOps

        return NumbaOps("fp32")
    if path == "torch":
        return TorchOps("cpu", torch.float32, resident=True)
    from manylora.kernels.cuda.ops import CudaOps

    ops = CudaOps("cpu", torch.float32)
    if path == "dense":
        ops.configs = replace(ops.configs, dense_above=0)
    return ops


class Layer:
    """One site's weight in one path, and its exact values."""

    def __init__(self, path: str, site: str, adapters: dict[int, LoraWeights], *, bias: bool = True) -> None:
        random = torch.Generator().manual_seed(len(site))
        self.ops, self.site, self.adapters = make_ops(path), site, adapters
        weights = [
            synthetic_nf4(SHAPES.out_features[p], SHAPES.in_features[p], random, nested=False) for p in SITES[site]
        ]
        self.bias = torch.randn(SHAPES.site_offsets(site)[-1], generator=random) if bias else None
        self.weight = self.ops.prepare_linear(weights, self.bias)
        self.exact = self.ops.dense(self.weight).double()  # CUDA's kernels multiply with 16-bit codes
        name: Any = {"cpu": "cpu", "fused": "triton", "dense": "triton"}.get(path, "torch")
        self.lora = BatchedLora(pool_of(adapters), name)

    def x(self, rows: int = ROWS) -> torch.Tensor:
        return torch.randn(rows, self.exact.shape[1], generator=torch.Generator().manual_seed(3))

    def residual(self, rows: int = ROWS) -> torch.Tensor:
        return torch.randn(rows, self.exact.shape[0], generator=torch.Generator().manual_seed(4))

    def run(self, x: torch.Tensor, pairs: Pairs, layer: int, residual: torch.Tensor | None = None) -> torch.Tensor:
        segments = LoraSegments.from_pairs(pairs)
        adapters = None
        if segments is not None:
            adapters = SiteAdapters(self.lora, self.lora.route(segments, x.shape[0]), self.site, layer)
        add_to = None if residual is None else residual.clone()
        return self.ops.linear(x, self.weight, add_to=add_to, adapters=adapters)

    def expected(
        self, x: torch.Tensor, pairs: Pairs, layer: int, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        for exact in (True, False):
            change: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.double if exact else torch.Tensor.abs
            inputs, base = change(x.double()), change(x.double()) @ change(self.exact).T
            y = base.clone()
            for term in (self.bias, residual):
                y += 0 if term is None else change(term.double())
            adapters = {s: w if exact else absolute(w) for s, w in self.adapters.items()}
            used = [(row, slot, c if exact else abs(c)) for row, slot, c in pairs]
            found.append(site_reference(y, base, inputs, adapters, used, SHAPES, self.site, layer))
        return found[0], found[1] * (x.shape[1] + 300) * 2.0**-24


def _distinct() -> Pairs:
    return [(row, row % 6, 1.0) for row in range(ROWS)]


def _identical() -> Pairs:
    return [(row, 1, 0.5) for row in range(ROWS)]


def _mixed_with_base() -> Pairs:
    return [(row, 3 if row % 3 else row % 5, 1.5) for row in range(ROWS) if row % 4]


def _composed() -> Pairs:
    return [(row, slot, c) for row in range(0, ROWS, 2) for slot, c in ((3, 0.3), (0, 0.7), (1, -1.0), (2, 2.0))]


def _single() -> Pairs:
    return [(13, 2, 1.0)]


BATCHES = (_distinct, _identical, _mixed_with_base, _composed, _single)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("make", BATCHES, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize(("site", "layer", "bias"), [("qkv", 1, True), ("down", 1, False), ("gate_up", 0, True)])
def test_gains_and_biases_match_fp64(path: str, make: Callable[[], Pairs], site: str, layer: int, bias: bool) -> None:
    one = Layer(path, site, ADAPTERS, bias=bias)
    x, pairs = one.x(), make()
    for residual in (None, one.residual()):
        y = one.run(x, pairs, layer, residual)
        exact, bound = one.expected(x, pairs, layer, residual)
        assert ((y - exact).abs() <= bound).all()  # false for NaN
        without, _ = one.expected(x, [], layer, residual)
        assert ((exact - without).abs() > 100 * bound).any(), "nothing was to be seen"


@pytest.mark.parametrize("path", [PATHS[0], PATHS[1], PATHS[3]])
@pytest.mark.parametrize("residual", [False, True])
def test_rows_without_vectors_keep_their_bits(path: str, residual: bool) -> None:
    """Rows of the base, and of adapters that have none there, beside rows that have some. (In torch, and for prompts
    on CUDA, the products are a library's, which promises nothing of the kind.)"""
    for site in ("qkv", "down"):
        ours, plain = (Layer(path, site, adapters) for adapters in (ADAPTERS, PLAIN))
        x, pairs = ours.x(), [(row, row % 5, 1.0) for row in range(ROWS) if row % 7]
        added = ours.residual() if residual else None
        y, expected = ours.run(x, pairs, 0, added), plain.run(x, pairs, 0, added)
        without = [row for row in range(ROWS) if row % 7 == 0 or row % 5 in ((0, 3) if site == "qkv" else (0, 3, 4))]
        assert torch.equal(y[without], expected[without])
        others = [row for row in range(ROWS) if row % 7 and row % 5 in (1, 2)]
        assert (y[others] != expected[others]).any(dim=1).all()


@pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("make", BATCHES, ids=lambda f: f.__name__.strip("_"))
def test_a_row_alone_has_the_bits_it_has_in_a_batch(make: Callable[[], Pairs], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for site, bias, residual in (("qkv", True, False), ("down", False, True), ("gate_up", True, True)):
            one = Layer("cpu", site, ADAPTERS, bias=bias)
            x, pairs = one.x(), make()
            added = one.residual() if residual else None
            y = one.run(x, pairs, 0, added)
            for row in range(ROWS):
                own = [(0, slot, c) for other, slot, c in pairs if other == row]
                alone = one.run(x[row : row + 1], own, 0, None if added is None else added[row : row + 1])
                assert torch.equal(alone[0], y[row]), f"{site}, row {row}"
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_queued_with_other_kernels_gives_the_same_bits(threads: int) -> None:
    """What is set aside for a few rows lies in scratch memory that the next layer takes again."""
    from manylora.kernels.cpu.ops import NumbaOps

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ops, lora, random = NumbaOps(), BatchedLora(pool_of(ADAPTERS), "cpu"), torch.Generator().manual_seed(1)
        up = [synthetic_nf4(SHAPES.out_features[p], 192, random, nested=False) for p in ("gate", "up")]
        wide, narrow = ops.prepare_linear(up, None), ops.prepare_linear([synthetic_nf4(192, 320, random)], None)
        norm = torch.rand(192, generator=random)
        segments = LoraSegments.from_pairs(_composed())
        assert segments is not None
        adapters = lora.route(segments, ROWS)
        x = torch.randn(ROWS, 192, generator=random)
        spread = torch.randn(80, 320, generator=random)

        def layer(x: torch.Tensor, i: int) -> torch.Tensor:
            y = ops.linear(ops.rms_norm(x, norm, 1e-5), wide, adapters=SiteAdapters(lora, adapters, "gate_up", i % 2))
            gated = ops.silu_mul(y)
            ops.flush()
            return ops.linear(
                gated @ spread / 20, narrow, add_to=x, adapters=SiteAdapters(lora, adapters, "down", i % 2)
            )

        one_by_one, together = x.clone(), x.clone()
        for i in range(6):
            layer(one_by_one, i)
        for _ in range(3):
            together = x.clone()
            with ops.together():
                for i in range(6):
                    with ops.together():
                        layer(together, i)
            assert torch.isfinite(together).all()
            assert torch.equal(together, one_by_one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", PATHS)
def test_logits_have_the_vectors_of_lm_head(path: str) -> None:
    if path == "dense":
        pytest.skip("as fused")
    one = Layer(path, "lm_head", ADAPTERS, bias=False)
    x, pairs = one.x(), [*_composed(), (5, 4, 1.0), (7, 2, 1.0), (9, 0, 1.0)]
    segments = LoraSegments.from_pairs(pairs)
    assert segments is not None
    y = (x.double() @ one.exact.T).float()
    before = y.clone()
    one.lora.add_(y, x, segments, "lm_head", 0)
    exact, bound = one.expected(x, pairs, 0, None)
    assert ((y - exact).abs() <= bound).all()
    assert torch.equal(y[[1, 3]], before[[1, 3]])


@pytest.mark.parametrize("implementation", ["torch", "triton", "cpu"])
def test_what_cannot_be_applied_is_refused(implementation: Any) -> None:
    """Never silently without: the op by itself cannot know the product without bias and residual."""
    if implementation == "cpu" and not available():
        pytest.skip("no AVX2 and FMA here")
    if implementation == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("no triton here")
    lora = BatchedLora(pool_of(ADAPTERS), implementation)
    segments = LoraSegments.from_pairs([(0, 0, 1.0), (1, 3, 1.0), (4, 1, 1.0)])
    assert segments is not None
    x, y = torch.ones(5, 128), torch.zeros(5, 192)
    with pytest.raises(ValueError, match=r"gains and biases at `o` need the products of their 2 rows, .*got nothing"):
        lora.add_(y, x, segments, "o", 1)
    with pytest.raises(ValueError, match=r"\[2, 192\], got \[5, 192\]"):
        lora.add_(y, x, segments, "o", 1, base=y)
    assert not y.any(), "something was added before"
    plain = LoraSegments.from_pairs([(0, 0, 1.0), (1, 3, 1.0)])
    assert plain is not None
    lora.add_(y, x, plain, "o", 0)  # slot 3 has none in layer 0
    assert y[0].any()
