"""What the host knows of the slots' contents without asking the device: work lists are made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from manylora.kernels.sites import SITES

POOL_SITES: Final[Mapping[str, tuple[str, ...]]] = {**SITES, "embed": ("embed",)}
"""The fused sites, and the embedding as a site of its own."""


@dataclass(frozen=True)
class SlotContents:
    """``pages`` of each projection; ``vectors``: the layers in which a projection has a gain or a bias; ``tables``:
    whose rows it replaces, and ``table_bytes``, what that takes."""

    pages: Mapping[str, list[int]] = field(default_factory=dict)
    vectors: Mapping[str, frozenset[int]] = field(default_factory=dict)
    tables: frozenset[str] = frozenset()
    table_bytes: int = 0

    def touches(self, projection: str) -> bool:
        """Whether there is anything for ``projection``, in any layer."""
        return bool(self.pages.get(projection)) or projection in self.vectors or projection in self.tables

    def has_vectors(self, site: str, layer: int | None = None) -> bool:
        """Whether a projection of the site has a gain or a bias in ``layer``; None: in any."""
        found = [self.vectors[p] for p in POOL_SITES[site] if p in self.vectors]
        return bool(found) if layer is None else any(layer in layers for layers in found)
