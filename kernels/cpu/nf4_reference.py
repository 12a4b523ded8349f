"""What W and x are rounded to as integers, in torch: the kernels' product is theirs, but for the fp32 rounding of few
additions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from manylora.kernels.cpu import nf4_bytes, nf4_inner
from manylora.kernels.cpu.nf4_inner import SPAN
from manylora.kernels.nf4_code import NF4_CODE
from manylora.kernels.nf4_tensor import Nf4Tensor


@dataclass(frozen=True)
class Integers:
    """Integers of one size: ``code_unit`` is what 1 is in codes, ``levels`` the largest magnitude of x."""

    code_unit: int
    levels: int

    @property
    def _codes(self) -> torch.Tensor:
        return torch.tensor([round(value * self.code_unit) for value in NF4_CODE]).double() / self.code_unit

    @property
    def code_error(self) -> float:
        """How far a code is off at most, relative to its block's absmax."""
        return float((self._codes - torch.tensor(NF4_CODE).double()).abs().max())

    @property
    def level_error(self) -> float:
        """How far a value of x is off at most, relative to the largest of its span."""
        return 0.5 / self.levels

    def rounded_x(self, x: torch.Tensor) -> torch.Tensor:
        """``level * scale`` of x ``[M, K]`` fp32, as fp64; K a multiple of ``SPAN``."""
        spans = x.float().reshape(-1, SPAN)
        largest = spans.abs().amax(1, keepdim=True)
        # torch.div, as a Python number over a tensor is rounded twice.
        factor = torch.where(largest < 2.0**-100, 0.0, torch.div(torch.full_like(largest, self.levels), largest))
        levels = torch.round(spans * factor)  # to even, as the processor does
        return (levels.double() * largest.double() / self.levels).reshape(x.shape)

    def rounded_weight(self, weight: Nf4Tensor) -> torch.Tensor:
        """The integer codes times absmax, ``[N, K]`` fp64."""
        packed = weight.packed.reshape(-1)
        codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1, weight.blocksize).long()
        return (self._codes[codes] * weight.absmax_fp32().double()[:, None]).reshape(weight.shape)

    def rounded_head(self, weight: torch.Tensor) -> torch.Tensor:
        """A bf16 weight ``[N, K]`` as ``head_words`` multiplies with it, fp64: whole numbers up to ``code_unit`` times
        what one stands for, by row."""
        largest = weight.abs().amax(1, keepdim=True).float()
        factor = torch.where(largest > 0, torch.div(torch.full_like(largest, self.code_unit), largest), 0.0)
        return torch.round(weight.double() * factor.double()) * largest.double() / self.code_unit

    def bound(self, x: torch.Tensor, weight: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        """How far the product of the rounded values is from that of x ``[M, K]`` and ``weight`` ``[N, K]`` at most,
        ``[M, N]`` fp64. ``absmax`` ``[N, K / blocksize]``: those of the weight's blocks."""
        x, weight = x.double().abs(), weight.double().abs()
        largest = x.reshape(len(x), -1, SPAN).amax(2, keepdim=True).expand(-1, -1, SPAN).reshape(x.shape)
        blocks = absmax.double().repeat_interleave(weight.shape[1] // absmax.shape[1], 1)
        of_codes, of_levels = self.code_error * blocks, self.level_error * largest
        return x @ of_codes.T + of_levels @ weight.T + of_levels @ of_codes.T


WORDS: Final = Integers(nf4_inner.CODE_UNIT, nf4_inner.LEVELS)
"""Of 16 bits: codes are off by 3.9e-5 at most, x by 6.0e-5."""
BYTES: Final = Integers(nf4_bytes.CODE_UNIT, nf4_bytes.LEVELS)
"""Of 8 bits: codes are off by 3.6e-3 at most, x by 3.9e-3."""
