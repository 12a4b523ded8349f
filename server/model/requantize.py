"""NF4 for weights that are near NF4 values already: a quantised base with an adapter merged into it.

Rounding each weight to the nearest code would undo the merge. The base's weights lie on codes of their blocks, the
delta of a trained adapter is a few hundredths of them, and the codes are a tenth to a third of a block's largest value
apart: nearly every weight would go back to where it was. So a weight goes to either of the two codes about it, with the
probabilities that make its expected value the weight itself (stochastic rounding, Gupta et al. 2015, section 3.1). Each
weight is then off by more, but the errors are independent, and sums of hundreds of them keep the delta.
"""

from __future__ import annotations

from typing import Final

import torch

from manylora.kernels.nf4_code import NF4_CODE
from manylora.kernels.nf4_tensor import Nf4Tensor
from manylora.server.model.bnb_format import BLOCKSIZE, nest

_CHUNK: Final = 1 << 22
"""Weights rounded at a time: some six temporaries of 4 bytes each."""


def requantize(weight: torch.Tensor, seed: int) -> Nf4Tensor:
    """``weight`` fp32 ``[N, K]``, K a multiple of 64, in blocks of 64 with nested scales; on its device.

    A block's scale is its largest absolute value, as everywhere. Equal seeds give equal codes on one kind of device.
    Raises ValueError when the weight holds a NaN or an infinity.
    """
    n, k = weight.shape
    blocks = weight.contiguous().view(-1, BLOCKSIZE)
    largest = blocks.abs().amax(1)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("it holds values that are not finite")
    nested = nest(largest)
    scales = nested.expand()  # what it will be multiplied with: the codes are chosen for that
    codes = torch.tensor(NF4_CODE, device=weight.device)
    random = torch.Generator(weight.device).manual_seed(seed)
    packed = torch.empty(n * k // 2, dtype=torch.uint8, device=weight.device)
    step = _CHUNK // BLOCKSIZE
    for first in range(0, blocks.shape[0], step):
        part = slice(first, first + step)
        indices = _round(blocks[part], scales[part, None], codes, random).view(-1, 2)
        # Element 2j is the high nibble of byte j.
        packed[first * BLOCKSIZE // 2 : first * BLOCKSIZE // 2 + indices.shape[0]] = indices[:, 0] << 4 | indices[:, 1]
    return Nf4Tensor(packed, nested, codes, (n, k), BLOCKSIZE, weight.dtype)


def _round(weight: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Codes uint8 of ``weight / scale``. A block of zeros, and what the 8-bit scale cut off, goes to the nearest."""
    values = (weight / torch.where(scale > 0, scale, 1.0)).clamp_(codes[0], codes[-1])
    below = (torch.bucketize(values, codes, right=True, out_int32=True) - 1).clamp_(0, 14)
    low = codes[below]
    share = (values - low) / (codes[below + 1] - low)
    above = torch.rand(share.shape, generator=random, device=share.device) < share
    return (below + above).to(torch.uint8)
