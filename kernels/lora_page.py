"""What a page of an adapter holds: 16 ranks of A and B as they are, or as whole numbers, and what is lost by that."""

from __future__ import annotations

from typing import Final

import torch

from manylora.kernels.cpu import available as cpu_kernels_available
from manylora.kernels.lora_weights import LoraPair, LoraWeights
from manylora.kernels.sites import RANK_PAGE

INTEGERS: Final = {torch.int16: 32767, torch.int8: 127}
"""Whole numbers that pages can hold, and the largest of each type that is used."""
MOST_LOST: Final = 0.08
"""``relative_error`` of a delta at most in 8-bit integers: five times that of trained adapters."""


def as_integers(ranks: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values ``[R, n]`` as whole numbers of at most ``largest``, and what one of them stands for in each row, fp64
    ``[R]``: the row's largest over that. So a value is off by 1.5e-5 of the largest of its rank with 32767, by 3.9e-3
    with 127."""
    values = ranks.double()
    scale = values.abs().amax(1) / largest
    return torch.round(values / torch.where(scale > 0, scale, 1.0)[:, None]), scale


def relative_error(pair: LoraPair, largest: int) -> float:
    """What a pair's delta is off by, of itself, if its values are whole numbers of at most ``largest``: sums of
    magnitudes, rank by rank, as a value far above the others would count for all in a sum of squares. Trained adapters
    are off by 0.010 to 0.016 with 127."""
    if cpu_kernels_available():
        from manylora.kernels.cpu import lora_pages  # numba, which need not be there

        return lora_pages.relative_error(pair, largest)
    (total_a, off_a), (total_b, off_b) = (_magnitudes(half, largest) for half in (pair.a, pair.b.T))
    total = float(total_a @ total_b)
    return float(off_a @ total_b + total_a @ off_b) / total if total > 0 else 0.0


def _magnitudes(ranks: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each rank the sum of magnitudes, and of what values are off by, fp64 ``[R]``."""
    levels, scale = as_integers(ranks, largest)
    return ranks.double().abs().sum(1), (ranks.double() - levels * scale[:, None]).abs().sum(1)


def too_coarse(weights: LoraWeights, held: torch.dtype) -> str | None:
    """Why pages of a type would change an adapter's answers, or None. Only those of 8 bits can: as int16 a value is off
    by 1.5e-5 of the largest of its rank."""
    if held != torch.int8:
        return None
    for (projection, layer), pair in weights.pairs.items():
        lost = relative_error(pair, INTEGERS[held])
        if lost > MOST_LOST:
            return (
                f"`{projection}` of layer {layer}: its delta would be off by {lost:.0%} in 8-bit integers, as a "
                "few values are far larger than the others of their rank (start the server with --lora-dtype int16)"
            )
    return None


def fill_page(a: torch.Tensor, b: torch.Tensor, scales: torch.Tensor | None, pair: LoraPair | None, first: int) -> None:
    """Ranks ``first .. first + 15`` of a pair into a layer's page ``a`` ``[K, 16]``, ``b`` (as in `LoraPool`), and, of
    integers, ``scales`` ``[16]``; zeros beyond."""
    width = 0 if pair is None else max(0, min(RANK_PAGE, pair.rank - first))
    if pair is not None and width:
        if scales is not None and a.device.type == "cpu" and cpu_kernels_available():
            from manylora.kernels.cpu.lora_pages import fill_integer_page  # numba, which need not be there

            if fill_integer_page(pair, first, INTEGERS[a.dtype], a, b, scales):
                return
        of_a, of_b = pair.a[first : first + width], pair.b[:, first : first + width].T
        if scales is not None:
            scales.zero_()
            (of_a, scale_a), (of_b, scale_b) = (as_integers(of, INTEGERS[a.dtype]) for of in (of_a, of_b))
            scales[:width] = scale_a * scale_b
        a[:, :width] = of_a.to(a.dtype).T
        if b.dim() == 2:
            b[:width] = of_b.to(b.dtype)
        else:
            b[:, :width] = of_b.to(b.dtype).reshape(width, -1, RANK_PAGE).transpose(0, 1)
    if width < RANK_PAGE:
        a[:, width:] = 0
        b[..., width:, :] = 0


def rows_of_b(pages: torch.Tensor, n: int) -> torch.Tensor:
    """Pages of a layer's B, ``[pages, 16, N]`` or ``[pages, N / 16, 16, 16]``, as ``[16 * pages, N]``."""
    return (pages if pages.dim() == 3 else pages.transpose(1, 2)).reshape(-1, n)
