"""What one kind of adapter knows: the tensors that PEFT saves for a module, and what they amount to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from manylora.adapters.base import BaseModel
from manylora.kernels.lora_weights import LoraPair

Shape: TypeAlias = tuple[int, ...]
Values: TypeAlias = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Place:
    """A module of the base that may be adapted. ``n_in``, ``n_out``: K and N of its weight ``[N, K]``; the embedding's
    input is a one-hot token, so K is the vocabulary."""

    path: str
    """PEFT's path of it, e.g. ``model.layers.3.self_attn.q_proj``."""
    projection: str
    layer: int
    n_in: int
    n_out: int


@dataclass(frozen=True)
class Folded:
    """A module's tensors in the one shape that the kernels know. ``gain`` and ``bias``: fp32 ``[n_out]``."""

    pair: LoraPair | None
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None


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
