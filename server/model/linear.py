"""A fused linear site: ``y = NF4(W) x + sum_j scale_j B_j A_j x``. The one place where base and adapters meet."""

from __future__ import annotations

from typing import Any

import torch

from manylora.kernels.lora import BatchedLora, SiteAdapters
from manylora.kernels.ops import Ops


class SiteLinear:
    """One of a layer's four sites (``qkv``, ``o``, ``gate_up``, ``down``), its projections' base rows fused in
    ``weight``, as the operations prepared it."""

    def __init__(self, ops: Ops, weight: Any, site: str, layer: int, lora: BatchedLora | None) -> None:
        self._ops, self._weight, self._site, self._layer, self._lora = ops, weight, site, layer, lora

    def __call__(self, x: torch.Tensor, adapters: Any | None, *, add_to: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` ``[T, K]`` -> ``[T, N]``; with ``add_to`` the result is added to that residual stream in place.

        ``adapters``: what ``BatchedLora.route`` made of the step's segments; None if every row is a base row.
        """
        of_site = None
        if adapters is not None and self._lora is not None:
            of_site = SiteAdapters(self._lora, adapters, self._site, self._layer)
        return self._ops.linear(x, self._weight, add_to=add_to, adapters=of_site)
