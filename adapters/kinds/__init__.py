"""How each kind of adapter is folded into pairs, gains and biases; ``kind_of`` chooses."""

from __future__ import annotations

from manylora.adapters.adapter_config import AdapterConfig
from manylora.adapters.kinds.adalora import AdaLora
from manylora.adapters.kinds.kind import Kind
from manylora.adapters.kinds.loha import LoHa
from manylora.adapters.kinds.lokr import LoKr
from manylora.adapters.kinds.lora import Lora
from manylora.adapters.kinds.vera import Vera

__all__ = ["Kind", "kind_of"]


def kind_of(config: AdapterConfig) -> Kind | None:
    """The kind that folds the deltas of such an adapter; None for one that has none (TRAINABLE_TOKENS)."""
    match config.peft_type:
        case "LORA":
            return Lora(config)
        case "ADALORA":
            return AdaLora(config)
        case "VERA":
            return Vera(config)
        case "LOHA":
            return LoHa(config)
        case "LOKR":
            return LoKr(config)
        case _:
            return None
