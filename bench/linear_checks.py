"""The fused linear kernel on a GPU, at real sizes, where the interpreter cannot follow: byte permutes, matrix units,
many programs at once that wait for each other.

Bounds: products of two 16-bit values are exact in fp32; a sum of K of them rounds at most K times relative to the sum
of the magnitudes (in practice far less), h is rounded to 16 bits once and the result once.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gpu_timing  # noqa: F401 - makes the checkout importable on a bare machine
import torch

from manylora.kernels.cuda.configs import configs_for
from manylora.kernels.cuda.linear import LinearAdapters, LinearKernels
from manylora.kernels.cuda.lora_op import TritonLora
from manylora.kernels.cuda.nf4_words import pack
from manylora.kernels.cuda.scratch import Scratch
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.lora_weights import LoraVectors, LoraWeights
from manylora.kernels.reference import lora_magnitude, lora_reference
from manylora.kernels.sites import SITES, LoraShapes
from manylora.server.model.synthetic import synthetic_adapter, synthetic_nf4

SHAPES = LoraShapes(
    n_layers=2,
    in_features={p: 4096 for p in ("q", "k", "v", "o", "gate", "up")} | {"down": 14336, "lm_head": 64, "embed": 64},
    out_features={"q": 4096, "k": 1024, "v": 1024, "o": 4096, "gate": 14336, "up": 14336, "down": 4096}
    | {"lm_head": 64, "embed": 64},
)
SMALL = LoraShapes(
    n_layers=2,
    in_features={p: 576 for p in ("q", "k", "v", "o", "gate", "up", "lm_head", "embed")} | {"down": 1536},
    out_features={"q": 576, "k": 192, "v": 192, "o": 576, "gate": 1536, "up": 1536, "down": 576, "lm_head": 64}
    | {"embed": 576},
)
"""SmolLM2-135M: projections that share a tile, K of 9 blocks."""
ROWS = (1, 15, 16, 17, 33, 64, 128)


class Wrong(AssertionError):
    """A kernel's result is not what it must be; the message says which."""


def check_linears(device: torch.device, *, seconds: float, rows: tuple[int, ...] = ROWS) -> dict[str, Any]:
    """All checks, most important first, until the time is over. Raises Wrong. How many were made."""
    began, on_gpu = time.monotonic(), device.type == "cuda"
    cases: list[tuple[LoraShapes, str, torch.dtype, bool]] = []
    for dtype in (torch.bfloat16, torch.float16) if on_gpu else (torch.float32,):
        for nested in (True, False):
            cases += [(SHAPES, site, dtype, nested) for site in ("qkv", "down", "o", "gate_up") if on_gpu]
            cases += [(SMALL, site, dtype, nested) for site in ("qkv", "down")]
    # The kernel is compiled with gains and biases, or without them: half of the cases each.
    pools = {(id(shapes), dtype, nested): _pool(shapes, dtype, device, nested) for shapes, _, dtype, nested in cases}

    def one(case: tuple[LoraShapes, str, torch.dtype, bool]) -> bool:
        shapes, site, dtype, nested = case
        if time.monotonic() - began > seconds:
            return False
        _check(shapes, site, dtype, nested, pools[id(shapes), dtype, nested], device, rows)
        return True

    # Side by side, because most of the time is Triton's compiler, which does not hold Python's lock.
    with ThreadPoolExecutor(8 if on_gpu else 1) as threads:
        made = sum(threads.map(one, cases))
    if made == 0:
        raise Wrong("no time was left to check anything")
    return {"checked": made, "left_out": len(cases) - made}


def _pool(shapes: LoraShapes, dtype: torch.dtype, device: torch.device, vectors: bool) -> LoraPool:
    """``vectors``: slots 1 and 3 have gains and biases too, at every projection in layer 1."""
    pool = LoraPool(shapes, max_slots=6, max_pages=12, max_rank=64, dtype=dtype, device=device, vectors=vectors)
    random = torch.Generator().manual_seed(2)
    every = ("q", "k", "v", "o", "gate", "up", "down")
    for slot, (rank, projections) in enumerate(
        [(16, every), (1, ("q", "down", "up")), (40, every), (64, ("v", "down"))]
    ):
        weights = synthetic_adapter(shapes, rank, seed=slot, projections=projections, dtype=dtype)
        if vectors and slot % 2:
            sizes = {(p, 1): (shapes.out_features[p],) for p in every}
            of_modules = {
                key: LoraVectors(1 + 0.1 * torch.randn(n, generator=random), torch.randn(n, generator=random))
                for key, n in sizes.items()
            }
            weights = LoraWeights(weights.pairs, of_modules)
        pool.write(slot, weights)
    return pool


def _of_vectors(y64: torch.Tensor, pool: LoraPool, pairs: list[tuple[int, int, float]], site: str) -> torch.Tensor:
    """What gains and biases add to the base's products ``y64``."""
    added, store = torch.zeros_like(y64), pool.sites[site]
    for row, slot, scale in pairs:
        if pool.contents(slot).has_vectors(site, 1):
            added[row] += scale * ((store.gain[slot, 1].double() - 1) * y64[row] + store.bias[slot, 1].double())
    return added


def _check(
    shapes: LoraShapes, site: str, dtype: torch.dtype, nested: bool, pool: LoraPool, device: torch.device,
    counts: tuple[int, ...],
) -> None:  # fmt: skip
    what = f"{site}, K {shapes.in_features[SITES[site][0]]}, {dtype}, {'nested' if nested else 'plain'} scales"
    random = torch.Generator(device).manual_seed(1)
    k = shapes.in_features[SITES[site][0]]
    words = pack([synthetic_nf4(shapes.out_features[p], k, random, nested=nested) for p in SITES[site]], dtype)
    on_gpu, scratch = device.type == "cuda", Scratch(device)
    kernels = LinearKernels(configs_for(device), scratch, fast=on_gpu, wide=not on_gpu)
    plain = LinearKernels(configs_for(device), scratch, fast=False, wide=not on_gpu)
    exact_w = words.dequantize()
    if not torch.equal(kernels.dequantize(words, dtype), exact_w.to(dtype)):
        raise Wrong(f"{what}: dequantised weights differ from value * scale")
    lora = TritonLora(pool, scratch)
    most = max(counts)
    x = torch.randn(most, k, device=device, generator=random).to(dtype)
    y64, size = x.double() @ exact_w.double().T, x.double().abs() @ exact_w.double().abs().T
    rounding = torch.finfo(dtype).eps
    base = kernels.fused(x, words, None, None, None)
    for m in counts:
        y = kernels.fused(x[:m], words, None, None, None)
        if not bool(((y.double() - y64[:m]).abs() <= size[:m] * k * 2.0**-24 + rounding * y64[:m].abs()).all()):
            raise Wrong(f"{what}: {m} rows are off from fp64")
        if on_gpu and not torch.equal(y, base[:m]):
            raise Wrong(f"{what}: {m} rows have other bits than in a batch of {most}")
        # Nested scales are rounded once more without the fast path's own multiplication.
        if not nested and m <= 16 and not torch.equal(y, plain.fused(x[:m], words, None, None, None)):
            raise Wrong(f"{what}: byte permutes and plain look-ups differ for {m} rows")
        pairs = [(row, row % 5, 0.5 + row % 3) for row in range(m) if row % 4 != 1]
        pairs += [(row, 2, -1.0) for row in range(0, m, 8) if row % 5 != 2]
        segments = LoraSegments.from_pairs(pairs, device)
        if segments is None:
            continue
        results = []
        for _ in range(3):  # three times: timing differs, bits must not
            done = torch.zeros(1, dtype=torch.int32, device=device)
            adapters = LinearAdapters(lora, lora.route(segments, m), site, 1, done)
            results.append(kernels.fused(x[:m], words, None, None, adapters))
        if not all(torch.equal(results[0], other) for other in results[1:]):
            raise Wrong(f"{what}: {m} rows with adapters: other bits in another run")
        of_vectors = _of_vectors(y64[:m], pool, pairs, site)
        expected = lora_reference(y64[:m], x[:m], pool, pairs, site, 1) + of_vectors
        bound = size[:m] * (k * 2.0**-24) + rounding * (expected.abs() + lora_magnitude(x[:m], pool, pairs, site, 1))
        # Of the gain's product: the base's error times at most 3 * |gain - 1|, which is below 1.5.
        bound += (of_vectors != 0) * 1.5 * size[:m] * (k * 2.0**-24) + of_vectors.abs() * 2.0**-20
        if not bool(((results[0].double() - expected).abs() <= bound).all()):
            raise Wrong(f"{what}: {m} rows with adapters are off from fp64")
        with_slot = {row for row, _, _ in pairs}
        others = [row for row in range(m) if row not in with_slot]
        if not torch.equal(results[0][others], y[others]):
            raise Wrong(f"{what}: {m} rows: base rows differ from the kernel without adapters")
