"""Batched LoRA: the shrink and the expand as device functions, shared by the fused linear kernel and by the two kernels
that do the same by themselves. ``kernels.lora_routing`` makes their work lists, on the host, once a step.

- **shrink** ``h[place, rank] = scale * scaling * (x[row] @ A)``: entries (block of a segment's pairs, one page of A),
  each cut into shares of K. A share's product goes to its own fp32 plane; whoever finishes an entry's last share adds
  the planes in fixed order. No atomic additions of numbers: the bits do not depend on timing.
- **expand** ``y[row] += h[place] @ B``, on a tile of y that is in registers, piece after piece (one page of B for one
  segment at one level of composition). Tokens of others pass through untouched, to the bit.

A pair's *place* is ``level * stride_level + row``: a row's first adapter is at level 0, its second at level 1.

Semantics of the optional vectors (DoRA's gain, an adapter's bias): ``y[row] += scale * ((gain - 1) * base + bias)``,
with ``base`` the linear layer's product without bias; B is expected to hold the gain already (DoRA, Liu et al. 2024,
eq. 5, ``gain`` being the magnitude over the norm).
"""

from __future__ import annotations

import triton
import triton.language as tl

from manylora.kernels import lora_routing

ENTRY = tl.constexpr(lora_routing.ENTRY)
PIECE = tl.constexpr(lora_routing.PIECE)


@triton.jit
def shrink(
    worker,
    p_x, p_a, p_scaling, p_places, p_scale_at, p_entries, n_entries, p_partial, p_tickets, p_h, p_done,
    stride_x, stride_h, stride_level, K, layer, n_layers, n_slots, n_pages,
    WORKERS: tl.constexpr, ROWS: tl.constexpr, SLOT_PAGES: tl.constexpr, SHARE: tl.constexpr, BK: tl.constexpr,
    SIGNAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Entries dealt out to WORKERS programs. ``SIGNAL``: count finished entries in ``p_done``, for programs of the same
    launch that wait for them."""
    n_shares = tl.cdiv(K, SHARE)
    b_ranks = tl.arange(0, 16)
    b_place = tl.arange(0, ROWS)[:, None] * 16 + b_ranks[None, :]
    for item in range(worker, n_entries * n_shares, WORKERS):
        i_entry, i_share = item // n_shares, item % n_shares
        p_entry = p_entries + i_entry * ENTRY
        slot, column = tl.load(p_entry), tl.load(p_entry + 1)
        first, last, page = tl.load(p_entry + 2), tl.load(p_entry + 3), tl.load(p_entry + 4)
        i_projection = column // SLOT_PAGES
        p_page = p_a + ((i_projection * n_pages + page).to(tl.int64) * n_layers + layer) * K * 16
        b_pairs = first + tl.arange(0, ROWS)
        b_live = b_pairs < last
        b_places = tl.load(p_places + b_pairs, mask=b_live, other=0)
        p_rows = p_x + (b_places % stride_level).to(tl.int64)[:, None] * stride_x
        b_h = tl.zeros((ROWS, 16), dtype=tl.float32)
        for k in range(i_share * SHARE, tl.minimum((i_share + 1) * SHARE, K), BK):
            b_k = k + tl.arange(0, BK)
            b_inside = b_k < K
            b_x = tl.load(p_rows + b_k[None, :], mask=b_live[:, None] & b_inside[None, :], other=0.0)
            b_a = tl.load(p_page + b_k[:, None] * 16 + b_ranks[None, :], mask=b_inside[:, None], other=0.0)
            if WIDE:
                b_h += tl.dot(b_x.to(tl.float32), b_a.to(tl.float32), input_precision="ieee")
            else:
                b_h += tl.dot(b_x, b_a)
        finished = n_shares == 1
        if n_shares > 1:
            p_plane = p_partial + (i_entry * n_shares).to(tl.int64) * (ROWS * 16)
            tl.store(p_plane + i_share * (ROWS * 16) + b_place, b_h)
            tl.debug_barrier()
            finished = tl.atomic_add(p_tickets + i_entry, 1, sem="acq_rel") == n_shares - 1
            if finished:
                tl.debug_barrier()
                tl.store(p_tickets + i_entry, 0)  # for the next launch
                b_h = tl.zeros((ROWS, 16), dtype=tl.float32)
                for i in tl.range(0, n_shares, loop_unroll_factor=4, num_stages=1):
                    b_h += tl.load(p_plane + i * (ROWS * 16) + b_place, cache_modifier=".cg")
        if finished:
            scaling = tl.load(p_scaling + (i_projection * n_slots + slot) * n_layers + layer)
            b_h = b_h * (tl.load(p_scale_at + b_places, mask=b_live, other=0.0) * scaling)[:, None]
            p_target = p_h + b_places.to(tl.int64)[:, None] * stride_h + column * 16 + b_ranks[None, :]
            tl.store(p_target, b_h.to(p_h.dtype.element_ty), mask=b_live[:, None])
            if SIGNAL:
                tl.debug_barrier()
                tl.atomic_add(p_done, 1, sem="release")


@triton.jit
def pieces_of_tile(p_bounds, i_n, N, column_1, column_2, BN: tl.constexpr):
    """First and last (exclusive) piece of the projections that columns i_n .. i_n + BN touch; ``p_bounds`` int32
    ``[projections + 1]``."""
    last = tl.minimum(i_n + BN, N) - 1
    lowest = (i_n >= column_1).to(tl.int32) + (i_n >= column_2).to(tl.int32)
    highest = (last >= column_1).to(tl.int32) + (last >= column_2).to(tl.int32)
    return tl.load(p_bounds + lowest), tl.load(p_bounds + highest + 1)


@triton.jit
def columns_of(i_projection, N, column_1, column_2):
    """First and last (exclusive) column of a projection in the site's output."""
    start = tl.where(i_projection == 0, 0, tl.where(i_projection == 1, column_1, column_2))
    stop = tl.where(i_projection == 0, column_1, tl.where(i_projection == 1, column_2, N))
    return start, stop


@triton.jit
def load_b(
    i_piece, end, p_pieces, p_b, i_n, N, column_1, column_2, layer, n_layers, n_pages, BN: tl.constexpr
):  # fmt: skip
    """The page of B ``[BN, 16]`` of a piece, zero outside its projection's columns, or if there is no such piece."""
    is_there = i_piece < end
    page = tl.load(p_pieces + i_piece * PIECE + 3, mask=is_there, other=-1)
    i_projection = tl.load(p_pieces + i_piece * PIECE + 4, mask=is_there, other=0)
    start, stop = columns_of(i_projection, N, column_1, column_2)
    width = stop - start
    p_page = p_b + (start.to(tl.int64) * n_pages + page.to(tl.int64) * width) * (n_layers * 16)
    p_page += layer.to(tl.int64) * 16 * width
    b_n = i_n + tl.arange(0, BN)
    b_inside = (b_n >= start) & (b_n < stop) & (page >= 0)
    return tl.load(
        p_page + tl.arange(0, 16)[None, :] * width + (b_n[:, None] - start), mask=b_inside[:, None], other=0.0
    )


@triton.jit
def expand(
    b_y, b_b, begin, end, i_m, i_n,
    p_h, p_b, p_slot_at, p_scale_at, p_pieces, p_gain, p_bias,
    stride_h, stride_level, M, N, column_1, column_2, layer, n_layers, n_pages,
    BM: tl.constexpr, BN: tl.constexpr, VECTORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``b_y`` ``[BN, BM]`` (columns i_n .. of y, tokens i_m ..) plus the pieces ``begin .. end - 1``; ``b_b`` is the
    first one's ``load_b``. ``column_1``, ``column_2``: where the site's second and third projection start, N if it
    has none."""
    b_m = i_m + tl.arange(0, BM)
    b_n = i_n + tl.arange(0, BN)
    b_ranks = tl.arange(0, 16)
    b_base = b_y
    for i_piece in tl.range(begin, end, num_stages=1):
        b_next = load_b(i_piece + 1, end, p_pieces, p_b, i_n, N, column_1, column_2, layer, n_layers, n_pages, BN)
        p_piece = p_pieces + i_piece * PIECE
        if (tl.load(p_piece + 5) < i_m + BM) & (tl.load(p_piece + 6) >= i_m):
            slot, level, column = tl.load(p_piece), tl.load(p_piece + 1), tl.load(p_piece + 2)
            p_token = level * stride_level + b_m
            b_mine = tl.load(p_slot_at + p_token, mask=b_m < M, other=-1) == slot
            b_h = tl.load(
                p_h + p_token.to(tl.int64)[None, :] * stride_h + column * 16 + b_ranks[:, None],
                mask=b_mine[None, :] & (tl.load(p_piece + 3) >= 0),
                other=0.0,
                cache_modifier=".cg",
            )
            if WIDE:
                b_delta = tl.dot(b_b.to(tl.float32), b_h.to(tl.float32), input_precision="ieee")
            else:
                b_delta = tl.dot(b_b, b_h)
            if VECTORS:
                # A piece adds those of its projection's columns only: a tile may have columns of several.
                i_projection = tl.load(p_piece + 4)
                start, stop = columns_of(i_projection, N, column_1, column_2)
                b_added = (b_n >= start) & (b_n < stop) & (tl.load(p_piece + 7) > 0)
                p_vector = (slot * n_layers + layer).to(tl.int64) * N + b_n
                b_gain = tl.load(p_gain + p_vector, mask=b_added, other=1.0)
                b_bias = tl.load(p_bias + p_vector, mask=b_added, other=0.0)
                b_factor = tl.load(p_scale_at + p_token, mask=b_mine, other=0.0)
                b_delta += b_factor[None, :] * ((b_gain[:, None] - 1.0) * b_base + b_bias[:, None])
            # Not an addition of zero: a neighbour must not even turn -0.0 into 0.0.
            b_y = tl.where(b_mine[None, :], b_y + b_delta, b_y)
        b_b = b_next
    return b_y


@triton.jit(do_not_specialize=["layer", "stride_level"])
def shrink_kernel(
    p_x, p_a, p_scaling, p_places, p_scale_at, p_lists, p_counts, p_partial, p_tickets, p_h,
    stride_x, stride_h, stride_level, K, layer, n_layers, n_slots, n_pages,
    WORKERS: tl.constexpr, ROWS: tl.constexpr, SLOT_PAGES: tl.constexpr, SHARE: tl.constexpr, BK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """``shrink`` by itself. Grid (WORKERS,)."""
    shrink(
        tl.program_id(0), p_x, p_a, p_scaling, p_places, p_scale_at, p_lists + tl.load(p_counts + 5),
        tl.load(p_counts), p_partial, p_tickets, p_h, p_counts, stride_x, stride_h, stride_level, K,
        layer, n_layers, n_slots, n_pages, WORKERS, ROWS, SLOT_PAGES, SHARE, BK, False, WIDE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "column_1", "column_2", "layer", "stride_level"])
def expand_kernel(
    p_y, p_h, p_b, p_slot_at, p_scale_at, p_lists, p_counts,
    stride_y, stride_h, stride_level, M, N, column_1, column_2, layer, n_layers, n_pages,
    BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``expand`` by itself, on y ``[M, N]`` in memory. Grid (tiles of N, tiles of M).

    No vectors: the product without bias is not there any more.
    """
    i_n, i_m = tl.program_id(0) * BN, tl.program_id(1) * BM
    b_m, b_n = i_m + tl.arange(0, BM), i_n + tl.arange(0, BN)
    p_pieces = p_lists + tl.load(p_counts + 6)
    begin, end = pieces_of_tile(p_counts + 1, i_n, N, column_1, column_2, BN)
    if begin < end:
        b_b = load_b(begin, end, p_pieces, p_b, i_n, N, column_1, column_2, layer, n_layers, n_pages, BN)
        p_tile = p_y + b_m[None, :].to(tl.int64) * stride_y + b_n[:, None]
        b_mask = (b_m[None, :] < M) & (b_n[:, None] < N)
        b_y = tl.load(p_tile, mask=b_mask, other=0.0).to(tl.float32)
        b_y = expand(
            b_y, b_b, begin, end, i_m, i_n, p_h, p_b, p_slot_at, p_scale_at, p_pieces, p_counts, p_counts,
            stride_h, stride_level, M, N, column_1, column_2, layer, n_layers, n_pages, BM, BN, False, WIDE,
        )  # fmt: skip
        tl.store(p_tile, b_y.to(p_y.dtype.element_ty), mask=b_mask)
