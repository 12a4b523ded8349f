"""VeRA (Kopiczko et al. 2023): ``delta_W = diag(b) B diag(d) A``, with random A and B that all modules share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from manylora.adapters.adapter_config import AdapterConfig
from manylora.adapters.base import BaseModel
from manylora.adapters.fp32 import array, tensor
from manylora.adapters.kinds.kind import Folded, Place, Shape
from manylora.kernels.lora_weights import LoraPair

_A, _B = "base_model.vera_A", "base_model.vera_B"


class Vera:
    def __init__(self, config: AdapterConfig) -> None:
        self.config = config
        self.name = "VeRA"
        self.not_composable = "it is a VeRA, which PEFT does not combine with others"
        self.needs_base = False

    def accepts(self, place: Place) -> str | None:
        return "VeRA on the embedding, which PEFT does not have" if place.projection == "embed" else None

    def rank(self, place: Place) -> int:
        return self.config.r

    def parts(self, place: Place) -> dict[str, Shape]:
        return {"vera_lambda_b": (place.n_out,), "vera_lambda_d": (self.config.r,)}

    def shared(self, places: Sequence[Place]) -> dict[str, Shape]:
        """As large as the largest adapted module in each direction; the others use the first rows and columns."""
        if not places:
            return {}
        r = self.config.r
        return {_A: (r, max(p.n_in for p in places)), _B: (max(p.n_out for p in places), r)}

    def fold(
        self,
        place: Place,
        parts: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        base: BaseModel | None,
    ) -> Folded:
        a = array(parts["vera_lambda_d"])[:, None] * array(shared[_A][:, : place.n_in])
        b = array(parts["vera_lambda_b"])[:, None] * array(shared[_B][: place.n_out])
        return Folded(LoraPair(tensor(a), tensor(b), 1.0))
