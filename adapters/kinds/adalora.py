"""AdaLoRA (Zhang et al. 2023): ``delta_W = scale * B diag(E) A`` over the ranks that were kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from manylora.adapters.adapter_config import AdapterConfig
from manylora.adapters.base import BaseModel
from manylora.adapters.fp32 import array, tensor
from manylora.adapters.kinds.kind import Folded, Place, Shape
from manylora.kernels.lora_weights import LoraPair

_EPSILON = 1e-5
"""PEFT's, against a division by a rank of zero."""


class AdaLora:
    def __init__(self, config: AdapterConfig) -> None:
        self.config = config
        self.name = "AdaLoRA"
        self.not_composable = "it is an AdaLoRA, which PEFT does not combine with others"
        self.needs_base = False

    def accepts(self, place: Place) -> str | None:
        return "AdaLoRA on the embedding, which PEFT does not have" if place.projection == "embed" else None

    def rank(self, place: Place) -> int:
        return self.config.rank(place.path)

    def parts(self, place: Place) -> dict[str, Shape]:
        rank = self.rank(place)
        return {"lora_A": (rank, place.n_in), "lora_B": (place.n_out, rank), "lora_E": (rank, 1)}

    def shared(self, places: Sequence[Place]) -> dict[str, Shape]:
        return {}

    def fold(
        self,
        place: Place,
        parts: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        base: BaseModel | None,
    ) -> Folded:
        rank = self.rank(place)
        if rank == 0:  # pruned away
            return Folded(None)
        # PEFT divides by the initial rank, also where fewer were kept, and takes the rank for an alpha that is not
        # positive.
        alpha = self.config.alpha if self.config.alpha > 0 else float(rank)
        scale = alpha / (self.config.r + _EPSILON)
        return Folded(LoraPair(tensor(array(parts["lora_A"]) * array(parts["lora_E"])), parts["lora_B"], scale))
