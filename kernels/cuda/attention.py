"""Paged causal attention in Triton: one tile loop (``attend``), under a decode kernel and a prefill kernel.

Semantics, for a query at position i of its sequence and head h, with KV head ``h // G`` (``G = n_heads / n_kv_heads``):
``out = softmax_j(q . k_j / sqrt(head_dim)) @ v_j`` over the positions ``j <= i`` (with a ``window``, only those of
``i - window < j``). Keys and values lie in pages ``[pages, kv_heads, 16, head_dim]``. The softmax is the online one
(Milakov and Gimelshein 2018; FlashAttention-2, Dao 2023) in fp32, with powers of two.

- **decode**, grid (rows, kv heads, SPLITS): a program handles one row's G query heads over one share of its context.
  Shares depend on that row's context alone, so neighbours cannot change its bits. The last share to finish merges.
- **prefill**, grid (blocks, kv heads): a program handles QT tokens of one sequence over all they see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from manylora.kernels.ops import PAGE_SIZE, AttentionShape, PagedSequences

SPLITS = 8
"""Shares of a decoding row's context, at most: few rows would otherwise leave most of a GPU idle."""
BLOCK_ROWS = 64
"""Rows of a prefill block (query heads of a group x tokens) aimed at: what one warp group's matrix unit takes."""
PLANE_PAD = 4
"""Floats behind each partial result: its maximum, its sum, and two to keep the rows 16-byte aligned."""

LOG2E = tl.constexpr(1.4426950408889634)
# The maximum of nothing: finite, as -inf minus -inf would be NaN; below any score that finite 16-bit inputs give.
LEAST = tl.constexpr(-1.0e30)


@triton.jit
def attend(
    b_q,
    b_at,
    p_k,
    p_v,
    p_table,
    low,
    first,
    last,
    KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BKV: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Attend from rows at positions ``b_at`` to tiles from ``first`` up to ``last``; nothing below ``low`` is read.

    Returns unnormalised output ``[ROWS, DP]``, the maximum of the scores in units of log 2, and the sum.
    """
    b_d = tl.arange(0, DP)
    b_acc = tl.zeros((ROWS, DP), dtype=tl.float32)
    b_max = tl.full((ROWS,), LEAST, dtype=tl.float32)
    b_sum = tl.zeros((ROWS,), dtype=tl.float32)
    for tile in range(first, last, BKV):
        b_j = tile + tl.arange(0, BKV)
        # What is not held may be another sequence's page or NaN, and 0 * NaN would reach the output: never load it.
        b_held = (b_j >= low) & (b_j < last)
        b_page = tl.load(p_table + b_j // PAGE, mask=b_held, other=0).to(tl.int64)
        b_offset = (b_page * (KV_HEADS * PAGE * D) + (b_j % PAGE) * D)[:, None] + b_d[None, :]
        b_mask = b_held[:, None] & (b_d < D)[None, :]
        b_k = tl.load(p_k + b_offset, mask=b_mask, other=0.0)
        if WIDE:
            b_s = tl.dot(b_q.to(tl.float32), tl.trans(b_k.to(tl.float32)), input_precision="ieee")
        else:
            b_s = tl.dot(b_q, tl.trans(b_k))
        b_seen = b_held[None, :] & (b_j[None, :] <= b_at[:, None])
        if WINDOW > 0:
            b_seen &= b_j[None, :] > b_at[:, None] - WINDOW
        b_s = tl.where(b_seen, b_s * (D**-0.5 * LOG2E), float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_shrink = tl.exp2(b_max - b_new)
        b_p = tl.exp2(b_s - b_new[:, None])
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_acc = b_acc * b_shrink[:, None]
        b_max = b_new
        b_v = tl.load(p_v + b_offset, mask=b_mask, other=0.0)
        if WIDE:
            b_acc += tl.dot(b_p, b_v.to(tl.float32), input_precision="ieee")
        else:
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, acc=b_acc)
    return b_acc, b_max, b_sum


@triton.jit
def store_normalised(p_out, b_offset, b_mask, b_acc, b_sum):
    """``acc / sum``; zeros for a row that saw nothing."""
    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    tl.store(p_out + b_offset, b_out.to(p_out.dtype.element_ty), mask=b_mask)


@triton.jit(do_not_specialize=["stride_table"])
def decode_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_contexts,
    p_tables,
    p_planes,
    p_semaphores,
    stride_q,
    stride_out,
    stride_table,
    G: tl.constexpr,
    KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BKV: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    PLANE: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The newest token of each row: ``out[row, heads of i_head]``."""
    i_row, i_head, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(p_contexts + i_row)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(context - WINDOW, 0)
    start = low // BKV * BKV
    share = tl.maximum(tl.cdiv(tl.cdiv(context - start, BKV), SPLITS), 1) * BKV
    # A context of 0 (a padding row) keeps one share, over nothing: it stores the zeros.
    shares = tl.maximum(tl.cdiv(context - start, share), 1)
    if i_split >= shares:
        return
    b_g = tl.arange(0, ROWS)
    b_d = tl.arange(0, DP)
    b_mask = (b_g < G)[:, None] & (b_d < D)[None, :]
    b_head = ((i_head * G + b_g) * D)[:, None] + b_d[None, :]
    b_q = tl.load(p_q + i_row.to(tl.int64) * stride_q + b_head, mask=b_mask, other=0.0)
    b_at = tl.full((ROWS,), 0, dtype=tl.int32) + (context - 1)
    first = start + i_split * share
    last = tl.minimum(first + share, context)
    b_acc, b_max, b_sum = attend(
        b_q, b_at, p_k + i_head * (PAGE * D), p_v + i_head * (PAGE * D), p_tables + i_row.to(tl.int64) * stride_table,
        low, first, last, KV_HEADS, ROWS, D, DP, BKV, PAGE, WINDOW, WIDE,
    )  # fmt: skip
    p_row = p_out + i_row.to(tl.int64) * stride_out
    if shares == 1:
        store_normalised(p_row, b_head, b_mask, b_acc, b_sum)
    else:
        unit = i_row * KV_HEADS + i_head
        p_unit = p_planes + unit.to(tl.int64) * (SPLITS * G * PLANE)
        b_plane = (b_g * PLANE)[:, None] + b_d[None, :]
        p_own = p_unit + i_split * (G * PLANE)
        tl.store(p_own + b_plane, b_acc, mask=b_mask)
        tl.store(p_own + b_g * PLANE + D, b_max, mask=b_g < G)
        tl.store(p_own + b_g * PLANE + D + 1, b_sum, mask=b_g < G)
        # Every thread's stores come before the one thread's release; whoever arrives last has acquired all of them.
        tl.debug_barrier()
        arrived = tl.atomic_add(p_semaphores + unit, 1, sem="acq_rel")
        if arrived == shares - 1:
            tl.store(p_semaphores + unit, 0)  # as the next launch wants it
            b_max = tl.full((ROWS,), LEAST, dtype=tl.float32)
            for i in range(shares):
                p_part = p_unit + i * (G * PLANE) + b_g * PLANE + D
                b_max = tl.maximum(b_max, tl.load(p_part, mask=b_g < G, other=LEAST, cache_modifier=".cg"))
            b_acc = tl.zeros((ROWS, DP), dtype=tl.float32)
            b_sum = tl.zeros((ROWS,), dtype=tl.float32)
            for i in range(shares):
                p_part = p_unit + i * (G * PLANE)
                b_top = tl.load(p_part + b_g * PLANE + D, mask=b_g < G, other=LEAST, cache_modifier=".cg")
                b_one = tl.load(p_part + b_g * PLANE + D + 1, mask=b_g < G, other=0.0, cache_modifier=".cg")
                b_weight = tl.exp2(b_top - b_max)
                b_sum += b_weight * b_one
                b_acc += b_weight[:, None] * tl.load(p_part + b_plane, mask=b_mask, other=0.0, cache_modifier=".cg")
            store_normalised(p_row, b_head, b_mask, b_acc, b_sum)


@triton.jit(do_not_specialize=["stride_table"])
def prefill_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_starts,
    p_contexts,
    p_tables,
    p_block_seq,
    p_block_first,
    stride_q,
    stride_out,
    stride_table,
    G: tl.constexpr,
    KV_HEADS: tl.constexpr,
    QT: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BKV: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Up to QT new tokens of one sequence: row r of the block is query head ``r % G`` of token ``r // G``."""
    i_block, i_head = tl.program_id(0), tl.program_id(1)
    seq = tl.load(p_block_seq + i_block)
    token = tl.load(p_block_first + i_block)
    end = tl.load(p_starts + seq + 1)
    # The last new token stands at position context - 1, so a token's position is its index plus this.
    shift = tl.load(p_contexts + seq) - end
    b_row = tl.arange(0, ROWS)
    b_d = tl.arange(0, DP)
    b_token = token + b_row // G
    b_live = (b_row < QT * G) & (b_token < end)
    b_mask = b_live[:, None] & (b_d < D)[None, :]
    b_head = ((i_head * G + b_row % G) * D)[:, None] + b_d[None, :]
    b_q = tl.load(p_q + b_token.to(tl.int64)[:, None] * stride_q + b_head, mask=b_mask, other=0.0)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(token + shift - WINDOW + 1, 0)
    last = tl.minimum(token + QT, end) + shift
    b_acc, _, b_sum = attend(
        b_q, b_token + shift, p_k + i_head * (PAGE * D), p_v + i_head * (PAGE * D),
        p_tables + seq.to(tl.int64) * stride_table,
        low, low // BKV * BKV, last, KV_HEADS, ROWS, D, DP, BKV, PAGE, WINDOW, WIDE,
    )  # fmt: skip
    store_normalised(p_out, b_token.to(tl.int64)[:, None] * stride_out + b_head, b_mask, b_acc, b_sum)


@dataclass(frozen=True)
class Launch:
    """How a kernel is compiled for one shape."""

    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        if self.constexprs["D"] % 16 or self.constexprs["D"] > 256:
            raise ValueError(f"expected a head_dim that is a multiple of 16 up to 256, got {self.constexprs['D']}")


def _launch(shape: AttentionShape, qt: int, wide: bool) -> Launch:
    group, padded = shape.n_heads // shape.n_kv_heads, triton.next_power_of_2(shape.head_dim)
    constexprs = {
        "G": group,
        "KV_HEADS": shape.n_kv_heads,
        "ROWS": max(16, triton.next_power_of_2(qt * group)),  # 16: the fewest rows of a matrix product
        "D": shape.head_dim,
        "DP": padded,
        "BKV": tile_positions(shape),
        "PAGE": PAGE_SIZE,
        "WINDOW": shape.window,
        "WIDE": wide,
    }
    num_warps = 8 if padded > 128 else 4
    # Three stages: page numbers are fetched two tiles ahead, keys and values one. fp32 tiles are twice as large.
    return Launch(constexprs, num_warps, 1 if wide else 3)


def tile_positions(shape: AttentionShape) -> int:
    """BKV: positions of a tile, four pages or two. With four, 256-wide heads take more shared memory than sm_86 has,
    and heads that are no power of two (which need their masks) spill registers on sm_80."""
    return 64 if shape.head_dim in (16, 32, 64, 128) else 32


def decode_launch(shape: AttentionShape, wide: bool) -> Launch:
    launch = _launch(shape, 1, wide)
    constexprs = {**launch.constexprs, "SPLITS": SPLITS, "PLANE": shape.head_dim + PLANE_PAD}
    return Launch(constexprs, launch.num_warps, launch.num_stages)


def prefill_launch(shape: AttentionShape, wide: bool) -> Launch:
    qt = query_tokens(shape)
    launch = _launch(shape, qt, wide)
    return Launch({**launch.constexprs, "QT": qt}, launch.num_warps, launch.num_stages)


def query_tokens(shape: AttentionShape) -> int:
    """QT: new tokens of a prefill block."""
    return max(1, BLOCK_ROWS // (shape.n_heads // shape.n_kv_heads))


def query_blocks(starts: list[int], qt: int) -> tuple[list[int], list[int]]:
    """Cut the new tokens of a step into blocks of at most ``qt``, none of which spans two sequences.

    ``starts`` is ``PagedSequences.starts``. Returns each block's sequence and the index of its first token among the
    step's tokens, to be put into int32 tensors for ``prefill_attention``.
    """
    blocks = [
        (s, first) for s in range(len(starts) - 1) for first in range(starts[s], starts[s + 1], qt)
    ]  # an empty sequence has none
    return [s for s, _ in blocks], [first for _, first in blocks]


def cache_shape(n_pages: int, shape: AttentionShape) -> tuple[int, int, int, int]:
    """Of the keys, and of the values, of one layer."""
    return n_pages, shape.n_kv_heads, PAGE_SIZE, shape.head_dim


def planes_shape(rows: int, shape: AttentionShape) -> tuple[int, int, int, int]:
    """Of the fp32 scratch of ``decode_attention`` for up to ``rows`` rows; it needs no initial value."""
    return rows, SPLITS, shape.n_heads, shape.head_dim + PLANE_PAD


def semaphores_shape(rows: int, shape: AttentionShape) -> tuple[int, int]:
    """Of the int32 semaphores of ``decode_attention``; zero at first, and zero again after every launch."""
    return rows, shape.n_kv_heads


def decode_attention(
    q: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    contexts: torch.Tensor,
    tables: torch.Tensor,
    shape: AttentionShape,
    *,
    out: torch.Tensor,
    planes: torch.Tensor,
    semaphores: torch.Tensor,
) -> torch.Tensor:
    """One new token a row, its key and value already in the cache. Returns ``out``; can be captured in a CUDA graph.

    ``q`` and ``out`` ``[rows, n_heads * head_dim]`` of the cache's dtype (a column slice will do), ``cache`` two
    tensors of ``cache_shape``, ``contexts`` int32 ``[rows]`` (length with the new token; 0: a padding row, which reads
    no page and becomes zeros), ``tables`` int32 ``[rows, pages]``. ``planes`` and ``semaphores`` as the functions of
    those names say; launches that may overlap must not share them. A row's result depends on that row alone.
    """
    rows = q.shape[0]
    _check(q, out, cache, shape)
    if planes.numel() < rows * SPLITS * shape.n_heads * (shape.head_dim + PLANE_PAD) or planes.dtype != torch.float32:
        raise ValueError(f"expected fp32 planes of {planes_shape(rows, shape)}, got {planes.dtype} {planes.shape}")
    if semaphores.numel() < rows * shape.n_kv_heads or semaphores.dtype != torch.int32:
        raise ValueError(f"expected int32 semaphores of {semaphores_shape(rows, shape)}, got {semaphores.shape}")
    if not (planes.is_contiguous() and semaphores.is_contiguous()):
        raise ValueError("expected contiguous planes and semaphores")
    launch = decode_launch(shape, _wide(q))
    decode_kernel[(rows, shape.n_kv_heads, SPLITS)](
        q, cache[0], cache[1], out, contexts, tables, planes, semaphores, q.stride(0), out.stride(0), tables.stride(0),
        **launch.constexprs, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return out


def prefill_attention(
    q: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    sequences: PagedSequences,
    blocks: tuple[torch.Tensor, torch.Tensor],
    shape: AttentionShape,
    out: torch.Tensor,
) -> torch.Tensor:
    """Any number of new tokens a sequence, their keys and values already in the cache. Returns ``out``.

    ``q``, ``out`` and ``cache`` as in ``decode_attention``; ``blocks``: what ``query_blocks`` returns for
    ``query_tokens(shape)``, as two int32 tensors. Tokens of sequences that no block names are left as they are.
    """
    _check(q, out, cache, shape)
    n_blocks = blocks[0].numel()
    if n_blocks:
        launch = prefill_launch(shape, _wide(q))
        prefill_kernel[(n_blocks, shape.n_kv_heads)](
            q, cache[0], cache[1], out, sequences.starts, sequences.contexts, sequences.tables, *blocks,
            q.stride(0), out.stride(0), sequences.tables.stride(0),
            **launch.constexprs, num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return out


def _wide(q: torch.Tensor) -> bool:
    # The interpreter's dot multiplies raw bit patterns of 16-bit types (kernels-lab); fp32 operands are exact.
    return q.dtype == torch.float32 or q.device.type == "cpu"


def _check(q: torch.Tensor, out: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], shape: AttentionShape) -> None:
    expected = cache_shape(cache[0].shape[0], shape)
    for tensor in cache:
        if tuple(tensor.shape) != expected or tensor.dtype != q.dtype or not tensor.is_contiguous():
            raise ValueError(f"expected a contiguous {q.dtype} cache of {expected}, got {tensor.dtype} {tensor.shape}")
    for tensor in (q, out):
        if tensor.dim() != 2 or tensor.shape[1] != shape.q_size or tensor.stride(1) != 1:
            raise ValueError(f"expected rows of {shape.q_size} adjacent elements, got {tensor.shape}")


def shipped_configurations() -> list[tuple[Any, dict[str, str], dict[str, Any], int, int, str]]:
    """``(kernel, types of the arguments that are no constexprs, constexprs, num_warps, num_stages, label)``.

    A launch also finds that all ``p_*``, ``width`` and all ``stride_*`` but ``stride_table`` are multiples of 16, and
    tells the compiler (``tt.divisibility``); compiled ahead of time without, loads are neither wide nor asynchronous.
    """
    found = []
    for dtype in ("bf16", "fp16"):
        for head_dim in (64, 128):
            for group in (1, 4, 8):
                shape = AttentionShape(8 * group, 8, head_dim)
                for kernel, launch in (
                    (decode_kernel, decode_launch(shape, False)),
                    (prefill_kernel, prefill_launch(shape, False)),
                ):
                    types = {
                        name: _TYPES.get(name, f"*{dtype}" if name.startswith("p_") else "i32")
                        for name in kernel.arg_names
                        if name not in launch.constexprs
                    }
                    label = f"{kernel.__name__} {dtype} head_dim {head_dim} G {group}"
                    found.append((kernel, types, launch.constexprs, launch.num_warps, launch.num_stages, label))
    return found


_TYPES = {
    "p_starts": "*i32",
    "p_contexts": "*i32",
    "p_tables": "*i32",
    "p_block_seq": "*i32",
    "p_block_first": "*i32",
    "p_semaphores": "*i32",
    "p_planes": "*fp32",
}
