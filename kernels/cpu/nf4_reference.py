"""What W and x are rounded to as integers, in torch: the kernels' product is theirs, but for the fp32 rounding of few
additions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from manylora.kernels.cpu import bytes_inner, head_bytes, nf4_inner
from manylora.kernels.cpu.nf4_inner import SMALLEST, SPAN
from manylora.kernels.nf4_code import NF4_CODE
from manylora.kernels.nf4_tensor import Nf4Tensor


@dataclass(frozen=True)
class Integers:
    """Integers of one size: ``code_unit`` is what 1 is in codes and ``code_zero`` what 0 is, ``levels`` the largest
    magnitude of x."""

    code_unit: float
    code_zero: float
    levels: int
    head_block: Callable[[int], int]
    """Of a width: as many positions of logits' weights share what they are relative to."""
    rotates: bool
    """Whether both sides of logits are rotated first."""

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        """Values times ``code_unit``, fp64, as codes, and those as values again."""
        return (torch.round(values + self.code_zero) - self.code_zero) / self.code_unit

    @property
    def _codes(self) -> torch.Tensor:
        return self._rounded(torch.tensor(NF4_CODE, dtype=torch.float64) * self.code_unit)

    @property
    def code_error(self) -> float:
        """How far a code is off at most, relative to its block's absmax."""
        return float((self._codes - torch.tensor(NF4_CODE).double()).abs().max())

    @property
    def level_error(self) -> float:
        """How far a value of x is off at most, relative to the largest of its span."""
        return 0.5 / self.levels

    def _levels(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of x ``[M, K]`` fp32, K a multiple of ``SPAN``: the levels, fp64 ``[M, K / SPAN, SPAN]``, and what one is
        worth, ``[M, K / SPAN, 1]``."""
        spans = x.float().reshape(len(x), -1, SPAN)
        largest = spans.abs().amax(2, keepdim=True)
        # torch.div, as a Python number over a tensor is rounded twice.
        factor = torch.where(largest < SMALLEST, 0.0, torch.div(torch.full_like(largest, self.levels), largest))
        levels = torch.round(spans * factor)  # to even, as the processor does
        return levels.double(), largest.double() / self.levels

    def rounded_x(self, x: torch.Tensor) -> torch.Tensor:
        """``level * scale`` of x ``[M, K]`` fp32, as fp64; K a multiple of ``SPAN``."""
        levels, scale = self._levels(x)
        return (levels * scale).reshape(x.shape)

    def rounded_weight(self, weight: Nf4Tensor) -> torch.Tensor:
        """The integer codes times absmax, ``[N, K]`` fp64."""
        packed = weight.packed.reshape(-1)
        codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1, weight.blocksize).long()
        return (self._codes[codes] * weight.absmax_fp32().double()[:, None]).reshape(weight.shape)

    def rounded_head(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A bf16 weight ``[N, K]`` as ``head_words`` or ``head_bytes`` multiplies with it, fp64: codes of what it is
        relative to the largest of its block, times that. And those, ``[N, blocks]``."""
        values = rotated(weight.float()) / SPAN if self.rotates else weight.float()
        blocks = values.reshape(len(weight), -1, self.head_block(weight.shape[1]))
        largest = blocks.abs().amax(2, keepdim=True)
        largest = torch.where(largest < SMALLEST, 0.0, largest)
        factor = torch.where(largest > 0, torch.div(torch.full_like(largest, self.code_unit), largest), 0.0)
        codes = self._rounded(blocks.double() * factor.double())
        return (codes * largest.double()).reshape(weight.shape), largest.squeeze(2)

    def logits(self, x: torch.Tensor, weight: torch.Tensor, positions: Sequence[int] = ()) -> torch.Tensor:
        """What a kernel makes of x ``[M, K]`` fp32 and a bf16 weight ``[N, K]``, fp64 ``[M, N]``; ``positions``: of x,
        that are exact."""
        kept = x[:, positions].double() @ weight[:, positions].double().T
        x = x.index_fill(1, torch.tensor(positions, dtype=torch.int64), 0)
        return self.product(rotated(x) if self.rotates else x, *self.rounded_head(weight)) + kept

    def product(self, x: torch.Tensor, rounded: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        """What a kernel makes of x ``[M, K]`` and a rounded weight ``[N, K]``, fp64 ``[M, N]``. ``largest``: those of
        the weight's blocks, ``[N, K / blocksize]``."""
        levels, scale = self._levels(x)
        bias = levels.sum(2, keepdim=True) * self.code_zero
        missed = (bias - torch.ceil(bias - 0.5)) * scale / self.code_unit  # as codes' zeros are taken away rounded
        missed = missed.reshape(len(x), largest.shape[1], -1).sum(2)
        return self.rounded_x(x) @ rounded.T + missed @ largest.double().T

    def product_but(
        self,
        x: torch.Tensor,
        rounded: torch.Tensor,
        largest: torch.Tensor,
        positions: torch.Tensor,
        exact: torch.Tensor,
    ) -> torch.Tensor:
        """``product``, but for ``positions``, int64, of x, which are multiplied with ``exact`` ``[N, K]`` as they
        are."""
        kept = x[:, positions].double() @ exact[:, positions].double().T
        return self.product(x.index_fill(1, positions, 0), rounded, largest) + kept

    def bound(self, x: torch.Tensor, weight: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        """How far the product of the rounded values is from that of x ``[M, K]`` and ``weight`` ``[N, K]`` at most,
        ``[M, N]`` fp64. ``absmax`` ``[N, K / blocksize]``: those of the weight's blocks."""
        scales = self._levels(x)[1].squeeze(2)
        x, weight = x.double().abs(), weight.double().abs()
        largest = x.reshape(len(x), -1, SPAN).amax(2, keepdim=True).expand(-1, -1, SPAN).reshape(x.shape)
        blocks = absmax.double().repeat_interleave(weight.shape[1] // absmax.shape[1], 1)
        of_codes, of_levels = self.code_error * blocks, self.level_error * largest
        of_bias = 0.0 if self.code_zero == 0 else 0.5 / self.code_unit * scales @ blocks[:, ::SPAN].T
        return x @ of_codes.T + of_levels @ weight.T + of_levels @ of_codes.T + of_bias


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Each span of x ``[M, K]`` times the Hadamard matrix of its length, by sums and differences in x's type (Fino and
    Algazi 1976)."""
    for far in (1, 2, 4, 8, 16):
        pairs = x.reshape(len(x), -1, 2, far)
        x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2).reshape(x.shape)
    return x


WORDS: Final = Integers(nf4_inner.CODE_UNIT, 0.0, nf4_inner.LEVELS, head_block=lambda width: width, rotates=False)
"""Of 16 bits: codes are off by 3.9e-5 at most, x by 6.0e-5."""
BYTES: Final = Integers(
    bytes_inner.CODE_UNIT, bytes_inner.CODE_ZERO, bytes_inner.LEVELS, head_block=head_bytes.block_of, rotates=True
)
"""Of 8 bits: codes are off by 2.5e-3 at most, x by 3.9e-3."""
