"""What pages of adapters can hold, and by which micro-kernel each of it is multiplied.

Whole numbers are multiplied as what they are; ``has_scales`` says that each rank's sums are then to be multiplied by
what one of A times one of B stands for.
"""

from __future__ import annotations

from typing import Final

import torch
from numba import njit

from manylora.kernels.cpu import lora_inner as inner
from manylora.kernels.cpu import tiles as loops
from manylora.kernels.cpu.emit import BYTE_TILE, WORD_TILE

_FP32, _BF16, _INT16, _INT8 = 0, 1, 2, 3
KINDS: Final = {torch.float32: _FP32, torch.bfloat16: _BF16, torch.int16: _INT16, torch.int8: _INT8}
_TILES_FETCHED: Final = 2
"""How many tiles ahead of what the expand of rows alone reads it asks for."""
_FETCHED: Final = 2048
"""How many bytes ahead of what the shrink reads it asks for: a page is read from its beginning to its end."""


@njit(nogil=True, inline="always")
def has_scales(kind):
    return kind in (_INT16, _INT8)


@njit(nogil=True, inline="always")
def tile_stride(kind):
    """Bytes from a tile of B to the next."""
    if kind == _INT16:
        return WORD_TILE
    if kind == _INT8:
        return BYTE_TILE
    return 32 if kind == _BF16 else 64


@njit(nogil=True, inline="always")
def multiply_rows(kind, count, x, xs, panel, depth, target, hs):
    """``count`` rows times a page of A: ``tiles.gemm_rows``."""
    if kind == _BF16:
        loops.half_gemm_rows(count, x, xs, panel, 32, depth, target, hs, 0, _FETCHED)
    elif kind == _INT16:
        loops.word_gemm_rows(count, x, xs, panel, 32, depth, target, hs, 0, _FETCHED)
    elif kind == _INT8:
        loops.byte_gemm_rows(count, x, xs, panel, 16, depth, target, hs, 0, _FETCHED)
    else:
        loops.gemm_rows(count, x, xs, panel, 64, depth, target, hs, 0, _FETCHED)


@njit(nogil=True, inline="always")
def multiply_apart(kind, count, xs, panels, depth, targets):
    """A row each of ``count`` pages of A: ``lora_inner.gemm_apart``."""
    if kind == _BF16:
        inner.half_gemm_apart(count, xs, panels, 32, depth, targets, _FETCHED)
    elif kind == _INT16:
        inner.word_gemm_apart(count, xs, panels, 32, depth, targets, _FETCHED)
    elif kind == _INT8:
        inner.byte_gemm_apart(count, xs, panels, 16, depth, targets, _FETCHED)
    else:
        inner.gemm_apart(count, xs, panels, 64, depth, targets, _FETCHED)


@njit(nogil=True, inline="always")
def multiply_two(kind, count, xs, first, second, depth, targets):
    """``count`` rows each of two pages of A: ``lora_inner.gemm_two``."""
    if kind == _BF16:
        inner.half_gemm_two(count, xs, first, second, 32, depth, targets, _FETCHED)
    elif kind == _INT16:
        inner.word_gemm_two(count, xs, first, second, 32, depth, targets, _FETCHED)
    elif kind == _INT8:
        inner.byte_gemm_two(count, xs, first, second, 16, depth, targets, _FETCHED)
    else:
        inner.gemm_two(count, xs, first, second, 64, depth, targets, _FETCHED)


@njit(nogil=True, inline="always")
def add_page(kind, count, tiles, source, so, page, columns, width, target, to, ahead):
    """Add a page's tiles of B, the first of which is at ``page``; ``columns`` is what the page is wide."""
    if kind == _BF16:
        loops.half_gemm_panel(count, tiles, source, so, page, 2 * columns, width, target, to, 1, ahead)
    elif kind == _INT16:
        loops.word_gemm_panel(count, tiles, source, so, page, 32, width, target, to, 1, ahead)
    elif kind == _INT8:
        loops.byte_gemm_panel(count, tiles, source, so, page, 16, width, target, to, 1, ahead)
    else:
        loops.gemm_panel(count, tiles, source, so, page, 4 * columns, width, target, to, 1, ahead)


@njit(nogil=True, inline="always")
def add_apart(kind, count, tiles, sources, pages, later, columns, width, targets):
    """The same for a row each of ``count`` pages, of which those of ``later`` are next."""
    if kind == _BF16:
        inner.half_add_apart(count, sources, pages, later, 2 * columns, 32, width, tiles, targets, _TILES_FETCHED)
    elif kind == _INT16:
        inner.word_add_apart(count, sources, pages, later, 32, WORD_TILE, width, tiles, targets, _TILES_FETCHED)
    elif kind == _INT8:
        inner.byte_add_apart(count, sources, pages, later, 16, BYTE_TILE, width, tiles, targets, _TILES_FETCHED)
    else:
        inner.add_apart(count, sources, pages, later, 4 * columns, 64, width, tiles, targets, _TILES_FETCHED)
