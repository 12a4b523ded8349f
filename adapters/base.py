"""What loading an adapter needs to know of the base's own weights."""

from __future__ import annotations

from typing import Protocol

import torch


class BaseModel(Protocol):
    """The served base, dequantised module by module on demand: copies on the CPU, made on the caller's thread.

    DoRA's norms and the copies that PEFT saves beside adapted embeddings are checked against these very weights, the
    ones that are computed with.
    """

    def weight(self, projection: str, layer: int) -> torch.Tensor:
        """fp32 ``[out_features, in_features]`` of one of the layers' projections."""

    def bias(self, projection: str, layer: int) -> torch.Tensor | None:
        """fp32 ``[out_features]``; None if the module has none."""

    def table(self, projection: str) -> torch.Tensor:
        """fp32 ``[vocab, hidden]`` of ``"embed"`` or ``"lm_head"``."""

    @property
    def tied(self) -> bool:
        """Whether ``lm_head`` is the embedding's own weight."""
