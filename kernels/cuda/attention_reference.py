"""Paged causal attention from its definition, in fp64, with what an error bound of a kernel is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from manylora.kernels.ops import PAGE_SIZE, AttentionShape, PagedSequences

EPS = 2.0**-24
"""Half a unit in the last place of fp32, relative."""


@dataclass(frozen=True)
class AttentionReference:
    """fp64, ``[T, n_heads * head_dim]`` each: the output; ``sum_j p_j |v_j|``; and the largest
    ``sum |q| |k_j| / sqrt(head_dim)`` of the row's scores."""

    out: torch.Tensor
    spread: torch.Tensor
    scores: torch.Tensor

    def bound(self, head_dim: int, longest: int, rounding: float) -> torch.Tensor:
        """What a kernel that adds up in fp32 may be off by, for a cache of a type that rounds by ``rounding``.

        A score is a sum of ``head_dim`` products (Higham 2002, section 3.1), scaled twice, its maximum taken off: off
        by ``(head_dim + 4) EPS`` of its magnitudes. That moves a weight by as much relative to itself, and its
        normalisation by as much again. ``exp2`` is good to 2 units (CUDA C++ programming guide, intrinsics; 4 half
        units), there are up to ``longest`` summands, above and below the fraction, and each tile rescales both. A
        16-bit type rounds the weights once, and the output once; weights that fp16 flushes, below 2^-25, are lost in
        the 1%.
        """
        weights = 2 * (head_dim + 4) * EPS * self.scores + 2 * (longest + 8) * EPS
        return (weights + rounding) * self.spread * 1.01 + rounding * self.out.abs()


def attention_reference(
    q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], sequences: PagedSequences, shape: AttentionShape
) -> AttentionReference:
    """``q`` ``[T, n_heads * head_dim]``, rotated; keys and values ``[pages, kv_heads, 16, head_dim]`` with those of the
    new tokens in place. A sequence of context 0 (a padding row) gives zeros for its tokens."""
    group, d = shape.n_heads // shape.n_kv_heads, shape.head_dim
    found = torch.zeros(3, q.shape[0], shape.n_heads, d, dtype=torch.float64, device=q.device)
    for s, context in enumerate(sequences.contexts.tolist()):
        start, end = sequences.starts[s : s + 2].tolist()
        for token in range(start, end):
            at = context - end + token
            first = max(0, at - shape.window + 1) if shape.window else 0
            for head in range(shape.n_heads) if context else ():
                keys, values = (_positions(side, sequences.tables[s], head // group, first, at) for side in cache)
                query = q[token, head * d : (head + 1) * d].double()
                p = torch.softmax(keys @ query / d**0.5, 0)
                found[0, token, head] = p @ values
                found[1, token, head] = p @ values.abs()
                found[2, token, head] = (keys.abs() @ query.abs()).max() / d**0.5
    return AttentionReference(*found.view(3, q.shape[0], shape.q_size))


def _positions(side: torch.Tensor, table: torch.Tensor, kv_head: int, first: int, last: int) -> torch.Tensor:
    """Keys or values of positions ``first .. last``, fp64."""
    pages = table[first // PAGE_SIZE : last // PAGE_SIZE + 1].long()
    skipped = first // PAGE_SIZE * PAGE_SIZE
    return side[pages, kv_head].reshape(-1, side.shape[-1])[first - skipped : last + 1 - skipped].double()
