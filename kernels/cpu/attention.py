"""Rotary embedding and the KV cache's update, then paged attention: two CPU kernels with the same arguments.

A page of keys is kept as ``[kv_head, head_dim, 16]`` (transposed) and a page of values as ``[kv_head, 16, head_dim]``:
both are panels of the GEMM micro-kernel, so scores and outputs need no gather and no sum across lanes. The query heads
of one KV head are rows of the same GEMM, and so are the queries of a prompt chunk. The pages hold fp32, or integers with
a scale for each token (``kv_levels``): those of the keys then multiply the scores, those of the values the weights, so
that a page is multiplied as it lies. A token's own step reads it as it was stored, too.

Each query's softmax is over its own positions only, summed by absolute position: the result depends on neither the
chunk a prompt was cut into nor on who shares the batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import carray, njit

from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.emit import int32_at
from manylora.kernels.cpu.kv_levels import ask_for, page_width, store_levels, weigh_16
from manylora.kernels.cpu.target import TARGET
from manylora.kernels.cpu.threads import launch
from manylora.kernels.cpu.tiles import (
    address_of,
    float32_from_bits,
    float32_view,
    gemm_panel,
    gemm_rows,
    integer_gemm_panel,
    integer_gemm_rows,
    keep_alive,
    share,
)
from manylora.kernels.cpu.vectors import multiply_16, scale_8, softcap_8, softmax_16

PAGE: int = 16
_SEVERAL_TILES = TARGET.panel_tiles > 1
"""Whether a page's values are multiplied several tiles at once: AVX2 has too few registers for it to pay."""
QUERY_BLOCK: int = 8
"""Queries of one prompt attended together; times the heads of a group they are the rows of the GEMM."""


@njit(nogil=True)
def _rotate(head, half, cos, sin):
    """Rotary embedding of one head in place, in the halves convention of transformers (``rotate_half``)."""
    values = float32_view(head, 2 * half)
    c, s = float32_view(cos, half), float32_view(sin, half)
    for i in range(half):
        left, right = values[i], values[half + i]
        values[i] = left * c[i] - right * s[i]
        values[half + i] = right * c[i] + left * s[i]


@njit(nogil=True)
def _store_values(key, value, k_page, v_page, within, head_dim):
    """``kv_levels.store_levels`` for pages of fp32."""
    source, column = float32_view(key, head_dim), float32_view(k_page, 16 * head_dim)
    for i in range(head_dim):
        column[16 * i + within] = source[i]
    source, row = float32_view(value, head_dim), float32_view(v_page + 4 * within * head_dim, head_dim)
    for i in range(head_dim):
        row[i] = source[i]


@kernel
def _store_kernel(arguments, part, parts):
    """Rotate queries and keys in place and store the new keys and values."""
    a = carray(arguments, 23)
    qkv, qkv_stride, tokens = a[0], a[1], a[4]
    cos, sin, keys, values = a[5], a[6], a[7], a[8]
    starts, tables, table_stride, positions = a[10], a[12], a[13], a[14]
    n_heads, n_kv_heads, head_dim = a[15], a[16], a[17]
    integers = a[22] != 0
    half = head_dim // 2
    head_bytes = 32 * (head_dim + 2) if integers else 64 * head_dim
    first, last = share(tokens, part, parts, 1)
    sequence = 0
    for token in range(first, last):
        while int32_at(starts, sequence + 1) <= token:
            sequence += 1
        position = int32_at(positions, token)
        c, s = cos + 4 * half * position, sin + 4 * half * position
        row = qkv + token * qkv_stride
        for head in range(n_heads + n_kv_heads):
            _rotate(row + 4 * head * head_dim, half, c, s)
        page = int32_at(tables, sequence * table_stride + position // 16)
        within = position % 16
        for head in range(n_kv_heads):
            key = row + 4 * (n_heads + head) * head_dim
            value = key + 4 * n_kv_heads * head_dim
            k_page = keys + (page * n_kv_heads + head) * head_bytes
            v_page = values + (page * n_kv_heads + head) * head_bytes
            if integers:
                store_levels(key, value, k_page, v_page, within, head_dim)
            else:
                _store_values(key, value, k_page, v_page, within, head_dim)


@kernel
def _attend_kernel(arguments, part, parts):
    a = carray(arguments, 23)
    qkv, qkv_stride, out, out_stride = a[0], a[1], a[2], a[3]
    keys, values = a[7], a[8]
    n_sequences, starts, contexts, tables, table_stride, positions = a[9], a[10], a[11], a[12], a[13], a[14]
    n_heads, n_kv_heads, head_dim, window = a[15], a[16], a[17], a[18]
    scale = float32_from_bits(a[19])
    capped, cap_factor, cap = a[21] != 0, float32_from_bits(a[20]), float32_from_bits(a[21])
    integers = a[22] != 0
    group = n_heads // n_kv_heads
    size, head_bytes = (2, 32 * (head_dim + 2)) if integers else (4, 64 * head_dim)
    page_bytes, behind = n_kv_heads * head_bytes, 16 * size * head_dim

    longest = 0
    for s in range(n_sequences):
        longest = max(longest, int32_at(contexts, s))
    # A line more than there are scores: rows a power of two apart would fall on the same places of the cache.
    width = (longest + 15) // 16 * 16 + 16
    block_rows = group * QUERY_BLOCK
    score_memory = np.empty(block_rows * width, np.float32)
    q_offsets = np.empty(block_rows, np.int64)
    s_offsets = np.empty(block_rows, np.int64)
    o_offsets = np.empty(block_rows, np.int64)
    scores, qo, so, oo = address_of(score_memory), address_of(q_offsets), address_of(s_offsets), address_of(o_offsets)

    item = 0
    for s in range(n_sequences):
        start, end = int32_at(starts, s), int32_at(starts, s + 1)
        table = tables + 4 * s * table_stride
        for query in range(start, end, QUERY_BLOCK):
            queries = min(QUERY_BLOCK, end - query)
            rows = queries * group
            top = int32_at(positions, query + queries - 1) + 1
            bottom = int32_at(positions, query)
            first_page = max(0, bottom + 1 - window) // 16 if window > 0 else 0
            pages = (top + 15) // 16
            for head in range(n_kv_heads):
                item += 1
                if item % parts != part:
                    continue
                for q in range(queries):
                    for g in range(group):
                        r = q * group + g
                        column = 4 * (head * group + g) * head_dim
                        q_offsets[r] = (query + q) * qkv_stride + column
                        o_offsets[r] = (query + q) * out_stride + column
                        s_offsets[r] = 4 * r * width
                first_key, first_value = keys + head * head_bytes, values + head * head_bytes
                for p in range(first_page, pages):
                    panel = first_key + int32_at(table, p) * page_bytes
                    if p + 1 < pages:
                        following = first_key + int32_at(table, p + 1) * page_bytes
                    else:
                        following = first_value + int32_at(table, first_page) * page_bytes
                    target, ahead = scores + 64 * p, following - panel
                    if integers:
                        integer_gemm_rows(rows, qkv, qo, panel, 32, head_dim, target, so, 0, ahead)
                        ask_for(following + behind)
                        for r in range(rows):
                            multiply_16(target + s_offsets[r], panel + behind)
                    else:
                        gemm_rows(rows, qkv, qo, panel, 64, head_dim, target, so, 0, ahead)
                for r in range(rows):
                    limit = int32_at(positions, query + r // group) + 1
                    begin = max(0, limit - window) if window > 0 else 0
                    row = float32_view(scores + 4 * r * width, width)
                    base = scores + 4 * r * width + 64 * first_page
                    if capped:
                        softcap_8(base, 2 * (pages - first_page), cap_factor, cap)
                    for j in range(16 * first_page, begin):
                        row[j] = -np.inf
                    for j in range(limit, 16 * pages):
                        row[j] = -np.inf
                    factor = np.float32(1.0) / softmax_16(base, pages - first_page, scale)
                    if integers:
                        for p in range(first_page, pages):
                            weigh_16(
                                scores + 4 * r * width + 64 * p,
                                first_value + int32_at(table, p) * page_bytes + behind,
                                factor,
                            )
                    else:
                        scale_8(base, 2 * (pages - first_page), factor)
                for p in range(first_page, pages):
                    panel = first_value + int32_at(table, p) * page_bytes
                    following = panel if p + 1 == pages else first_value + int32_at(table, p + 1) * page_bytes
                    ahead = following - panel
                    # Rows of the last page beyond the newest token may hold anything: they are not read.
                    depth = min(16, top - 16 * p)
                    keep = 1 if p > first_page else 0
                    source, stride, tiles = scores + 64 * p, size * head_dim, head_dim // 16
                    if integers and _SEVERAL_TILES:
                        integer_gemm_panel(rows, tiles, source, so, panel, stride, depth, out, oo, keep, ahead)
                    elif _SEVERAL_TILES:
                        gemm_panel(rows, tiles, source, so, panel, stride, depth, out, oo, keep, ahead)
                    else:
                        for d in range(tiles):
                            if integers:
                                integer_gemm_rows(
                                    rows, source, so, panel + 32 * d, stride, depth, out + 64 * d, oo, keep, ahead
                                )  # fmt: skip
                            else:
                                gemm_rows(
                                    rows, source, so, panel + 64 * d, stride, depth, out + 64 * d, oo, keep, ahead
                                )  # fmt: skip
    keep_alive(score_memory)
    keep_alive(q_offsets)
    keep_alive(s_offsets)
    keep_alive(o_offsets)


def new_pages(
    n_pages: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one layer, zeros. fp32: ``[n_pages, n_kv_heads, head_dim, 16]`` and ``[n_pages, n_kv_heads,
    16, head_dim]``; int16: both ``[n_pages, n_kv_heads, kv_levels.page_width]``, levels in the same order, then
    scales."""
    if dtype == torch.int16:
        shape = (n_pages, n_kv_heads, page_width(head_dim))
        return _zeros(shape, dtype), _zeros(shape, dtype)
    shapes = (n_pages, n_kv_heads, head_dim, PAGE), (n_pages, n_kv_heads, PAGE, head_dim)
    return _zeros(shapes[0], dtype), _zeros(shapes[1], dtype)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Beginning with a cache line. numpy's zeros are committed by the system page by page, as they are first used."""
    memory = np.zeros(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return torch.from_numpy(memory[first : first + memory.size - 64]).view(dtype).view(shape)


def paged_attention(
    qkv: torch.Tensor,
    out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    contexts: torch.Tensor,
    tables: torch.Tensor,
    positions: torch.Tensor,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    window: int,
    scale_bits: int,
    cap_factor_bits: int = 0,
    cap_bits: int = 0,
) -> None:
    """Causal attention of the tokens of several sequences, each over its own pages; the pages are updated first.

    ``qkv`` ``[T, (n_heads + 2 n_kv_heads) * head_dim]`` fp32, which is overwritten; ``out``
    ``[T, n_heads * head_dim]``; ``cos``, ``sin`` ``[positions, head_dim / 2]``; ``keys``, ``values``: see
    ``new_pages``; int32: ``starts`` ``[S + 1]`` (first token of a sequence), ``contexts`` ``[S]`` (its length with the
    new tokens), ``tables`` ``[S, pages]``, ``positions`` ``[T]``.
    ``window`` 0: none. head_dim % 16 == 0. Scores are ``q . k``; with ``cap_bits`` they become ``cap * tanh(cap_factor
    * q . k)`` first; softmax takes ``scale`` times what they are then.
    """
    launch(
        _store_kernel, qkv.data_ptr(), qkv.stride(0) * 4, out.data_ptr(), out.stride(0) * 4, qkv.shape[0],
        cos.data_ptr(), sin.data_ptr(), keys.data_ptr(), values.data_ptr(), contexts.numel(), starts.data_ptr(),
        contexts.data_ptr(), tables.data_ptr(), tables.stride(0), positions.data_ptr(), n_heads, n_kv_heads, head_dim,
        window, scale_bits, cap_factor_bits, cap_bits, int(keys.dtype == torch.int16), then=_attend_kernel,
        keep=(qkv, out, starts, contexts, tables, positions),
    )  # fmt: skip
