"""What a served ``adapter_config.json`` says, once it was read and checked. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from manylora.adapters.peft_targets import Targets, all_matches

MAX_RANK: Final = 256


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of a served ``adapter_config.json`` that matter at inference; a type without a field has the default.

    ``module`` in the methods below is a module's path in the base model as PEFT sees it, for example
    ``model.layers.3.self_attn.q_proj`` or ``lm_head``.
    """

    peft_type: str
    targets: Targets
    r: int
    """Of AdaLoRA, ``init_r``."""
    alpha: float
    base_model: str | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "targets"] = "none"
    """Which of the base's biases were trained."""
    kept: Mapping[str, tuple[bool, ...]] | None = None
    """AdaLoRA's ``rank_pattern``: of each module's ``r`` ranks, those that were kept."""
    decompose_both: bool = False
    decompose_factor: int = -1
    saved: frozenset[str] = frozenset()
    """``modules_to_save``, as projections: ``embed``, ``lm_head``."""
    token_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """``trainable_token_indices`` by projection; for the type TRAINABLE_TOKENS, those of every target."""
    ensure_weight_tying: bool = False
    fan_in_fan_out: bool | None = False
    """None for types that have no such field, and that PEFT does not put on weights stored as ``[in, out]``."""

    def rank(self, module: str) -> int:
        if self.kept is not None and (kept := self.kept.get(module)) is not None:
            return sum(kept)
        matching = all_matches(self.targets.patterns, self.rank_pattern, module)
        return self.rank_pattern[matching[0]] if matching else self.r

    def alpha_of(self, module: str) -> float:
        matching = all_matches(self.targets.patterns, self.alpha_pattern, module)
        return self.alpha_pattern[matching[0]] if matching else self.alpha

    def scale(self, module: str) -> float:
        """alpha / r (LoRA, Hu et al. 2021, section 4.1) or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023, eq. 8)."""
        rank = self.rank(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def ambiguous_alphas(self, module: str) -> list[str]:
        """The alpha patterns that match ``module`` if they disagree, the one that counts first; else none.

        PEFT sorts the patterns when it saves them and takes the first match when it loads them, so that training may
        have used another one than everybody who loads the file.
        """
        matching = all_matches(self.targets.patterns, self.alpha_pattern, module)
        return matching if len({self.alpha_pattern[pattern] for pattern in matching}) > 1 else []
