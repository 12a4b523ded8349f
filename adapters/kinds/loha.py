"""LoHa (FedPara, Hyeon-Woo et al. 2022): ``delta_W = scale * (W1a W1b) * (W2a W2b)``, element by element.

Exactly a delta of rank r^2 (proposition 1 there): the columns of its B are the products of every column of W1a with
every column of W2a, and so for the rows of A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from manylora.adapters.adapter_config import AdapterConfig
from manylora.adapters.base import BaseModel
from manylora.adapters.fp32 import Array, array
from manylora.adapters.kinds.dense import pair_of
from manylora.adapters.kinds.kind import Folded, Place, Shape


class LoHa:
    def __init__(self, config: AdapterConfig) -> None:
        self.config = config
        self.name = "LoHa"
        self.not_composable = None  # PEFT rescales them and adds up those that are active together
        self.needs_base = False

    def accepts(self, place: Place) -> str | None:
        return "LoHa on the embedding, which PEFT does not have" if place.projection == "embed" else None

    def rank(self, place: Place) -> int:
        return min(self.config.rank(place.path) ** 2, place.n_in, place.n_out)

    def parts(self, place: Place) -> dict[str, Shape]:
        r = self.config.rank(place.path)
        down, up = (r, place.n_in), (place.n_out, r)
        return {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up, "hada_w2_b": down}

    def shared(self, places: Sequence[Place]) -> dict[str, Shape]:
        return {}

    def fold(
        self,
        place: Place,
        parts: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        base: BaseModel | None,
    ) -> Folded:
        w1a, w1b, w2a, w2b = (array(parts[name]) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
        r = w1a.shape[1]

        def factors() -> tuple[Array, Array]:
            b = (w1a[:, :, None] * w2a[:, None, :]).reshape(place.n_out, r * r)
            a = (w1b[:, None, :] * w2b[None, :, :]).reshape(r * r, place.n_in)
            return b, a

        scale = self.config.scale(place.path)
        return Folded(pair_of(place, r * r, scale, factors, lambda: (w1a @ w1b) * (w2a @ w2b)))
