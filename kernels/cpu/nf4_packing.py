"""How NF4 weights lie in memory for the CPU kernels: in tiles of 16 outputs, in the order that they are looked up in.

They are re-laid once, at load (the new bytes replace the old: the base is in memory once), so that one load gives the
codes of whole vectors and no sum crosses lanes. A tile is made of groups of ``GROUP`` positions, ``8 * GROUP`` bytes
that one load brings; an `Order` says whose codes each of these bytes holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numba import njit

from manylora.kernels.cpu.emit import TILE, VECTORS
from manylora.kernels.cpu.target import TARGET
from manylora.kernels.nf4_code import NF4_CODE

GROUP: Final = TARGET.nf4_group
"""Positions whose codes come from one load."""


@dataclass(frozen=True)
class Order:
    """``places`` int64 ``[8 * GROUP, 4]``: for each byte of a group the output and the position of the code in its low
    nibble, then those of its high one."""

    name: str
    places: np.ndarray[tuple[int, int], np.dtype[np.int64]]


def _for_words() -> list[tuple[int, int, int, int]]:
    """Byte ``16 l + 8 h + 2 e + j`` holds two codes of one output. With two vectors a tile: of output ``n = 8 h + 4 l +
    e``, position ``j`` in its low nibble and ``2 + j`` in its high one. With one: of output ``n = 4 l + e``, positions
    ``2 h + j`` and ``4 + 2 h + j``. Once ``vpunpck`` has made int16 of the bytes, two positions of an output lie side
    by side."""
    places = []
    for byte in range(8 * GROUP):
        lane, half, e, j = byte // 16, byte // 8 % 2, byte // 2 % 4, byte % 2
        if VECTORS == 2:
            places.append((8 * half + 4 * lane + e, j, 8 * half + 4 * lane + e, 2 + j))
        else:
            places.append((4 * lane + e, 2 * half + j, 4 * lane + e, 4 + 2 * half + j))
    return places


def _for_bytes() -> list[tuple[int, int, int, int]]:
    """Four positions of an output lie side by side. With two vectors a tile, byte ``4 e + j`` holds position ``j`` of
    output ``e`` in its low nibble and of output ``8 + e`` in its high one; with one, positions ``j`` and ``4 + j`` of
    output ``e``."""
    places = []
    for byte in range(8 * GROUP):
        e, j = byte // 4, byte % 4
        places.append((e, j, 8 + e, j) if VECTORS == 2 else (e, j, e, 4 + j))
    return places


FOR_WORDS: Final = Order("words", np.array(_for_words(), np.int64))
"""For codes as integers of 16 bits (``nf4_inner``), and as fp32 (``nf4_exact``)."""
FOR_BYTES: Final = Order("bytes", np.array(_for_bytes(), np.int64))
"""For codes as integers of 8 bits (``nf4_bytes``)."""


@njit("void(uint8[::1], int64, int64, int64[:, ::1], uint8[:, :, ::1])", nogil=True, cache=True)
def _pack_nf4(source, n, k, places, out):
    for tile in range(n // 16):
        for group in range(k // GROUP):
            for byte in range(8 * GROUP):
                code = 0
                for nibble in range(2):
                    output, position = places[byte, 2 * nibble], GROUP * group + places[byte, 2 * nibble + 1]
                    # bitsandbytes keeps the even position in the high nibble.
                    both = source[((16 * tile + output) * k + position) // 2]
                    code |= (both >> (4 - 4 * (position % 2)) & 15) << (4 * nibble)
                out[tile, group, byte] = code


def pack_nf4(packed: torch.Tensor, n: int, k: int, order: Order) -> torch.Tensor:
    """Re-lay bitsandbytes' NF4 bytes ``[N * K / 2]`` (N % 16 == 0, K % GROUP == 0) as ``[N / 16, K / GROUP, 8 GROUP]``
    uint8."""
    out = torch.empty(n // TILE, k // GROUP, 8 * GROUP, dtype=torch.uint8)
    _pack_nf4(packed.contiguous().numpy(), n, k, order.places, out.numpy())
    return out


def pack_absmax(absmax: torch.Tensor, n: int) -> torch.Tensor:
    """Re-lay absmax (fp32, one a block of the flattened ``[N, K]``, K % blocksize == 0) as ``[N / 16, blocks, 16]``."""
    return absmax.float().reshape(n // TILE, TILE, -1).permute(0, 2, 1).contiguous()


@njit(
    "void(uint8[:, :, ::1], float32[:, :, ::1], float32[::1], int64, int64[:, ::1], float32[:, ::1])",
    nogil=True,
    cache=True,
)
def _unpack_nf4(packed, absmax, code, block, places, out):
    for tile in range(packed.shape[0]):
        for group in range(packed.shape[1]):
            for byte in range(8 * GROUP):
                codes = packed[tile, group, byte]
                for nibble in range(2):
                    n, position = places[byte, 2 * nibble], GROUP * group + places[byte, 2 * nibble + 1]
                    scale = absmax[tile, GROUP * group // block, n]
                    out[16 * tile + n, position] = code[codes >> (4 * nibble) & 15] * scale


def unpack_nf4(packed: torch.Tensor, absmax: torch.Tensor, blocksize: int, order: Order) -> torch.Tensor:
    """The weight that `pack_nf4` and `pack_absmax` packed, fp32 ``[N, K]``: exactly what the NF4 codes stand for.

    On the caller's thread alone, without Python's lock: adapters are loaded while the step loop computes.
    """
    out = torch.empty(packed.shape[0] * TILE, packed.shape[1] * GROUP)
    code = np.array(NF4_CODE, np.float32)
    _unpack_nf4(packed.numpy(), absmax.numpy(), code, blocksize, order.places, out.numpy())
    return out
