"""Rotary embedding and the KV cache's update, then paged attention: two CPU kernels with the same arguments.

A page of keys is kept as ``[kv_head, head_dim, 16]`` (transposed) and a page of values as ``[kv_head, 16, head_dim]``:
both are panels of the GEMM micro-kernel, so scores and outputs need no gather and no sum across lanes. The query heads
of one KV head are rows of the same GEMM, and so are the queries of a prompt chunk.

Each query's softmax is over its own positions only, summed by absolute position: the result depends on neither the
chunk a prompt was cut into nor on who shares the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit

from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.emit import int32_at
from manylora.kernels.cpu.target import TARGET
from manylora.kernels.cpu.threads import launch
from manylora.kernels.cpu.tiles import (
    address_of,
    float32_from_bits,
    float32_view,
    gemm_panel,
    gemm_rows,
    keep_alive,
    share,
)
from manylora.kernels.cpu.vectors import scale_8, softcap_8, softmax_8, sum_8

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


@kernel
def _store_kernel(arguments, part, parts):
    """Rotate queries and keys in place and store the new keys and values."""
    a = carray(arguments, 22)
    qkv, qkv_stride, tokens = a[0], a[1], a[4]
    cos, sin, keys, values = a[5], a[6], a[7], a[8]
    starts, tables, table_stride, positions = a[10], a[12], a[13], a[14]
    n_heads, n_kv_heads, head_dim = a[15], a[16], a[17]
    half = head_dim // 2
    page_bytes = n_kv_heads * head_dim * 64
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
            key = float32_view(row + 4 * (n_heads + head) * head_dim, head_dim)
            value = float32_view(row + 4 * (n_heads + n_kv_heads + head) * head_dim, head_dim)
            k_page = float32_view(keys + page * page_bytes + 64 * head * head_dim, 16 * head_dim)
            v_page = float32_view(values + page * page_bytes + 64 * head * head_dim, 16 * head_dim)
            for i in range(head_dim):
                k_page[16 * i + within] = key[i]
                v_page[within * head_dim + i] = value[i]


@kernel
def _attend_kernel(arguments, part, parts):
    a = carray(arguments, 22)
    qkv, qkv_stride, out, out_stride = a[0], a[1], a[2], a[3]
    keys, values = a[7], a[8]
    n_sequences, starts, contexts, tables, table_stride, positions = a[9], a[10], a[11], a[12], a[13], a[14]
    n_heads, n_kv_heads, head_dim, window = a[15], a[16], a[17], a[18]
    scale = float32_from_bits(a[19])
    capped, cap_factor, cap = a[21] != 0, float32_from_bits(a[20]), float32_from_bits(a[21])
    group = n_heads // n_kv_heads
    page_bytes = n_kv_heads * head_dim * 64

    longest = 0
    for s in range(n_sequences):
        longest = max(longest, int32_at(contexts, s))
    width = (longest + 15) // 16 * 16
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
                for p in range(first_page, pages):
                    page = int32_at(table, p)
                    ahead = (int32_at(table, min(p + 1, pages - 1)) - page) * page_bytes
                    panel = keys + page * page_bytes + 64 * head * head_dim
                    gemm_rows(rows, qkv, qo, panel, 64, head_dim, scores + 64 * p, so, 0, ahead)
                for r in range(rows):
                    limit = int32_at(positions, query + r // group) + 1
                    begin = max(0, limit - window) if window > 0 else 0
                    row = float32_view(scores + 4 * r * width, width)
                    if capped:
                        softcap_8(scores + 4 * r * width + 64 * first_page, 2 * (pages - first_page), cap_factor, cap)
                    for j in range(16 * first_page, begin):
                        row[j] = -np.inf
                    for j in range(limit, 16 * pages):
                        row[j] = -np.inf
                    base = scores + 4 * r * width + 64 * first_page
                    vectors = 2 * (pages - first_page)
                    softmax_8(base, vectors, scale)
                    # exp of a clamped -inf is tiny, not zero: masked positions must weigh nothing at all.
                    for j in range(16 * first_page, begin):
                        row[j] = 0.0
                    for j in range(limit, 16 * pages):
                        row[j] = 0.0
                    scale_8(base, vectors, np.float32(1.0) / sum_8(base, vectors))
                for p in range(first_page, pages):
                    page = int32_at(table, p)
                    ahead = (int32_at(table, min(p + 1, pages - 1)) - page) * page_bytes
                    panel = values + page * page_bytes + 64 * head * head_dim
                    # Rows of the last page beyond the newest token may hold anything: they are not read.
                    depth = min(16, top - 16 * p)
                    keep = 1 if p > first_page else 0
                    if _SEVERAL_TILES:
                        gemm_panel(
                            rows, head_dim // 16, scores + 64 * p, so, panel, 4 * head_dim, depth, out, oo, keep, ahead
                        )  # fmt: skip
                    else:
                        for d in range(head_dim // 16):
                            gemm_rows(
                                rows, scores + 64 * p, so, panel + 64 * d, 4 * head_dim, depth, out + 64 * d, oo, keep,
                                ahead,
                            )  # fmt: skip
    keep_alive(score_memory)
    keep_alive(q_offsets)
    keep_alive(s_offsets)
    keep_alive(o_offsets)


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

    ``qkv`` ``[T, (n_heads + 2 n_kv_heads) * head_dim]`` fp32 (queries and keys are rotated in place); ``out``
    ``[T, n_heads * head_dim]``; ``cos``, ``sin`` ``[positions, head_dim / 2]``; ``keys``
    ``[pages, n_kv_heads, head_dim, 16]``; ``values`` ``[pages, n_kv_heads, 16, head_dim]``; int32: ``starts``
    ``[S + 1]`` (first token of a sequence), ``contexts`` ``[S]`` (its length with the new tokens),
    ``tables`` ``[S, pages]``, ``positions`` ``[T]``.
    ``window`` 0: none. head_dim % 16 == 0. Scores are ``q . k``; with ``cap_bits`` they become ``cap * tanh(cap_factor
    * q . k)`` first; softmax takes ``scale`` times what they are then.
    """
    launch(
        _store_kernel, qkv.data_ptr(), qkv.stride(0) * 4, out.data_ptr(), out.stride(0) * 4, qkv.shape[0],
        cos.data_ptr(), sin.data_ptr(), keys.data_ptr(), values.data_ptr(), contexts.numel(), starts.data_ptr(),
        contexts.data_ptr(), tables.data_ptr(), tables.stride(0), positions.data_ptr(), n_heads, n_kv_heads, head_dim,
        window, scale_bits, cap_factor_bits, cap_bits, then=_attend_kernel,
        keep=(qkv, out, starts, contexts, tables, positions),
    )  # fmt: skip
