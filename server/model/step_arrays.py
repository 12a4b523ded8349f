"""The numbers of one step on the host, before they are tensors: a step that is recorded only copies them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.ops import PagedSequences
from manylora.server.model.forward_batch import ForwardBatch

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepArrays:
    """As ``ForwardBatch`` and ``PagedSequences`` say: ``token_ids`` and ``sample_rows`` int64, the others int32.
    ``sample_rows`` None: all of the tokens. ``lora`` is on the device already."""

    token_ids: Longs
    starts: Ints
    contexts: Ints
    tables: Ints
    positions: Ints
    sample_rows: Longs | None
    lora: LoraSegments | None

    @classmethod
    def of(cls, batch: ForwardBatch) -> StepArrays:
        """Of tensors on the CPU; nothing is copied."""
        sequences, sampled = batch.sequences, batch.sample_rows
        return cls(
            batch.token_ids.numpy(),
            sequences.starts.numpy(),
            sequences.contexts.numpy(),
            sequences.tables.numpy(),
            sequences.positions.numpy(),
            None if sampled is None or sampled.numel() == batch.token_ids.numel() else sampled.numpy(),
            batch.lora,
        )

    def on(self, device: torch.device | str) -> ForwardBatch:
        """As tensors there; the rows that sample are told one by one."""

        def there(array: Ints | Longs) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        rows = np.arange(len(self.token_ids)) if self.sample_rows is None else self.sample_rows
        return ForwardBatch(
            token_ids=there(self.token_ids),
            sequences=PagedSequences(
                there(self.starts),
                there(self.contexts),
                there(self.tables),
                there(self.positions),
                tuple(self.starts.tolist()),
            ),
            sample_rows=there(rows),
            lora=self.lora,
        )
