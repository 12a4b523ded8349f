"""Logits on the CPU, ``y = x @ W.T`` with both sides rounded to integers of 8 bits, see ``bytes_inner``.

A code is a weight relative to the largest of its output's block of positions (``block_of``), by which that block's
share of the sum is scaled: as a weight in NF4, with 248 values instead of 16. Codes are made once, at load: half of the
bytes of bf16, which is what few rows wait for. To make them in each step from the table that is kept for embeddings
took 1.1 of 2.9 ms (32 rows, a vocabulary of 49152, a width of 576).

**Both sides are rotated** first, each span by the Hadamard matrix H of its length, which changes no product: ``(H x) .
(H w) / 32 = x . w`` (as QuaRot does, Ashkboos et al. 2024). Hidden states have a few positions ten times as large as
the rest, which a span's levels would be spent on; rotated, they are shared by all 32. What 8 bits do to the next token
is a third of what it was without, 6.7e-4 instead of 2.1e-3 nats a token (demo base, 1024 tokens, W and x rounded, all
else exact). Weights in NF4 cannot be rotated: their codes are what was trained with.

**The largest positions are exact** as they are there, if they have been found: 2.7e-4. Their weights lie behind the
largest values of each tile, in bf16 as in the table.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit

from manylora.kernels.cpu import bf16_linear
from manylora.kernels.cpu.bytes_inner import (
    CODE_UNIT,
    CODE_ZERO,
    EXACT,
    MANY_ROWS,
    groups_of_rows,
    quantiser,
    some_tiles,
    table_of,
)
from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.emit import (
    I32,
    I64,
    TILE,
    V8F,
    VECTORS,
    Builder,
    Value,
    fused_multiply_add,
    half_tile,
    load,
    offset,
    shuffle,
)
from manylora.kernels.cpu.nf4_inner import BYTES, SMALLEST, SPAN
from manylora.kernels.cpu.nf4_packing import GROUP
from manylora.kernels.cpu.target import TARGET
from manylora.kernels.cpu.threads import launch
from manylora.kernels.cpu.tiles import share

_FOUR_BYTES: Final = 4 * TILE
"""Codes of four positions of a tile."""
BEHIND: Final = EXACT // 2
"""Vectors of 16 fp32 values that a tile's columns of exact positions take, bf16."""
_ROWS_AT_ONCE: Final = 1024
"""Of a table that are packed at once: in fp32 in between."""


def _group(b: Builder, address: Value) -> list[list[Value]]:
    fours = [offset(b, address, _FOUR_BYTES * i) for i in range(GROUP // 4)]
    return [[load(b, offset(b, one, 4 * TARGET.lanes * v), BYTES, 1) for v in range(VECTORS)] for one in fours]


def _rotated(b: Builder, values: list[Value]) -> list[Value]:
    """A span times H: sums and differences of what is 1, 2, 4, 8 and 16 positions apart, in that order."""
    fma = fused_multiply_add(b)
    for far in (1, 2, 4):
        signs = ir.Constant(V8F, [-1.0 if lane & far else 1.0 for lane in range(8)])
        swapped = [shuffle(b, value, value, [lane ^ far for lane in range(8)]) for value in values]
        values = [
            b.call(fma, pair) for pair in ([one, signs, other] for one, other in zip(values, swapped, strict=True))
        ]
    for far in (1, 2):
        values = [
            b.fsub(values[i ^ far], value) if i & far else b.fadd(value, values[i ^ far])
            for i, value in enumerate(values)
        ]
    return values


def _column(b: Builder, codes: Value, largest: Value, entry: Value) -> list[Value]:
    """As it lies behind the largest: of codes of rotated spans it could not be had."""
    return half_tile(b, b.add(largest, b.sext(load(b, offset(b, entry, 4), I32, 4), I64)))


_quantised = quantiser(_rotated)
_some_tiles = some_tiles(_group, TILE * GROUP, _column, behind=BEHIND)


@kernel
def _quantise_rotated_kernel(arguments, part, parts):
    a = carray(arguments, 13)
    _quantised(part, parts, a[0], a[1], a[2], a[3], a[4], a[5], a[12])


@kernel
def _head_bytes_kernel(arguments, part, parts):
    a = carray(arguments, 13)
    rows, depth, levels, stride, codes, largest, y, y_stride, block, exact = (
        a[2], a[3], a[4], a[5], a[6], a[7], a[9], a[10], a[11], a[12],
    )  # fmt: skip
    values = 64 * (depth // block + (BEHIND if exact != 0 else 0))
    # A part has tiles for all rows, as memory brings each once: a vocabulary is more than caches hold.
    first, last = share(a[8], part, parts, 2)
    groups = groups_of_rows(rows)
    at_once = 2 if groups > 1 else max(last - first, 1)
    for tile in range(first, last, at_once):
        for g in range(groups):
            row, end = rows * g // groups, rows * (g + 1) // groups
            _some_tiles(
                end - row, levels + row * stride, depth, codes + 16 * tile * depth,
                largest + tile * values, min(at_once, last - tile), block,
                y + row * y_stride + 64 * tile, y_stride, 0, rows >= MANY_ROWS, exact,
            )  # fmt: skip


def block_of(width: int) -> int:
    """Positions of an output that have a largest magnitude of their own, of ``width``, a multiple of ``SPAN``."""
    return 64 if width % 64 == 0 else SPAN


@njit("void(float32[:, ::1], int64, int64, uint8[:, :, :, ::1], float32[:, :, ::1])", nogil=True, cache=True)
def _pack(weight, first, block, codes, largest):
    for n in range(len(weight)):
        tile, output, row = (first + n) // TILE, (first + n) % TILE, weight[n]
        for far in (1, 2, 4, 8, 16):  # times H, in place
            for k in range(len(row)):
                if k & far == 0:
                    row[k], row[k + far] = row[k] + row[k + far], row[k] - row[k + far]
        for start in range(0, len(row), block):
            most = np.float32(0.0)
            for k in range(start, start + block):
                row[k] /= np.float32(SPAN)
                most = max(most, abs(row[k])) if row[k] == row[k] else np.float32(np.nan)
            if most < SMALLEST:
                most = np.float32(0.0)
            largest[tile, start // block, output] = most
            factor = np.float32(CODE_UNIT) / most if np.isfinite(most) and most > 0.0 else np.float32(0.0)
            for k in range(start, start + block):
                value = np.float64(row[k]) * factor if factor > 0.0 else 0.0
                codes[tile, k // 4, output, k % 4] = np.uint8(np.rint(value + CODE_ZERO))


def pack_head(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A bf16 weight ``[N, K]``, K a multiple of ``SPAN``, rotated, as codes, uint8 ``[ceil(N / 16), K / 4, 16, 4]``,
    and the largest magnitudes of blocks, fp32 ``[ceil(N / 16), K / block_of(K), 16]``; a tile's missing outputs are
    zero."""
    n, k = weight.shape
    tiles = -(-n // TILE)
    codes = torch.zeros(tiles, k // 4, TILE, 4, dtype=torch.uint8)
    largest = torch.zeros(tiles, k // block_of(k), TILE)
    for first in range(0, n, _ROWS_AT_ONCE):
        rows = weight[first : first + _ROWS_AT_ONCE].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        _pack(rows.numpy(), first, block_of(k), codes.numpy(), largest.numpy())
    return codes, largest


def exact_columns(
    tiles: torch.Tensor, largest: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``largest`` and behind it the weights of exact positions, ``[tiles, K / block_of(K) + BEHIND, 16]`` fp32 that are
    pairs of bf16, of a table that ``bf16_linear.pack_bf16`` packed; and the ``exact`` of `head_bytes_linear`."""
    found, depth = sorted(positions.tolist()), tiles.shape[1]
    blocks = depth // block_of(depth)
    table = table_of(found, depth, [(64 * blocks + 32 * i, 0, 0) for i in range(len(found))])
    columns = bf16_linear.unpack_bf16(tiles[:, found]).view(-1, TILE, EXACT).transpose(1, 2)
    pairs = columns.bfloat16().contiguous().view(torch.float32).view(-1, BEHIND, TILE)
    return torch.cat((largest[:, :blocks], pairs), dim=1), table


def head_bytes_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    largest: torch.Tensor,
    out: torch.Tensor,
    work: torch.Tensor,
    exact: torch.Tensor | None = None,
) -> None:
    """``out = x @ W.T``, x ``[M, K]`` fp32, K a multiple of ``SPAN``, W as `pack_head` packed it; ``out`` ``[M, 16 *
    tiles]`` fp32. ``work``: as ``nf4_bytes.nf4_bytes_linear``'s. ``exact``, and then what ``largest`` is: of
    `exact_columns`."""
    m, k = x.shape
    launch(
        _quantise_rotated_kernel, x.data_ptr(), x.stride(0) * 4, m, k, work.data_ptr(), work.stride(0) * 4,
        codes.data_ptr(), largest.data_ptr(), codes.shape[0], out.data_ptr(), out.stride(0) * 4, block_of(k),
        0 if exact is None else exact.data_ptr(), then=_head_bytes_kernel, keep=(x, codes, largest, out, work),
    )  # fmt: skip
