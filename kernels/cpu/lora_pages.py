"""An adapter's ranks as whole numbers into a page, and what is lost by it, without Python's lock.

What ``lora_page.as_integers`` says, to the bit, in one pass. In torch that is a dozen small operations for each of some
hundred modules, and a step whose kernels have ended waits for the lock meanwhile.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload

import manylora.kernels.cpu.compiling  # noqa: F401 - says where compiled code is kept
from manylora.kernels.cpu.tiles import float32_from_bits
from manylora.kernels.lora_weights import LoraPair
from manylora.kernels.sites import RANK_PAGE

_SIGNATURES = [
    f"void({values}[:, ::1], {values}[:, ::1], int64, int64, int64, {held}[:, ::1], {held}[:, :, ::1], float32[::1])"
    for values in ("float32", "uint16")
    for held in ("int16", "int8")
]


def _wide(value):
    """An fp32 value as fp64; of a bf16 one its bits are given, the upper half of an fp32's."""


@overload(_wide)
def _wide_of_type(value):
    if isinstance(value, types.Float):
        return lambda value: np.float64(value)
    return lambda value: np.float64(float32_from_bits(np.int64(value) << 16))


@njit(nogil=True, fastmath={"nnan", "nsz"})  # all are finite; else the largest is not looked for in vectors
def _peak(values):
    peak = 0.0
    for i in range(values.size):
        peak = max(peak, abs(values[i]))
    return peak


@njit(nogil=True)
def _levels(values, largest, levels):
    """A rank's values as whole numbers; what one of them stands for."""
    step = _peak(values) / largest
    divisor = step if step > 0 else 1.0
    for i in range(values.size):
        levels[i] = np.int16(np.rint(values[i] / divisor))
    return step


@njit(_SIGNATURES, nogil=True, cache=True)
def _fill(a, b, first, width, largest, to_a, to_b, scales):
    depth, outputs = a.shape[1], b.shape[0]
    longest = max(depth, outputs)
    values, levels = np.empty((RANK_PAGE, longest)), np.empty((RANK_PAGE, longest), np.int16)
    steps = np.empty(RANK_PAGE)
    levels[width:] = 0
    for r in range(width):
        for k in range(depth):
            values[r, k] = _wide(a[first + r, k])
        steps[r] = _levels(values[r, :depth], largest, levels[r])
    for k in range(depth):
        for r in range(RANK_PAGE):
            to_a[k, r] = levels[r, k]
    for n in range(outputs):
        for r in range(width):
            values[r, n] = _wide(b[n, first + r])
    for r in range(width):
        scales[r] = np.float32(steps[r] * _levels(values[r, :outputs], largest, levels[r]))
    for tile in range(outputs // RANK_PAGE):
        for r in range(RANK_PAGE):
            for i in range(RANK_PAGE):
                to_b[tile, r, i] = levels[r, RANK_PAGE * tile + i]
    scales[width:] = 0


@njit(nogil=True)
def _magnitudes(values, largest, levels):
    """The sum of a rank's magnitudes, and of what its values are off by as whole numbers."""
    step = _levels(values, largest, levels)
    total = off = 0.0
    for i in range(values.size):
        total += abs(values[i])
        off += abs(values[i] - step * levels[i])
    return total, off


_TWO_HALVES = [f"float64({values}[:, ::1], {values}[:, ::1], int64)" for values in ("float32", "uint16")]


@njit(_TWO_HALVES, nogil=True, cache=True)
def _relative_error(a, b, largest):
    values = np.empty(max(a.shape[1], b.shape[0]))
    levels = np.empty(values.size, np.int16)
    total = off = 0.0
    for r in range(a.shape[0]):
        for k in range(a.shape[1]):
            values[k] = _wide(a[r, k])
        of_a, off_a = _magnitudes(values[: a.shape[1]], largest, levels)
        for n in range(b.shape[0]):
            values[n] = _wide(b[n, r])
        of_b, off_b = _magnitudes(values[: b.shape[0]], largest, levels)
        total += of_a * of_b
        off += off_a * of_b + of_a * off_b
    return off / total if total > 0.0 else 0.0


def relative_error(pair: LoraPair, largest: int) -> float:
    """``lora_page.relative_error``."""
    halves = [half if half.dtype == torch.bfloat16 else half.float() for half in (pair.a, pair.b)]
    if halves[0].dtype != halves[1].dtype:
        halves = [half.float() for half in halves]
    a, b = (
        half.contiguous().view(torch.int16).numpy().view(np.uint16) if half.dtype == torch.bfloat16
        else half.contiguous().numpy()
        for half in halves
    )  # fmt: skip
    return float(_relative_error(a, b, largest))


def fill_integer_page(
    pair: LoraPair, first: int, largest: int, to_a: torch.Tensor, to_b: torch.Tensor, scales: torch.Tensor
) -> bool:
    """Ranks ``first .. first + 15`` of a pair, as whole numbers of at most ``largest``, into int16 or int8 ``to_a``
    ``[K, 16]`` and ``to_b`` ``[N / 16, 16, 16]``, and fp32 ``scales`` ``[16]``; zeros beyond. False, and nothing done,
    if the pair or the page is held in a way that this does not read or write."""
    a, b = pair.a, pair.b
    if a.dtype != b.dtype or a.dtype not in (torch.float32, torch.bfloat16):
        return False
    if not (a.is_contiguous() and b.is_contiguous() and to_b.dim() == 3):
        return False
    if a.dtype == torch.bfloat16:
        a, b = a.view(torch.int16), b.view(torch.int16)
    arrays = [half.numpy().view(np.uint16) if half.dtype == torch.int16 else half.numpy() for half in (a, b)]
    width = max(0, min(RANK_PAGE, pair.rank - first))
    _fill(*arrays, first, width, largest, to_a.numpy(), to_b.numpy(), scales.numpy())
    return True
