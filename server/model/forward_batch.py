"""The tensors of one step, as the decoder takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.ops import PagedSequences


@dataclass(frozen=True)
class ForwardBatch:
    """``token_ids`` int64 ``[T]``, the new tokens of all sequences one behind the other; ``sample_rows`` int64, the
    tokens whose logits are asked for, None for all of them; ``lora`` None if every row is a base row.

    ``routed``: adapters as ``BatchedLora.route`` makes them, in memory of which each step finds its own (a captured
    graph); then ``lora`` is None, and no adapter may have a delta on the embedding.
    """

    token_ids: torch.Tensor
    sequences: PagedSequences
    sample_rows: torch.Tensor | None
    lora: LoraSegments | None
    routed: Any | None = None
