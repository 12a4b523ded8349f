"""Which tokens the constrained rows of a step may draw: computed on the host, applied wherever the logits are."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from manylora.server.engine.constraint import Constraint, ConstraintFailed
from manylora.server.engine.request import STEP_FAILED, SampleFailed

_log = logging.getLogger(__name__)

_Ints = npt.NDArray[np.int64]


class TokenMasks:
    """The masks of one step, in memory that is kept for the next. For one thread."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._shifts = torch.arange(32, dtype=torch.int32, device=device)
        self._rows = self._allocate(16)

    def fill(self, constraints: Sequence[Constraint]) -> list[SampleFailed | None]:
        """Compute the masks of the next tokens; by row, why there is none."""
        if len(constraints) > len(self._rows):
            self._rows = self._allocate(1 << (len(constraints) - 1).bit_length())
        problems: list[SampleFailed | None] = []
        for constraint, mask in zip(constraints, self._rows.numpy(), strict=False):
            try:
                constraint.allow(mask)
            except ConstraintFailed as error:
                problems.append(SampleFailed(str(error), is_refusal=True))
            except BaseException:  # noqa: BLE001 - one row's fault must not end the others; a Rust panic is no Exception
                _log.exception("the mask of a row could not be computed")
                problems.append(SampleFailed(STEP_FAILED))
            else:
                problems.append(None)
        return problems

    def allowed(self, row: int) -> _Ints:
        """The tokens, ascending."""
        bits = np.unpackbits(self._rows[row].numpy().view(np.uint8), bitorder="little", count=self._vocab_size)
        return np.flatnonzero(bits)

    def apply(self, logits: torch.Tensor, rows: Sequence[int]) -> None:
        """Set what is not allowed to -inf in ``logits`` (fp32 ``[len(rows), vocab]``, on the device). ``fill`` must not
        be called again before that has been waited for."""
        masks = self._rows[: max(rows) + 1].to(self._device, non_blocking=True)[list(rows)]
        bits = (masks.unsqueeze(2) >> self._shifts) & 1
        logits.masked_fill_(bits.view(len(rows), -1)[:, : self._vocab_size] == 0, -torch.inf)

    def _allocate(self, rows: int) -> torch.Tensor:
        words = (self._vocab_size + 31) // 32
        return torch.zeros(rows, words, dtype=torch.int32, pin_memory=self._device.type == "cuda")
