"""Tokens drawn where the logits are; of a step, only they and a status for each row come to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from manylora.kernels.cuda.sampling import BLOCK, NO_TOKEN, NOT_FINITE, launch
from manylora.kernels.cuda.sampling_buffers import Row, SamplingBuffers

__all__ = ["NOT_FINITE", "NO_TOKEN", "DeviceSampler"]


class DeviceSampler:
    """Owns the buffers of ``kernels.cuda.sampling`` and lets them grow with the batch. For one thread.

    ``max_edits``: how many edits all rows of a step may have together. ``block``: logits looked at at a time.
    """

    def __init__(
        self, vocab_size: int, device: torch.device | str, *, max_edits: int = 65_536, block: int = BLOCK
    ) -> None:
        self.max_edits = max_edits
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._block = block
        self._buffers = self._allocate(16)

    def start(self, logits: torch.Tensor, rows: Sequence[Row | None]) -> None:
        """Launches the draws; ``None`` is a row that is left out. ``logits``: fp32 ``[len(rows), vocab_size]``,
        unchanged for whatever is launched after this. ValueError for more edits than ``max_edits``."""
        if len(rows) > self._buffers.max_rows:
            self._buffers = self._allocate(1 << (len(rows) - 1).bit_length())
        self._buffers.fill(rows)
        launch(logits, self._buffers, len(rows), block=self._block)

    def finish(self, n: int) -> list[tuple[int, int, float]]:
        """Waits; token (-1: none), status (0, NOT_FINITE, NO_TOKEN) and largest raw logit of the n rows started."""
        return list(zip(*(array.tolist() for array in self._buffers.read(n)), strict=True))

    def _allocate(self, max_rows: int) -> SamplingBuffers:
        return SamplingBuffers(max_rows, self._vocab_size, self._device, self.max_edits)
