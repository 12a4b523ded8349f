"""Small shapes shared by the kernel tests: every projection has its own width, so that a mix-up cannot pass."""

from __future__ import annotations

import torch

from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_weights import LoraPair, LoraWeights
from manylora.kernels.sites import LoraShapes

SHAPES = LoraShapes(
    n_layers=2,
    in_features={
        "q": 96, "k": 96, "v": 96, "o": 64, "gate": 96, "up": 96, "down": 80, "lm_head": 96, "embed": 100,
    },
    out_features={
        "q": 64, "k": 32, "v": 32, "o": 96, "gate": 80, "up": 80, "down": 96, "lm_head": 112, "embed": 96,
    },
)  # fmt: skip


def random_weights(rank: int, projections: tuple[str, ...], seed: int, scale: float = 1.0) -> LoraWeights:
    """An adapter with non-zero A and B on the given projections, in all their layers."""
    random = torch.Generator().manual_seed(seed)
    pairs = {
        (p, layer): LoraPair(
            torch.randn(rank, SHAPES.in_features[p], generator=random),
            torch.randn(SHAPES.out_features[p], rank, generator=random),
            scale,
        )
        for p in projections
        for layer in range(SHAPES.layers_of(p))
    }
    return LoraWeights(pairs)


def pool_of(*adapters: LoraWeights, max_pages: int = 40, page_dtype: torch.dtype | None = None) -> LoraPool:
    """A pool with the adapters in slots 0, 1, ..."""
    pool = LoraPool(SHAPES, max_slots=max(len(adapters), 1), max_pages=max_pages, page_dtype=page_dtype)
    for slot, weights in enumerate(adapters):
        pool.write(slot, weights)
    return pool
