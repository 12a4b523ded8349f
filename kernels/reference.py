"""High-precision references: slow, obviously right, imported by tests and benchmarks as the one oracle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from manylora.kernels.lora_page import rows_of_b
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_weights import LoraPair, LoraVectors, LoraWeights, TableRows
from manylora.kernels.sites import RANK_PAGE, SITES, LoraShapes


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
    b = rows_of_b(pool.b[projection][pages, layer], n)[:rank]
    if projection in pool.page_scales:
        # Exact in fp64; in fp32 it rounds once more than the kernels do.
        a = a.double() * pool.page_scales[projection][pages, layer].reshape(-1)[:rank]
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


def site_reference(
    y: torch.Tensor,
    base: torch.Tensor,
    x: torch.Tensor,
    adapters: Mapping[int, LoraWeights],
    pairs: Iterable[tuple[int, int, float]],
    shapes: LoraShapes,
    site: str,
    layer: int,
) -> torch.Tensor:
    """All that adapters do at a site, from their own tensors and not from any pool's, in fp64: ``y`` ``[T, N]`` (the
    base's result with bias and residual), plus, for each pair (row, slot, c),
    ``c * (scale * b @ (a @ x) + (gain - 1) * base + bias)``; ``base`` ``[T, N]`` is the product alone. For ``lm_head``
    the logits of replaced rows come first. Returns a new tensor."""
    out, x, base, pairs = y.double().clone(), x.double(), base.double(), list(pairs)
    columns = shapes.site_offsets(site)
    for row, slot, _ in pairs:
        if site == "lm_head" and slot in adapters and (table := adapters[slot].tables.get("lm_head")) is not None:
            out[row, table.ids] = table.rows.double() @ x[row]
    for row, slot, c in pairs:
        weights = adapters.get(slot, LoraWeights({}))
        for j, projection in enumerate(SITES[site]):
            here = slice(columns[j], columns[j + 1])
            out[row, here] += c * _delta(weights, projection, layer, x[row], base[row, here])
    return out


def embedding_reference(
    base: torch.Tensor,
    token_ids: torch.Tensor,
    adapters: Mapping[int, LoraWeights],
    pairs: Iterable[tuple[int, int, float]],
) -> torch.Tensor:
    """The same for the embedding, whose input is one-hot: ``base`` ``[T, hidden]`` are the base's rows of the tokens
    ``[T]``, fp64 out."""
    out, pairs = base.double().clone(), list(pairs)
    for row, slot, _ in pairs:
        if slot in adapters and (table := adapters[slot].tables.get("embed")) is not None:
            for i in (table.ids == token_ids[row]).nonzero().flatten().tolist():
                out[row] = table.rows[i].double()
    for row, slot, c in pairs:
        weights = adapters.get(slot, LoraWeights({}))
        one_hot = None
        if ("embed", 0) in weights.pairs:
            one_hot = torch.zeros(weights.pairs["embed", 0].a.shape[1], dtype=torch.float64)
            one_hot[token_ids[row]] = 1
        out[row] += c * _delta(weights, "embed", 0, one_hot, base[row].double())
    return out


def absolute(weights: LoraWeights) -> LoraWeights:
    """An adapter for which the references above, given absolute values, return the sum of the magnitudes of what they
    add: what a rounding error is relative to."""
    return LoraWeights(
        {key: LoraPair(pair.a.abs(), pair.b.abs(), abs(pair.scale)) for key, pair in weights.pairs.items()},
        {
            key: LoraVectors(
                None if one.gain is None else 1 + (one.gain - 1).abs(), None if one.bias is None else one.bias.abs()
            )
            for key, one in weights.vectors.items()
        },
        {key: TableRows(table.ids, table.rows.abs()) for key, table in weights.tables.items()},
    )


def _delta(
    weights: LoraWeights, projection: str, layer: int, x: torch.Tensor | None, base: torch.Tensor
) -> torch.Tensor:
    total = torch.zeros_like(base)
    if x is not None and (pair := weights.pairs.get((projection, layer))) is not None:
        total += pair.scale * (pair.b.double() @ (pair.a.double() @ x))
    if (vectors := weights.vectors.get((projection, layer))) is not None:
        if vectors.gain is not None:
            total += (vectors.gain.double() - 1) * base
        if vectors.bias is not None:
            total += vectors.bias.double()
    return total
