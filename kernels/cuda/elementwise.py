"""What lies between the decoder's matrix products, in Triton: norms, rotary embedding, SwiGLU, embedding rows.

All compute in fp32 and round once, to the type of their output. Rows may be further apart than they are wide; the
elements of a row are adjacent. Every row is computed alone, so neighbours cannot change its bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from manylora.kernels.ops import PAGE_SIZE, AttentionShape

BLOCK = 1024
"""Columns of a program where columns do not depend on each other."""


@triton.jit
def norm_kernel(
    p_x,
    p_weight,
    p_out,
    stride_x,
    stride_out,
    epsilon,
    heads,
    D: tl.constexpr,
    DP: tl.constexpr,
    HEADS: tl.constexpr,
):
    """``out = x / sqrt(mean(x^2) + epsilon) * weight`` over each of HEADS runs of D elements of a row."""
    i_row = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1)
    b_head = i_head * HEADS + tl.arange(0, HEADS)
    b_d = tl.arange(0, DP)
    b_mask = (b_head < heads)[:, None] & (b_d < D)[None, :]
    b_column = b_head[:, None] * D + b_d[None, :]
    b_x = tl.load(p_x + i_row * stride_x + b_column, mask=b_mask, other=0.0).to(tl.float32)
    b_weight = tl.load(p_weight + b_d, mask=b_d < D, other=0.0)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + epsilon)
    b_out = b_x * b_scale[:, None] * b_weight[None, :]
    tl.store(p_out + i_row * stride_out + b_column, b_out.to(p_out.dtype.element_ty), mask=b_mask)


@triton.jit(do_not_specialize=["stride_table"])
def rope_store_kernel(
    p_qkv,
    p_cos,
    p_sin,
    p_positions,
    p_owners,
    p_tables,
    p_k,
    p_v,
    stride_qkv,
    stride_table,
    G: tl.constexpr,
    GP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HP: tl.constexpr,
    PAGE: tl.constexpr,
):
    """One token, one KV head: rotates its G query heads in place, writes its key, rotated, and its value."""
    i_token, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    owner = tl.load(p_owners + i_token)
    if owner < 0:
        return
    position = tl.load(p_positions + i_token)
    page = tl.load(p_tables + owner.to(tl.int64) * stride_table + position // PAGE).to(tl.int64)
    b_d = tl.arange(0, HP)
    b_half = b_d < HALF
    b_cos = tl.load(p_cos + position.to(tl.int64) * HALF + b_d, mask=b_half, other=0.0)
    b_sin = tl.load(p_sin + position.to(tl.int64) * HALF + b_d, mask=b_half, other=0.0)
    p_row = p_qkv + i_token * stride_qkv

    b_g = tl.arange(0, GP)
    b_mask = (b_g < G)[:, None] & b_half[None, :]
    p_q = p_row + ((i_head * G + b_g) * (2 * HALF))[:, None] + b_d[None, :]
    b_left = tl.load(p_q, mask=b_mask, other=0.0).to(tl.float32)
    b_right = tl.load(p_q + HALF, mask=b_mask, other=0.0).to(tl.float32)
    b_first = b_left * b_cos[None, :] - b_right * b_sin[None, :]
    b_second = b_right * b_cos[None, :] + b_left * b_sin[None, :]
    tl.store(p_q, b_first.to(p_qkv.dtype.element_ty), mask=b_mask)
    tl.store(p_q + HALF, b_second.to(p_qkv.dtype.element_ty), mask=b_mask)

    p_key = p_row + (KV_HEADS * G + i_head) * (2 * HALF) + b_d
    p_value = p_key + KV_HEADS * (2 * HALF)
    slot = ((page * KV_HEADS + i_head) * PAGE + position % PAGE) * (2 * HALF)
    b_left = tl.load(p_key, mask=b_half, other=0.0).to(tl.float32)
    b_right = tl.load(p_key + HALF, mask=b_half, other=0.0).to(tl.float32)
    tl.store(p_k + slot + b_d, (b_left * b_cos - b_right * b_sin).to(p_k.dtype.element_ty), mask=b_half)
    tl.store(p_k + slot + HALF + b_d, (b_right * b_cos + b_left * b_sin).to(p_k.dtype.element_ty), mask=b_half)
    tl.store(p_v + slot + b_d, tl.load(p_value, mask=b_half), mask=b_half)
    tl.store(p_v + slot + HALF + b_d, tl.load(p_value + HALF, mask=b_half), mask=b_half)


@triton.jit
def silu_mul_kernel(p_x, p_out, stride_x, stride_out, width, BLOCK: tl.constexpr):
    """``out = x / (1 + exp(-x)) * up`` of rows that hold ``[x, up]``."""
    i_row = tl.program_id(0).to(tl.int64)
    b_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_mask = b_column < width
    b_gate = tl.load(p_x + i_row * stride_x + b_column, mask=b_mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_x + i_row * stride_x + width + b_column, mask=b_mask, other=0.0).to(tl.float32)
    # Of the absolute value, as exp(-gate) would overflow: silu(-g) = -g e^-g / (1 + e^-g).
    b_small = tl.exp(-tl.abs(b_gate))
    b_out = b_gate * tl.where(b_gate < 0, b_small, 1.0) / (1.0 + b_small) * b_up
    tl.store(p_out + i_row * stride_out + b_column, b_out.to(p_out.dtype.element_ty), mask=b_mask)


@triton.jit
def embed_kernel(p_ids, p_rows, p_out, stride_rows, stride_out, width, BLOCK: tl.constexpr):
    """``out[i] = rows[ids[i]]``."""
    i_row = tl.program_id(0).to(tl.int64)
    row = tl.load(p_ids + i_row)
    b_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_mask = b_column < width
    b_row = tl.load(p_rows + row * stride_rows + b_column, mask=b_mask, other=0.0)
    tl.store(p_out + i_row * stride_out + b_column, b_row.to(p_out.dtype.element_ty), mask=b_mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` (Zhang and Sennrich 2019) of ``[rows, width]``; fp32 ``[width]``."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _norm(x, weight, epsilon, out)
    return out


def head_norm_(heads: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
    """``rms_norm`` in place of each head in ``[rows, n_heads * head_dim]``; ``weight`` is fp32 ``[head_dim]``."""
    _norm(heads, weight, epsilon, heads)


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, out: torch.Tensor) -> None:
    d = weight.numel()
    if x.shape[1] % d or weight.dtype != torch.float32:
        raise ValueError(
            f"expected rows of a multiple of {d} elements and an fp32 weight, got {x.shape} {weight.dtype}"
        )
    _rows_like(out, x.shape[0], x.shape[1])
    _rows_like(x, x.shape[0], x.shape[1])
    n_heads = x.shape[1] // d
    constexprs, num_warps = norm_launch(d, n_heads)
    norm_kernel[(x.shape[0], triton.cdiv(n_heads, constexprs["HEADS"]))](
        x, weight, out, x.stride(0), out.stride(0), epsilon, n_heads, **constexprs, num_warps=num_warps
    )


def norm_launch(d: int, n_heads: int) -> tuple[dict[str, Any], int]:
    """Constexprs and warps: heads enough for about 1024 elements a program, or one wide row."""
    padded = triton.next_power_of_2(d)
    heads = max(1, min(triton.next_power_of_2(n_heads), BLOCK // padded))
    return {"D": d, "DP": padded, "HEADS": heads}, min(8, max(1, padded * heads // 512))


def rope_store_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    owners: torch.Tensor,
    tables: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    shape: AttentionShape,
) -> None:
    """Rotate the queries in place, in the halves convention of transformers; write the keys, rotated, and the values
    into their pages. What else lies in ``qkv`` stays as it is.

    ``qkv`` ``[T, (n_heads + 2 n_kv_heads) * head_dim]``; ``cos`` and ``sin`` fp32 ``[positions, head_dim / 2]``; int32
    ``positions`` ``[T]``, ``owners`` ``[T]`` (each token's sequence; -1: a padding token, for which nothing is read or
    written) and ``tables`` ``[S, pages]``; ``cache``: see ``attention.cache_shape``.
    """
    tokens, half = qkv.shape[0], shape.head_dim // 2
    _rows_like(qkv, tokens, shape.q_size + 2 * shape.kv_size)
    for side in cache:
        expected = (side.shape[0], shape.n_kv_heads, PAGE_SIZE, shape.head_dim)
        if tuple(side.shape) != expected or not side.is_contiguous():
            raise ValueError(f"expected a contiguous cache of {expected}, got {tuple(side.shape)}")
    for table in (cos, sin):
        if table.shape[1] != half or table.dtype != torch.float32 or not table.is_contiguous():
            raise ValueError(f"expected contiguous fp32 rows of {half}, got {table.dtype} {tuple(table.shape)}")
    rope_store_kernel[(tokens, shape.n_kv_heads)](
        qkv, cos, sin, positions, owners, tables, cache[0], cache[1], qkv.stride(0), tables.stride(0),
        **rope_constexprs(shape), num_warps=1,
    )  # fmt: skip


def rope_constexprs(shape: AttentionShape) -> dict[str, Any]:
    group, half = shape.n_heads // shape.n_kv_heads, shape.head_dim // 2
    return {
        "G": group,
        "GP": triton.next_power_of_2(group),
        "KV_HEADS": shape.n_kv_heads,
        "HALF": half,
        "HP": triton.next_power_of_2(half),
        "PAGE": PAGE_SIZE,
    }


def silu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """``silu(gate) * up`` of ``[rows, 2 * width]``, gate first (SwiGLU, Shazeer 2020): ``[rows, width]``."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    _rows_like(gate_up, rows, 2 * width)
    _rows_like(out, rows, width)
    silu_mul_kernel[(rows, triton.cdiv(width, BLOCK))](
        gate_up, out, gate_up.stride(0), out.stride(0), width, BLOCK=BLOCK, num_warps=4
    )
    return out


def embed(ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of ``table`` ``[vocab, hidden]`` for int64 ids ``[T]``, in the type of ``out`` (of the table, without)."""
    rows, width = ids.numel(), table.shape[1]
    out = torch.empty(rows, width, dtype=table.dtype, device=table.device) if out is None else out
    _rows_like(table, table.shape[0], width)
    _rows_like(out, rows, width)
    embed_kernel[(rows, triton.cdiv(width, BLOCK))](
        ids, table, out, table.stride(0), out.stride(0), width, BLOCK=BLOCK, num_warps=4
    )
    return out


def _rows_like(tensor: torch.Tensor, rows: int, width: int) -> None:
    if tuple(tensor.shape) != (rows, width) or tensor.stride(1) != 1:
        raise ValueError(f"expected {rows} rows of {width} adjacent elements, got {tuple(tensor.shape)}")


def shipped_configurations() -> list[tuple[Any, dict[str, str], dict[str, Any], int, int, str]]:
    """See ``attention.shipped_configurations``, for what a launch finds to be multiples of 16 too."""
    found: list[tuple[Any, dict[str, str], dict[str, Any], int, int, str]] = []
    for dtype in ("bf16", "fp16"):
        launches: list[tuple[Any, dict[str, Any], int, str]] = [
            (silu_mul_kernel, {"BLOCK": BLOCK}, 4, ""),
            (embed_kernel, {"BLOCK": BLOCK}, 4, ""),
        ]
        for d, n_heads in ((2048, 1), (4096, 1), (8192, 1), (128, 32)):
            constexprs, num_warps = norm_launch(d, n_heads)
            launches.append((norm_kernel, constexprs, num_warps, f" {n_heads} x {d}"))
        for head_dim in (64, 128):
            for group in (4, 8):
                constexprs = rope_constexprs(AttentionShape(8 * group, 8, head_dim))
                launches.append((rope_store_kernel, constexprs, 1, f" head_dim {head_dim} G {group}"))
        for kernel, constexprs, num_warps, detail in launches:
            types = {
                name: _TYPES.get(name, f"*{dtype}" if name.startswith("p_") else "i32")
                for name in kernel.arg_names
                if name not in constexprs
            }
            found.append((kernel, types, constexprs, num_warps, 3, f"{kernel.__name__} {dtype}{detail}"))
    return found


_TYPES = {
    "p_weight": "*fp32",
    "p_cos": "*fp32",
    "p_sin": "*fp32",
    "p_positions": "*i32",
    "p_owners": "*i32",
    "p_tables": "*i32",
    "p_ids": "*i64",
    "epsilon": "fp32",
}
