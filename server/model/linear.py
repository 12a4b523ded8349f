"""A fused linear site: ``y = NF4(W) x + sum_j scale_j B_j A_j x``. The one place where base and adapters meet."""

from __future__ import annotations

from typing import Any

import torch

from manylora.kernels.lora import BatchedLora, SiteAdapters
from manylora.kernels.ops import Ops
from manylora.kernels.sites import SITES
from manylora.server.model.weights import BaseWeights


class SiteLinear:
    """One of a layer's four sites (``qkv``, ``o``, ``gate_up``, ``down``), its projections' base rows fused."""

    def __init__(self, ops: Ops, weights: BaseWeights, site: str, layer: int, lora: BatchedLora | None) -> None:
        projections = SITES[site]
        tensors = [weights.projections[p, layer] for p in projections]
        biases = [weights.biases.get((p, layer)) for p in projections]
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat(
                [torch.zeros(t.shape[0]) if b is None else b.float() for t, b in zip(tensors, biases, strict=True)]
            )
        self._ops, self._site, self._layer, self._lora = ops, site, layer, lora
        self._weight: Any = ops.prepare_linear(tensors, bias)
        self.nbytes: int = self._weight.nbytes

    def __call__(self, x: torch.Tensor, adapters: Any | None, *, add_to: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` ``[T, K]`` -> ``[T, N]``; with ``add_to`` the result is added to that residual stream in place.

        ``adapters``: what ``BatchedLora.route`` made of the step's segments; None if every row is a base row.
        """
        of_site = None
        if adapters is not None and self._lora is not None:
            of_site = SiteAdapters(self._lora, adapters, self._site, self._layer)
        return self._ops.linear(x, self._weight, add_to=add_to, adapters=of_site)
