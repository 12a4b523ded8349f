"""LoRA (Hu et al. 2021) with its variants: rsLoRA, a bias on lora_B, DoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from manylora.adapters.adapter_config import AdapterConfig
from manylora.adapters.base import BaseModel
from manylora.adapters.fp32 import array, tensor
from manylora.adapters.kinds.dora import dora_gain
from manylora.adapters.kinds.kind import Folded, Place, Shape
from manylora.kernels.lora_weights import LoraPair

MAGNITUDE = "lora_magnitude_vector"


class Lora:
    """``delta_W = scale * B @ A``; with DoRA ``W' = gain * (W + delta_W)``."""

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config

    @property
    def name(self) -> str:
        return "DoRA" if self.config.use_dora else "LoRA"

    @property
    def not_composable(self) -> str | None:
        return "it is a DoRA, whose outputs are not linear in its scale" if self.config.use_dora else None

    @property
    def needs_base(self) -> bool:
        return self.config.use_dora

    def accepts(self, place: Place) -> str | None:
        if self.config.lora_bias and place.projection == "embed":
            return "lora_bias on the embedding, which has no bias (PEFT refuses this too)"
        return None

    def rank(self, place: Place) -> int:
        return self.config.rank(place.path)

    def parts(self, place: Place) -> dict[str, Shape]:
        a, b = _factor_names(place)
        rank = self.rank(place)
        shapes: dict[str, Shape] = {a: (rank, place.n_in), b: (place.n_out, rank)}
        if self.config.lora_bias:
            shapes["lora_B.bias"] = (place.n_out,)
        if self.config.use_dora:
            shapes[MAGNITUDE] = (place.n_out,)
        return shapes

    def shared(self, places: Sequence[Place]) -> dict[str, Shape]:
        return {}

    def fold(
        self,
        place: Place,
        parts: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        base: BaseModel | None,
    ) -> Folded:
        a, b = (parts[name] for name in _factor_names(place))
        pair = LoraPair(a, b, self.config.scale(place.path))
        bias = tensor(array(parts["lora_B.bias"]) * pair.scale) if self.config.lora_bias else None
        if not self.config.use_dora or base is None:
            return Folded(pair, bias=bias)
        gain = dora_gain(place, pair, parts[MAGNITUDE], base)
        return Folded(LoraPair(a, tensor(gain[:, None] * array(b)), pair.scale), gain=tensor(gain))


def _factor_names(place: Place) -> tuple[str, str]:
    """An embedding has its own spelling: its factors are bare parameters."""
    if place.projection == "embed":
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"
