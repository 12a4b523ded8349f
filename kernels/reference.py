"""High-precision references: slow, obviously right, imported by tests and benchmarks as the one oracle."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.sites import RANK_PAGE, SITES


def pool_matrices(
    pool: LoraPool, projection: str, slot: int, layer: int
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """A ``[K, rank]``, B ``[rank, N]`` and scaling of a slot, put together from its pages; None without a delta."""
    rank = int(pool.ranks[projection][slot, layer])
    if rank == 0:
        return None
    pages = pool.page_table[projection][slot, : -(-rank // RANK_PAGE)].long()
    k, n = pool.shapes.in_features[projection], pool.shapes.out_features[projection]
    a = pool.a[projection][pages, layer].permute(1, 0, 2).reshape(k, -1)[:, :rank]
    b = pool.b[projection][pages, layer].reshape(-1, n)[:rank]
    return a, b, float(pool.scaling[projection][slot, layer])


def lora_reference(
    y: torch.Tensor,
    x: torch.Tensor,
    pool: LoraPool,
    pairs: Iterable[tuple[int, int, float]],
    site: str,
    layer: int,
) -> torch.Tensor:
    """``y`` plus the deltas of pairs (row, slot, scale), pair by pair in fp64. Returns a new fp64 tensor."""
    out = y.double().clone()
    columns = pool.shapes.site_offsets(site)
    for row, slot, scale in pairs:
        if slot < 0:
            continue
        for j, projection in enumerate(SITES[site]):
            matrices = pool_matrices(pool, projection, slot, layer)
            if matrices is not None:
                a, b, scaling = matrices
                out[row, columns[j] : columns[j + 1]] += scale * scaling * (x[row].double() @ a.double() @ b.double())
    return out


def lora_magnitude(
    x: torch.Tensor, pool: LoraPool, pairs: Iterable[tuple[int, int, float]], site: str, layer: int
) -> torch.Tensor:
    """``sum |scale * scaling * (x A)| @ |B|`` over the pairs of each row, fp64 ``[rows, N]``: what an error of the
    shrink's result, as by rounding it to 16 bits, is relative to."""
    columns = pool.shapes.site_offsets(site)
    out = torch.zeros(x.shape[0], columns[-1], dtype=torch.float64, device=x.device)
    for row, slot, scale in pairs:
        for j, projection in enumerate(SITES[site]):
            matrices = pool_matrices(pool, projection, slot, layer) if slot >= 0 else None
            if matrices is not None:
                a, b, scaling = matrices
                h = (scale * scaling * (x[row].double() @ a.double())).abs()
                out[row, columns[j] : columns[j + 1]] += h @ b.double().abs()
    return out
