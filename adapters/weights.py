"""An adapter's tensors as the server keeps them in host memory, and the report made when they were loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from manylora.kernels.lora_weights import LoraWeights


@dataclass(frozen=True)
class LoadReport:
    """What loading an adapter found; the fields of ``GET /v1/adapters/{name}``."""

    ranks: tuple[int, ...]
    """Distinct ranks, ascending."""
    scales: tuple[float, ...]
    """Distinct alpha/r (or alpha/sqrt(r)), ascending."""
    modules: tuple[str, ...]
    """Projections that carry a delta, e.g. ``("q", "v")``, in the order of kernels.sites.PROJECTIONS."""
    n_modules: int
    """Matched modules, counting each layer's."""
    nbytes: int
    """Bytes of the tensors in host memory."""
    dtype: str
    base_model: str | None
    """``base_model_name_or_path`` of the adapter's config."""
    warnings: tuple[str, ...] = ()
    kind: str = "LoRA"
    """What people call it: LoRA, DoRA, AdaLoRA, VeRA, LoHa, LoKr, trainable tokens."""
    unmatched: tuple[str, ...] = ()
    """Entries of target_modules that match no module of the base."""
    replaced_rows: Mapping[str, int] = field(default_factory=dict)
    """Rows that are replaced of ``"embed"`` and ``"lm_head"``."""


@dataclass(frozen=True)
class AdapterWeights:
    """One immutable adapter version.

    ``version`` is the sha256 (hex) over the weights file, the config file and the chat template if there is one, so
    equal content has equal identity.
    """

    version: str
    lora: LoraWeights
    report: LoadReport
    chat_template: str | None = field(default=None)
    """The adapter directory's own chat template, used for its requests if present."""

    not_composable: str | None = None
    """Why it can only be asked for alone and at scale 1, e.g. "it is a DoRA, whose outputs are not linear in its
    scale"; None if it may be rescaled and combined with others."""

    @property
    def nbytes(self) -> int:
        return self.lora.nbytes

    @property
    def max_rank(self) -> int:
        return self.lora.max_rank
