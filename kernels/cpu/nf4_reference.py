"""What ``nf4_inner`` rounds x and W to, in torch: its product is theirs, but for the fp32 rounding of few additions."""

from __future__ import annotations

import torch

from manylora.kernels.cpu.nf4_inner import CODE_UNIT, LEVELS, SPAN
from manylora.kernels.nf4_code import NF4_CODE
from manylora.kernels.nf4_tensor import Nf4Tensor

_CODES = torch.tensor([round(value * CODE_UNIT) for value in NF4_CODE], dtype=torch.float64) / CODE_UNIT

CODE_ERROR = float((_CODES - torch.tensor(NF4_CODE).double()).abs().max())
"""How far a code is off at most, relative to its block's absmax: 3.9e-5."""
LEVEL_ERROR = 0.5 / LEVELS
"""How far a value of x is off at most, relative to the largest of its span: 6.0e-5."""


def rounded_x(x: torch.Tensor) -> torch.Tensor:
    """``level * scale`` of x ``[M, K]`` fp32, as fp64; K a multiple of ``SPAN``."""
    spans = x.float().reshape(-1, SPAN)
    largest = spans.abs().amax(1, keepdim=True)
    # torch.div, as a Python number over a tensor is rounded twice.
    factor = torch.where(largest < 2.0**-100, 0.0, torch.div(torch.full_like(largest, LEVELS), largest))
    levels = torch.round(spans * factor)  # to even, as the processor does
    return (levels.double() * largest.double() / LEVELS).reshape(x.shape)


def rounded_weight(weight: Nf4Tensor) -> torch.Tensor:
    """The integer codes times absmax, ``[N, K]`` fp64."""
    packed = weight.packed.reshape(-1)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1, weight.blocksize).long()
    return (_CODES[codes] * weight.absmax_fp32().double()[:, None]).reshape(weight.shape)


def rounding_bound(x: torch.Tensor, weight: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """How far the product of the rounded values is from that of x ``[M, K]`` and ``weight`` ``[N, K]`` at most,
    ``[M, N]`` fp64. ``absmax`` ``[N, K / blocksize]``: those of the weight's blocks."""
    x, weight = x.double().abs(), weight.double().abs()
    largest = x.reshape(len(x), -1, SPAN).amax(2, keepdim=True).expand(-1, -1, SPAN).reshape(x.shape)
    blocks = absmax.double().repeat_interleave(weight.shape[1] // absmax.shape[1], 1)
    of_codes, of_levels = CODE_ERROR * blocks, LEVEL_ERROR * largest
    return x @ of_codes.T + of_levels @ weight.T + of_levels @ of_codes.T
