"""Rotary embedding and the KV cache's update, then paged attention: two CPU kernels with the same arguments.

A page of keys is kept as ``[kv_head, head_dim, 16]`` (transposed) and a page of values as ``[kv_head, 16, head_dim]``:
both are panels of a micro-kernel (``attention_inner``), so scores and outputs need no gather and no sum across lanes.
The query heads of one KV head are rows of the same product, and so are the queries of a prompt chunk.

The pages hold fp32, or integers with a scale for each token (``kv_levels``): the keys' multiply the scores, the values'
the weights, so that a page is multiplied as it lies. A token's own step reads it as it was stored, too.

Each query's softmax is over its own positions only, summed by absolute position: the result depends on neither the
chunk a prompt was cut into nor on who shares the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit

from manylora.kernels.cpu.attention_inner import (
    AHEAD,
    integer_outputs_of_pages,
    integer_scores_of_pages,
    outputs_of_pages,
    scores_of_pages,
)
from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.emit import int32_at
from manylora.kernels.cpu.kv_levels import page_width, store_levels, weigh_16
from manylora.kernels.cpu.threads import launch
from manylora.kernels.cpu.tiles import (
    address_of,
    float32_from_bits,
    float32_view,
    keep_alive,
    share,
)
from manylora.kernels.cpu.vectors import scale_8, softcap_8, softmax_16
from manylora.kernels.host_memory import untouched_zeros

PAGE: int = 16
QUERY_BLOCK: int = 8
"""Queries of one prompt attended together; times the heads of a group they are the rows of a product."""


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


@njit(nogil=True)
def _panel(item, index, keys, values, tables, table_stride, head_bytes, page_bytes):
    """Where the page is that an item reads as its ``index``-th: its pages of keys, then those of values."""
    s, head, first_page, pages = item[0], item[3], item[4], item[5]
    cache, p = (keys, index) if index < pages else (values, index - pages)
    return cache + int32_at(tables + 4 * s * table_stride, first_page + p) * page_bytes + head * head_bytes


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
    head_bytes = 32 * (head_dim + 2) if integers else 64 * head_dim
    page_bytes, behind = n_kv_heads * head_bytes, 32 * head_dim

    longest, blocks = 0, 0
    for s in range(n_sequences):
        longest = max(longest, int32_at(contexts, s))
        blocks += (int32_at(starts, s + 1) - int32_at(starts, s) + QUERY_BLOCK - 1) // QUERY_BLOCK
    pages_at_most = (longest + 15) // 16
    # A line more than there are scores: rows a power of two apart would fall on the same places of the cache.
    width = 16 * (pages_at_most + 1)
    block_rows = group * QUERY_BLOCK
    score_memory = np.empty(block_rows * width, np.float32)
    q_offsets = np.empty(block_rows, np.int64)
    o_offsets = np.empty(block_rows, np.int64)
    s_offsets = 4 * width * np.arange(block_rows)
    panels = np.empty(2 * pages_at_most + AHEAD, np.int64)
    scores, qo, so, oo = address_of(score_memory), address_of(q_offsets), address_of(s_offsets), address_of(o_offsets)

    # This part's items: the sequence, the first query, how many there are, the head, its first page, and their number.
    # The heads of a page lie side by side, so one part takes them all: what the processor fetches beyond the end of one
    # is the next one's beginning, and read soon.
    together = n_kv_heads if blocks >= parts else 1
    items = np.empty((blocks * n_kv_heads // parts + together, 6), np.int64)
    own = item = 0
    for s in range(n_sequences):
        start, end = int32_at(starts, s), int32_at(starts, s + 1)
        for query in range(start, end, QUERY_BLOCK):
            queries = min(QUERY_BLOCK, end - query)
            bottom, top = int32_at(positions, query), int32_at(positions, query + queries - 1) + 1
            first_page = max(0, bottom + 1 - window) // 16 if window > 0 else 0
            for head in range(n_kv_heads):
                item += 1
                if (item - 1) // together % parts != part:
                    continue
                items[own, 0], items[own, 1], items[own, 2] = s, query, queries
                items[own, 3], items[own, 4], items[own, 5] = head, first_page, (top + 15) // 16 - first_page
                own += 1

    for i in range(own):
        s, query, queries, head = items[i, 0], items[i, 1], items[i, 2], items[i, 3]
        first_page, pages = items[i, 4], items[i, 5]
        for p in range(2 * pages):
            panels[p] = _panel(items[i], p, keys, values, tables, table_stride, head_bytes, page_bytes)
        after = items[min(i + 1, own - 1)]
        for p in range(AHEAD):
            nearest = min(p, 2 * after[5] - 1)
            panels[2 * pages + p] = _panel(after, nearest, keys, values, tables, table_stride, head_bytes, page_bytes)
        of_keys = address_of(panels)
        of_values = of_keys + 8 * pages
        rows = queries * group
        for q in range(queries):
            for g in range(group):
                column = 4 * (head * group + g) * head_dim
                q_offsets[q * group + g] = (query + q) * qkv_stride + column
                o_offsets[q * group + g] = (query + q) * out_stride + column
        if integers:
            integer_scores_of_pages(rows, qkv, qo, of_keys, pages, head_dim, scores, so)
        else:
            scores_of_pages(rows, qkv, qo, of_keys, pages, head_dim, scores, so)
        before = 16 * first_page
        for r in range(rows):
            limit = int32_at(positions, query + r // group) + 1
            begin = max(0, limit - window) if window > 0 else 0
            base = scores + s_offsets[r]
            row = float32_view(base, 16 * pages)
            if capped:
                softcap_8(base, 2 * pages, cap_factor, cap)
            for j in range(begin - before):
                row[j] = -np.inf
            for j in range(limit - before, 16 * pages):
                row[j] = -np.inf
            factor = np.float32(1.0) / softmax_16(base, pages, scale)
            if integers:
                for p in range(pages):
                    weigh_16(base + 64 * p, panels[pages + p] + behind, factor)
            else:
                scale_8(base, 2 * pages, factor)
        # Rows of the last page beyond the newest token may hold anything: they are not read.
        last = int32_at(positions, query + queries - 1) % 16 + 1
        if integers:
            integer_outputs_of_pages(rows, head_dim // 16, scores, so, of_values, pages, last, out, oo)
        else:
            outputs_of_pages(rows, head_dim // 16, scores, so, of_values, pages, last, out, oo)
    keep_alive(score_memory)
    keep_alive(q_offsets)
    keep_alive(s_offsets)
    keep_alive(o_offsets)
    keep_alive(panels)


def new_pages(n_pages: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one layer, zeros. fp32: ``[n_pages, n_kv_heads, head_dim, 16]`` and ``[n_pages, n_kv_heads,
    16, head_dim]``; int16: both ``[n_pages, n_kv_heads, kv_levels.page_width]``, levels in the same order, then
    scales."""
    if dtype == torch.int16:
        shape = (n_pages, n_kv_heads, page_width(head_dim))
        return untouched_zeros(shape, dtype), untouched_zeros(shape, dtype)
    shapes = (n_pages, n_kv_heads, head_dim, PAGE), (n_pages, n_kv_heads, PAGE, head_dim)
    return untouched_zeros(shapes[0], dtype), untouched_zeros(shapes[1], dtype)


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
