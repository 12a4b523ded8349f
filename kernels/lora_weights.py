"""What an adapter is to the kernels, whatever PEFT method trained it: every kind is folded into this at load.

At a module with the frozen weight W, an adapter computes, with the request's scale c (1 unless it says otherwise)::

    y = W x + b  +  c * (pair.scale * pair.b @ (pair.a @ x)  +  (gain - 1) * (W x)  +  bias)

so that each term is linear in c and adapters of one row add up. ``gain`` and ``bias`` are there for few kinds only
(DoRA; trained biases). A kind that rescales the whole output (DoRA, Liu et al. 2024, eq. 5) has its gain in ``pair.b``
already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class LoraPair:
    """One module's low-rank delta: ``delta_W = scale * b @ a`` (LoRA, Hu et al. 2021, eq. 3).

    ``a``: ``[rank, in_features]``; ``b``: ``[out_features, rank]``; both contiguous, on the CPU, in the dtype of the
    file, or fp32 where folding made them. ``scale`` is the module's own alpha/r (or alpha/sqrt(r) with rsLoRA), kept
    apart so that it is never rounded into 16-bit weights.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


@dataclass(frozen=True)
class LoraVectors:
    """What a module's output gets besides the low-rank delta; fp32 ``[out_features]`` on the CPU, or None."""

    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.gain, self.bias) if t is not None)


@dataclass(frozen=True)
class TableRows:
    """Rows of the embedding (or of the output layer, one row a token) that an adapter replaces.

    ``ids`` int64 ``[count]``, ascending and distinct; ``rows`` ``[count, hidden]`` in the file's dtype, on the CPU. A
    module that was saved as a whole has all the vocabulary's ids. For ``lm_head`` the logit of ``ids[i]`` is
    ``rows[i] @ h``.
    """

    ids: torch.Tensor
    rows: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.rows.nbytes


Module = tuple[str, int]
"""``(projection, layer)``, see kernels.sites; layer 0 for the global projections."""


@dataclass(frozen=True)
class LoraWeights:
    """An adapter's tensors in host memory. ``tables`` is keyed by ``"embed"`` and ``"lm_head"``; a table that has rows
    replaced has no pair and no vectors. An adapter with tables is computed at scale 1 only."""

    pairs: Mapping[Module, LoraPair]
    vectors: Mapping[Module, LoraVectors] = field(default_factory=dict)
    tables: Mapping[str, TableRows] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        groups = (self.pairs.values(), self.vectors.values(), self.tables.values())
        return sum(part.nbytes for group in groups for part in group)

    @property
    def max_rank(self) -> int:
        return max((pair.rank for pair in self.pairs.values()), default=0)
