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

import numpy as np
import torch

from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.ops import PagedSequences
from manylora.server.model.step_arrays import StepArrays

_FEW_TOKENS: Final = 64
_FULL_STEPS: Final = 256
_TABLE_STEP: Final = 16
"""Page tables are made wider in such steps: a recording lasts for 256 tokens of the longest row."""


def is_short_step(tokens: int) -> bool:
    """As of rows that decode: Python adds most to these, and their shapes come again."""
    return tokens <= _FEW_TOKENS


def is_full_step(tokens: int) -> bool:
    """Of as many tokens as a step has while prompts wait: ``--max-batch-tokens`` is some times 256. What lies between
    these and the short ones is the end of some prompt, and seldom has a shape that was there before."""
    return tokens % _FULL_STEPS == 0


@dataclass(frozen=True)
class RecordedShape:
    """All that the kernels of a step depend on but the values of its inputs. ``pairs`` and ``segments`` are 0 without
    adapters; there may be as many sequences as tokens."""

    tokens: int
    table_width: int
    pairs: int
    segments: int

    @classmethod
    def of(cls, step: StepArrays) -> RecordedShape:
        tokens = len(step.token_ids)
        width = -(-step.tables.shape[1] // _TABLE_STEP) * _TABLE_STEP
        if step.lora is None:
            return cls(tokens, width, 0, 0)
        return cls(tokens, width, -(-len(step.lora.host_rows) // tokens) * tokens, len(step.lora.slot_list))

    def inputs(self) -> list[torch.Tensor]:
        """Tensors for the numbers of a step of this shape."""
        sizes: list[tuple[int, ...]] = [(self.tokens + 1,), (self.tokens,), (self.tokens,)]
        found = [torch.zeros(size, dtype=torch.int32) for size in (*sizes, (self.tokens, self.table_width))]
        if self.segments:
            found += [torch.zeros(self.pairs, dtype=torch.int32), torch.zeros(self.pairs, dtype=torch.float32)]
            found += [torch.zeros(self.segments + n, dtype=torch.int32) for n in (0, 1)]
        return found

    def fill(self, inputs: Sequence[np.ndarray], step: StepArrays) -> None:
        """Put a step of this shape into what ``inputs`` made, seen as arrays. Sequences that are not there begin where
        the tokens end; what is not looked at keeps what it had."""
        starts, contexts, positions, tables, *adapters = inputs
        n, width = step.tables.shape
        starts[: n + 1] = step.starts
        starts[n + 1 :] = self.tokens
        contexts[:n] = step.contexts
        contexts[n:] = 0
        positions[:] = step.positions
        tables[:n, :width] = step.tables
        if adapters and step.lora is not None:
            rows, scales, slots, offsets = adapters
            n_pairs = len(step.lora.host_rows)
            rows[:n_pairs], scales[:n_pairs] = step.lora.host_rows, step.lora.host_scales
            slots[:], offsets[:] = step.lora.slot_list, step.lora.host_offsets

    def rebuilt(
        self, inputs: Sequence[torch.Tensor], lora: LoraSegments | None
    ) -> tuple[PagedSequences, LoraSegments | None]:
        """The step over what ``inputs`` made; ``lora``: its adapters."""
        starts, contexts, positions, tables, *adapters = inputs
        sequences = PagedSequences(starts, contexts, tables, positions)
        if lora is None or not adapters:
            return sequences, None
        rows, scales, slots, offsets = adapters
        return sequences, replace(lora, rows=rows, scales=scales, slots=slots, offsets=offsets)
