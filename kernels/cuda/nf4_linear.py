"""The fused linear layer: ``y = x @ NF4(W).T`` with every row's own LoRA adapters in its epilogue, in one launch.

The first WORKERS programs shrink (``kernels.cuda.lora``); the others each stream a tile of W over a share of K and
keep a sum in registers. Whoever finishes a tile's last share adds the shares' planes in fixed order, waits until the
shrink is done (it is: it has a hundredth of the bytes), adds the expanded deltas, the bias and the residual, and
stores once. So an adapter costs its bytes, but no launch and no second pass over y.

The wait cannot deadlock as long as a GPU starts the programs of a grid in order, which all do: then every worker
runs, or has run, before the first program that waits, and workers wait for nobody. ``LORA=False`` is the same kernel
without all that, and gives the same bits for rows without an adapter.

W stands on the left of the product, so that its decoded values never leave registers; the tokens, padded to BM, on the
right. A scale is applied to the product of its 64 weights, not to each weight. The order of summation depends on the
shape of W alone, never on M: a row's bits are the same in any batch of up to the rows this kernel is used for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from manylora.kernels.cuda.decode import decode, nested_scale
from manylora.kernels.cuda.lora import expand, load_b, pieces_of_tile, shrink


@triton.jit(
    do_not_specialize=["M", "column_1", "column_2", "layer", "stride_level"], do_not_specialize_on_alignment=["p_done"]
)
def nf4_linear_kernel(
    p_y, p_x, p_words, p_scales, p_code, p_outer, p_first, p_offset, p_values, p_bias, p_add, p_planes, p_tickets,
    p_a, p_b, p_scaling, p_gain, p_adapter_bias,
    p_places, p_slot_at, p_scale_at, p_lists, p_counts, p_partial, p_entry_tickets, p_h, p_done,
    M, N, K, stride_x, stride_y, stride_add, stride_h, stride_level, column_1, column_2,
    layer, n_layers, n_slots, n_pages,
    BM: tl.constexpr, BN: tl.constexpr, NB: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
    NESTED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, LORA: tl.constexpr, WORKERS: tl.constexpr,
    ROWS: tl.constexpr, SLOT_PAGES: tl.constexpr, SHARE: tl.constexpr, BK: tl.constexpr,
    VECTORS: tl.constexpr, FAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (WORKERS + tiles of N * SPLITS * tiles of M,). ``p_counts``: the site's counts, see ``routing``.

    ``EVEN``: K is a multiple of 64 NB, so the loop needs no masks and NB scales share their outer one. ``p_tickets``
    and ``p_entry_tickets`` are zero before and after; ``p_done`` is a counter of this launch's own, zero before.
    """
    if LORA and tl.program_id(0) < WORKERS:
        shrink(
            tl.program_id(0), p_x, p_a, p_scaling, p_places, p_scale_at, p_lists + tl.load(p_counts + 5),
            tl.load(p_counts), p_partial, p_entry_tickets, p_h, p_done, stride_x, stride_h, stride_level, K,
            layer, n_layers, n_slots, n_pages, WORKERS, ROWS, SLOT_PAGES, SHARE, BK, True, WIDE,
        )  # fmt: skip
    else:
        # Tiles of M are next to each other, so that they share a tile of W in the cache.
        i_program = tl.program_id(0) - WORKERS
        m_tiles = tl.cdiv(M, BM)
        i_m = i_program % m_tiles * BM
        i_split = i_program // m_tiles % SPLITS
        i_tile = i_program // m_tiles // SPLITS
        i_n = i_tile * BN
        # Rows beyond the end read the last one: no masks, and what they give is not stored.
        b_n = tl.minimum(i_n + tl.arange(0, BN), N - 1)
        b_m = tl.minimum(i_m + tl.arange(0, BM), M - 1)
        n_blocks = K // 64
        share = tl.cdiv(tl.cdiv(n_blocks, 4), SPLITS) * 4  # the same for every NB: it decides the order of summation
        begin = i_split * share
        end = tl.minimum(begin + share, n_blocks)
        b_k = tl.arange(0, 64)
        p_w = p_words + b_n[:, None] * (K // 8) + begin * 8 + tl.arange(0, 8)[None, :]
        p_in = p_x + b_m[:, None] * stride_x + begin * 64 + b_k[None, :]
        p_scale = p_scales + b_n * n_blocks + begin
        if NESTED:
            b_first = tl.load(p_first + b_n)
            b_offset = tl.load(p_offset + b_n)
        if LORA:
            # What the epilogue needs first is asked for now, so that its latency passes while W streams.
            n_entries = tl.load(p_counts)
            p_pieces = p_lists + tl.load(p_counts + 6)
            piece, last_piece = pieces_of_tile(p_counts + 1, i_n, N, column_1, column_2, BN)
            b_b = load_b(piece, last_piece, p_pieces, p_b, i_n, N, column_1, column_2, layer, n_layers, n_pages, BN)
        b_y = tl.zeros((BN, BM), dtype=tl.float32)
        for i_block in range(begin, end, NB):
            if NESTED and EVEN:
                b_outer = tl.load(p_outer + ((b_first + i_block) >> 8))
            for j in tl.static_range(NB):
                if EVEN:
                    b_words = tl.load(p_w + j * 8)
                    b_x = tl.load(p_in + j * 64)
                    b_scale = tl.load(p_scale + j)
                else:
                    inside = i_block + j < end
                    b_words = tl.load(p_w + j * 8, mask=inside, other=0)
                    b_x = tl.load(p_in + j * 64, mask=inside, other=0.0)
                    b_scale = tl.load(p_scale + j, mask=inside, other=0)
                    if NESTED:
                        b_outer = tl.load(p_outer + ((b_first + i_block + j) >> 8), mask=inside, other=0.0)
                if NESTED:
                    b_scale = nested_scale(b_scale, b_outer, b_offset, p_code, FAST)
                b_w = decode(b_words, p_values, BN, p_x.dtype.element_ty, FAST)
                if WIDE:
                    b_product = tl.dot(b_w.to(tl.float32), tl.trans(b_x).to(tl.float32), input_precision="ieee")
                else:
                    b_product = tl.dot(b_w, tl.trans(b_x))
                b_y += b_product * b_scale[:, None]
            p_w += NB * 8
            p_in += NB * 64
            p_scale += NB

        finished = SPLITS == 1
        if SPLITS > 1:
            i_ticket = i_tile * m_tiles + i_m // BM
            p_plane = p_planes + (i_ticket * SPLITS).to(tl.int64) * (BN * BM)
            b_place = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
            tl.store(p_plane + i_split * (BN * BM) + b_place, b_y)
            tl.debug_barrier()
            finished = tl.atomic_add(p_tickets + i_ticket, 1, sem="acq_rel") == SPLITS - 1
            if finished:
                tl.debug_barrier()
                tl.store(p_tickets + i_ticket, 0)  # for the next launch
                b_y = tl.zeros((BN, BM), dtype=tl.float32)
                for i in tl.range(0, SPLITS, loop_unroll_factor=4, num_stages=1):
                    b_y += tl.load(p_plane + i * (BN * BM) + b_place, cache_modifier=".cg")
        if finished:
            if LORA:  # two conditions: this one is decided when compiling  # noqa: SIM102
                if piece < last_piece:
                    # An atomic, because its result is one value for the whole program (a load could see the counter
                    # change between two warps, which would then part ways before a barrier), and to order what follows.
                    n_done = tl.atomic_add(p_done, 0, sem="acquire")
                    while n_done < n_entries:
                        n_done = tl.atomic_add(p_done, 0, sem="acquire")
                    tl.debug_barrier()
                    b_y = expand(
                        b_y, b_b, piece, last_piece, i_m, i_n, p_h, p_b, p_slot_at, p_scale_at, p_pieces,
                        p_gain, p_adapter_bias, stride_h, stride_level, M, N, column_1, column_2,
                        layer, n_layers, n_pages, BM, BN, VECTORS, WIDE,
                    )  # fmt: skip
            b_columns = i_n + tl.arange(0, BN)
            b_tokens = i_m + tl.arange(0, BM)
            b_mask = (b_columns[:, None] < N) & (b_tokens[None, :] < M)
            if BIAS:
                b_y += tl.load(p_bias + b_n).to(tl.float32)[:, None]
            b_rows = b_tokens[None, :].to(tl.int64)
            if ADD:
                p_old = p_add + b_rows * stride_add + b_columns[:, None]
                b_y += tl.load(p_old, mask=b_mask, other=0.0).to(tl.float32)
            tl.store(p_y + b_rows * stride_y + b_columns[:, None], b_y.to(p_y.dtype.element_ty), mask=b_mask)


@triton.jit
def dequantize_kernel(
    p_out, p_words, p_scales, p_code, p_outer, p_first, p_offset, p_values, N, K,
    BN: tl.constexpr, NESTED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """W ``[N, K]`` in p_out's type, ``value * scale`` rounded once. Grid (tiles of N, K / 64)."""
    b_n = tl.program_id(0) * BN + tl.arange(0, BN)
    i_block = tl.program_id(1)
    b_inside = b_n < N
    b_words = tl.load(
        p_words + b_n[:, None].to(tl.int64) * (K // 8) + i_block * 8 + tl.arange(0, 8)[None, :],
        mask=b_inside[:, None],
        other=0,
    )
    b_scale = tl.load(p_scales + b_n.to(tl.int64) * (K // 64) + i_block, mask=b_inside, other=0)
    if NESTED:
        b_outer = tl.load(p_outer + ((tl.load(p_first + b_n, mask=b_inside, other=0) + i_block) >> 8))
        b_offset = tl.load(p_offset + b_n, mask=b_inside, other=0.0)
        b_scale = nested_scale(b_scale, b_outer, b_offset, p_code, FAST)
    b_w = decode(b_words, p_values, BN, p_out.dtype.element_ty, FAST).to(tl.float32) * b_scale[:, None]
    p_tile = p_out + b_n[:, None].to(tl.int64) * K + i_block * 64 + tl.arange(0, 64)[None, :]
    tl.store(p_tile, b_w.to(p_out.dtype.element_ty), mask=b_inside[:, None])
