"""The tensors of one step, as the decoder takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.ops import PagedSequences


@dataclass(frozen=True)
class ForwardBatch:
    """``token_ids`` int64 ``[T]``, the new tokens of all sequences one behind the other; ``sample_rows`` int64, the
    tokens whose logits are asked for; ``lora`` None if every row is a base row."""

    token_ids: torch.Tensor
    sequences: PagedSequences
    sample_rows: torch.Tensor
    lora: LoraSegments | None
