"""The shapes of steps that are recorded (``kernels.cpu.replay``): few, so that a step's shape comes again.

What the CPU kernels are given beside addresses is the number of tokens, of sequences, of pairs of adapters and of
segments, and the width of the page tables; where a sequence begins, how long it is and whose adapter it has, they read
from tensors. Of these numbers all but the tokens' may be larger than they are: a sequence without tokens, a pair in no
segment and a page behind the context are not looked at. So they are rounded up, and rows that decode one token each,
rows with drafts and short prompts share the recordings of as many tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.ops import PagedSequences

MOST_TOKENS: Final = 64
"""A step of more takes so long that what Python adds is a few percent, and seldom has a shape that comes again."""
_TABLE_STEP: Final = 16
"""Page tables are made wider in such steps: a recording lasts for 256 tokens of the longest row."""


@dataclass(frozen=True)
class RecordedShape:
    """All that the kernels of a step depend on but the values of its inputs. ``pairs`` and ``segments`` are 0 without
    adapters; there may be as many sequences as tokens."""

    tokens: int
    table_width: int
    pairs: int
    segments: int

    @classmethod
    def of(cls, sequences: PagedSequences, lora: LoraSegments | None) -> RecordedShape:
        tokens = sequences.positions.numel()
        width = -(-sequences.tables.shape[1] // _TABLE_STEP) * _TABLE_STEP
        if lora is None:
            return cls(tokens, width, 0, 0)
        return cls(tokens, width, -(-lora.rows.numel() // tokens) * tokens, len(lora.slot_list))

    def inputs(self, sequences: PagedSequences, lora: LoraSegments | None) -> list[torch.Tensor]:
        """The tensors of a step of this shape, made as large as it says: sequences that are not there begin where the
        tokens end."""
        found = [
            _padded(sequences.starts, self.tokens, (self.tokens + 1,)),
            _padded(sequences.contexts, 0, (self.tokens,)),
            sequences.positions,
            _padded(sequences.tables, 0, (self.tokens, self.table_width)),
        ]
        if lora is not None and self.segments:
            found += [_padded(lora.rows, 0, (self.pairs,)), _padded(lora.scales, 0, (self.pairs,))]
            found += [lora.slots, lora.offsets]
        return found

    def rebuilt(
        self, inputs: Sequence[torch.Tensor], lora: LoraSegments | None
    ) -> tuple[PagedSequences, LoraSegments | None]:
        """The step over what ``inputs`` made, or tensors that are as large; ``lora``: its adapters."""
        starts, contexts, positions, tables, *adapters = inputs
        sequences = PagedSequences(starts, contexts, tables, positions)
        if lora is None or not adapters:
            return sequences, None
        rows, scales, slots, offsets = adapters
        return sequences, replace(lora, rows=rows, scales=scales, slots=slots, offsets=offsets)


def _padded(tensor: torch.Tensor, fill: int, shape: tuple[int, ...]) -> torch.Tensor:
    if tensor.shape == shape:
        return tensor
    padded = tensor.new_full(shape, fill)
    padded[tuple(map(slice, tensor.shape))] = tensor
    return padded
