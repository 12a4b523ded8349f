"""LoKr (Yeh et al. 2023): ``delta_W = scale * kron(W1, W2)``, of which W2, and W1 too, may be a product of rank r.

The rank of a Kronecker product is the product of the ranks, and ``kron(P Q, R S) = kron(P, R) kron(Q, S)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from manylora.adapters.adapter_config import AdapterConfig
from manylora.adapters.base import BaseModel
from manylora.adapters.fp32 import Array, array
from manylora.adapters.kinds.dense import pair_of
from manylora.adapters.kinds.kind import Folded, Place, Shape


class LoKr:
    def __init__(self, config: AdapterConfig) -> None:
        self.config = config
        self.name = "LoKr"
        self.not_composable = None  # PEFT rescales them and adds up those that are active together
        self.needs_base = False

    def accepts(self, place: Place) -> str | None:
        return "LoKr on the embedding, which PEFT does not have" if place.projection == "embed" else None

    def rank(self, place: Place) -> int:
        return min(self._rank_of_factors(place), place.n_in, place.n_out)

    def parts(self, place: Place) -> dict[str, Shape]:
        r = self.config.rank(place.path)
        (out1, out2), (in1, in2) = self._sizes(place)
        shapes: dict[str, Shape] = {}
        if self._splits_first(place):
            shapes |= {"lokr_w1_a": (out1, r), "lokr_w1_b": (r, in1)}
        else:
            shapes["lokr_w1"] = (out1, in1)
        if self._splits_second(place):
            shapes |= {"lokr_w2_a": (out2, r), "lokr_w2_b": (r, in2)}
        else:
            shapes["lokr_w2"] = (out2, in2)
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
        (b1, a1), (b2, a2) = (_split(parts, name) for name in ("lokr_w1", "lokr_w2"))

        def factors() -> tuple[Array, Array]:
            return np.kron(b1, b2), np.kron(a1, a2)

        def whole() -> Array:
            return np.kron(b1 @ a1, b2 @ a2)

        return Folded(pair_of(place, self._rank_of_factors(place), self.config.scale(place.path), factors, whole))

    def _rank_of_factors(self, place: Place) -> int:
        r = self.config.rank(place.path)
        (out1, out2), (in1, in2) = self._sizes(place)
        first = r if self._splits_first(place) else min(out1, in1)
        second = r if self._splits_second(place) else min(out2, in2)
        return first * second

    def _sizes(self, place: Place) -> tuple[tuple[int, int], tuple[int, int]]:
        factor = self.config.decompose_factor
        return factorization(place.n_out, factor), factorization(place.n_in, factor)

    # PEFT keeps a factor whole where its rank would be no less than half of its larger side.
    def _splits_first(self, place: Place) -> bool:
        (out1, _), (in1, _) = self._sizes(place)
        return self.config.decompose_both and 2 * self.config.rank(place.path) < max(out1, in1)

    def _splits_second(self, place: Place) -> bool:
        (_, out2), (_, in2) = self._sizes(place)
        return 2 * self.config.rank(place.path) < max(out2, in2)


def factorization(size: int, factor: int) -> tuple[int, int]:
    """How PEFT splits a side of a weight in two: by ``factor`` if it divides it, else with the first part the largest
    divisor that is neither above ``factor`` (-1: no limit) nor above the second part."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    best = 1
    candidate = 2
    while candidate * candidate <= size and candidate <= limit:
        if size % candidate == 0:
            best = candidate
        candidate += 1
    return best, size // best


def _split(parts: Mapping[str, torch.Tensor], name: str) -> tuple[Array, Array]:
    """``(p, q)`` with ``p @ q`` the factor: as saved, or itself with an identity on its shorter side."""
    if name not in parts:
        return array(parts[f"{name}_a"]), array(parts[f"{name}_b"])
    whole = array(parts[name])
    rows, columns = whole.shape
    if columns <= rows:
        return whole, np.eye(columns, dtype=np.float32)
    return np.eye(rows, dtype=np.float32), whole
