"""What one kind of adapter knows: the tensors that PEFT saves for a module, and what they amount to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch

from manylora.adapters.base import BaseModel
from manylora.adapters.fp32 import array, tensor
from manylora.kernels.lora_weights import LoraPair, Module

Shape: TypeAlias = tuple[int, ...]
Values: TypeAlias = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Place:
    """A module of the base that may be adapted. ``n_in``, ``n_out``: K and N of its weight ``[N, K]``; the embedding's
    input is a one-hot token, so K is the vocabulary.

    A fused module (Phi-3's ``qkv_proj``) holds several projections, the rows of one behind those of the other:
    ``others`` are those behind ``projection``, and ``sizes`` the rows of each; both empty where there is but one.
    """

    path: str
    """PEFT's path of it, e.g. ``model.layers.3.self_attn.q_proj``."""
    projection: str
    layer: int
    n_in: int
    n_out: int
    others: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def projections(self) -> tuple[str, ...]:
        return (self.projection, *self.others)

    @property
    def modules(self) -> tuple[Module, ...]:
        """What the kernels call its parts."""
        return tuple((projection, self.layer) for projection in self.projections)

    def weight(self, base: BaseModel) -> torch.Tensor:
        """fp32 ``[n_out, n_in]``; of a layer's module, not of a table."""
        parts = [base.weight(projection, self.layer) for projection in self.projections]
        return parts[0] if len(parts) == 1 else tensor(np.concatenate([array(part) for part in parts]))

    def bias(self, base: BaseModel) -> torch.Tensor | None:
        """fp32 ``[n_out]``; None if the module has none."""
        parts = [base.bias(projection, self.layer) for projection in self.projections]
        whole = [part for part in parts if part is not None]
        if len(whole) < 2:
            return whole[0] if whole else None
        return tensor(np.concatenate([array(part) for part in whole]))

    def split(self, values: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Each projection's rows of ``values``, whose first dimension is ``n_out``; None stays None."""
        if values is None or not self.others:
            return [values] * len(self.projections)
        return list(torch.split(values, list(self.sizes)))


@dataclass(frozen=True)
class Folded:
    """A module's tensors in the one shape that the kernels know. ``gain`` and ``bias``: fp32 ``[n_out]``."""

    pair: LoraPair | None
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def split(self, place: Place) -> dict[Module, Folded]:
        """The same for each projection of ``place``: they share the input, so they share A, and have rows of B."""
        pair = self.pair
        result = {}
        factors = place.split(None if pair is None else pair.b)
        vectors = zip(place.split(self.gain), place.split(self.bias), strict=True)
        for module, b, (gain, bias) in zip(place.modules, factors, vectors, strict=True):
            part = None if pair is None or b is None else LoraPair(pair.a, b, pair.scale)
            result[module] = Folded(part, gain, bias)
        return result


class Kind(Protocol):
    """One kind, for one adapter's config. The methods raise PatternsTooSlow as ``AdapterConfig`` does."""

    @property
    def name(self) -> str:
        """What people call it: LoRA, DoRA, AdaLoRA, ..."""

    @property
    def not_composable(self) -> str | None:
        """Why it cannot be rescaled or combined with others; None if its deltas simply add up."""

    @property
    def needs_base(self) -> bool:
        """Whether ``fold`` needs the base's own weights."""

    def accepts(self, place: Place) -> str | None:
        """Why PEFT has no such adapter on the module; None if it has."""

    def rank(self, place: Place) -> int:
        """The rank of the folded delta, 0 if there is none."""

    def parts(self, place: Place) -> dict[str, Shape]:
        """The tensors that the module must have: the end of PEFT's name for each, and its shape."""

    def shared(self, places: Sequence[Place]) -> dict[str, Shape]:
        """The tensors that all adapted modules share, by their whole names, and their shapes."""

    def fold(
        self,
        place: Place,
        parts: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        base: BaseModel | None,
    ) -> Folded:
        """The module's delta from its tensors, whose shapes were checked. Without the ``base`` that a kind needs, what
        comes from it is missing, and the result is good for checks only."""
