"""The batched LoRA op in Triton: a deterministic shrink and an expand over 16-rank pages.

- **shrink**, grid (row blocks, pages, splits): each program multiplies up to ``BM`` rows of a segment by one page of A
  over one share of K and stores fp32 into its own plane ``h[split, projection, pair, rank]``. No atomics.
- **expand**, grid (row blocks, column blocks): sums the planes in fixed order, multiplies by ``scale * scaling`` and by
  the pages of B, and adds to ``y`` once.

A row block never spans two segments: the CPU cuts segments into blocks when the step is scheduled. Both kernels run
under ``TRITON_INTERPRET=1`` and compile ahead of time for sm_80 and sm_90.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.sites import RANK_PAGE, SITES

BM = 16
"""Rows of a block: the smallest that the matrix units take."""
BK = 64
BN = 64
SPLITS = 4
"""Shares of K in the shrink: its few row blocks would otherwise leave most of a GPU idle."""


@triton.jit
def shrink_kernel(
    p_x,
    p_a,
    p_h,
    p_rows,
    p_block_slot,
    p_block_first,
    p_block_last,
    p_table,
    p_ranks,
    stride_x,
    stride_page,
    stride_table,
    stride_ranks,
    stride_split,
    stride_pair,
    K,
    BM: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``h[split, i, 16 page : 16 page + 16] = x[rows[i], share of K] @ A[page]`` for the pairs i of one block."""
    i_block, i_page, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(p_block_slot + i_block)
    rank = tl.load(p_ranks + slot * stride_ranks)
    if i_page * 16 >= rank:
        return
    page = tl.load(p_table + slot * stride_table + i_page).to(tl.int64)
    pairs = tl.load(p_block_first + i_block) + tl.arange(0, BM)
    live = pairs < tl.load(p_block_last + i_block)
    rows = tl.load(p_rows + pairs, mask=live, other=0).to(tl.int64)
    ranks = tl.arange(0, 16)
    b_h = tl.zeros((BM, 16), dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK
    first = i_split * share
    for k in range(first, tl.minimum(first + share, K), BK):
        ks = k + tl.arange(0, BK)
        b_x = tl.load(p_x + rows[:, None] * stride_x + ks[None, :], mask=live[:, None] & (ks[None, :] < K), other=0.0)
        b_a = tl.load(p_a + page * stride_page + ks[:, None] * 16 + ranks[None, :], mask=ks[:, None] < K, other=0.0)
        if WIDE:
            b_h += tl.dot(b_x.to(tl.float32), b_a.to(tl.float32), input_precision="ieee")
        else:
            b_h += tl.dot(b_x, b_a.to(b_x.dtype))
    target = p_h + i_split * stride_split + pairs[:, None].to(tl.int64) * stride_pair + i_page * 16 + ranks[None, :]
    tl.store(target, b_h, mask=live[:, None])


@triton.jit
def expand_kernel(
    p_y,
    p_b,
    p_h,
    p_rows,
    p_scales,
    p_block_slot,
    p_block_first,
    p_block_last,
    p_table,
    p_ranks,
    p_scaling,
    stride_y,
    stride_page,
    stride_table,
    stride_ranks,
    stride_split,
    stride_pair,
    N,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``y[rows[i], columns] += scale[i] * scaling * (sum of the planes h)[i] @ B`` for the pairs i of one block."""
    i_block, i_columns = tl.program_id(0), tl.program_id(1)
    slot = tl.load(p_block_slot + i_block)
    rank = tl.load(p_ranks + slot * stride_ranks)
    if rank == 0:
        return
    pairs = tl.load(p_block_first + i_block) + tl.arange(0, BM)
    live = pairs < tl.load(p_block_last + i_block)
    rows = tl.load(p_rows + pairs, mask=live, other=0).to(tl.int64)
    columns = i_columns * BN + tl.arange(0, BN)
    inside = columns < N
    b_y = tl.zeros((BM, BN), dtype=tl.float32)
    for i_page in range(tl.cdiv(rank, 16)):
        page = tl.load(p_table + slot * stride_table + i_page).to(tl.int64)
        ranks = i_page * 16 + tl.arange(0, 16)
        held = ranks < rank
        b_h = tl.zeros((BM, 16), dtype=tl.float32)
        for i_split in tl.static_range(SPLITS):
            plane = p_h + i_split * stride_split + pairs[:, None].to(tl.int64) * stride_pair + ranks[None, :]
            b_h += tl.load(plane, mask=live[:, None] & held[None, :], other=0.0)
        p_page = p_b + page * stride_page + (ranks[:, None] - i_page * 16) * N + columns[None, :]
        b_b = tl.load(p_page, mask=held[:, None] & inside[None, :], other=0.0)
        if WIDE:
            b_y += tl.dot(b_h, b_b.to(tl.float32), input_precision="ieee")
        else:
            b_y += tl.dot(b_h.to(b_b.dtype), b_b)
    factor = tl.load(p_scales + pairs, mask=live, other=0.0) * tl.load(p_scaling + slot * stride_ranks)
    target = p_y + rows[:, None] * stride_y + columns[None, :]
    mask = live[:, None] & inside[None, :]
    b_y = tl.load(target, mask=mask, other=0.0).to(tl.float32) + b_y * factor[:, None]
    tl.store(target, b_y.to(p_y.dtype.element_ty), mask=mask)


class TritonLora:
    """Launches the pair for every projection of a site. Rows that have several adapters are added up one adapter after
    the other: their blocks go into separate launches, so that no two programs write one row."""

    def __init__(self, pool: LoraPool) -> None:
        self._pool = pool
        self._pages = pool.page_table["q"].shape[1]
        # The interpreter's dot multiplies raw bit patterns of 16-bit types (kernels-lab); fp32 operands are exact.
        self._wide = pool.dtype == torch.float32 or pool.device.type == "cpu"

    def add_(self, y: torch.Tensor, x: torch.Tensor, segments: LoraSegments, site: str, layer: int) -> None:
        """See ``kernels.lora.BatchedLora.add_``."""
        rows, scales = segments.rows, segments.scales
        pool, pairs, width = self._pool, rows.numel(), self._pages * RANK_PAGE
        h = torch.empty((SPLITS, pairs, width), dtype=torch.float32, device=x.device)
        columns = pool.shapes.site_offsets(site)
        for blocks in _row_blocks(segments):
            for j, projection in enumerate(SITES[site]):
                a, b = pool.a[projection][:, layer], pool.b[projection][:, layer]
                ranks, scaling = pool.ranks[projection][:, layer], pool.scaling[projection][:, layer]
                table, k, n = pool.page_table[projection], a.shape[1], b.shape[2]
                n_blocks = blocks[0].numel()
                shrink_kernel[(n_blocks, self._pages, SPLITS)](
                    x, a, h, rows, *blocks, table, ranks, x.stride(0), a.stride(0), table.stride(0), ranks.stride(0),
                    h.stride(0), h.stride(1), k, BM=BM, BK=BK, SPLITS=SPLITS, WIDE=self._wide,
                )  # fmt: skip
                expand_kernel[(n_blocks, triton.cdiv(n, BN))](
                    y[:, columns[j] :], b, h, rows, scales, *blocks, table, ranks, scaling, y.stride(0), b.stride(0),
                    table.stride(0), ranks.stride(0), h.stride(0), h.stride(1), n,
                    BM=BM, BN=BN, SPLITS=SPLITS, WIDE=self._wide,
                )  # fmt: skip


def _row_blocks(segments: LoraSegments) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Blocks (slot, first pair, last pair) of at most BM pairs, one list for each launch.

    Segments go into one launch as long as they share no row with each other.
    """
    bounds, members, launches = segments.offsets.tolist(), segments.rows.tolist(), []
    taken: set[int] = set()
    current: list[tuple[int, int, int]] = []
    for s, slot in enumerate(segments.slot_list):
        first, last = bounds[s], bounds[s + 1]
        own = set(members[first:last])
        if taken & own:
            launches.append(current)
            current, taken = [], set()
        taken |= own
        current += [(slot, i, min(i + BM, last)) for i in range(first, last, BM)]
    launches.append(current)
    return [
        tuple(
            torch.tensor(column, dtype=torch.int32, device=segments.rows.device) for column in zip(*blocks, strict=True)
        )  # type: ignore[misc]
        for blocks in launches
        if blocks
    ]
