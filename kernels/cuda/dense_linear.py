"""``x @ W.T`` with a 16-bit W, for lm_head and merged weights: fp32 out, and the same bits for a row whatever the
number of rows.

A library's product would do but for that: it picks another kernel, with another order of summation, for another
number of rows, and so would let a neighbour in the batch change a logit's last bits.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl

BN, BK = 128, 64
_NARROW, _WIDE_FROM = 64, 16384
"""Outputs of a program for a weight of fewer rows than that."""
ROW_TILES = (16, 32, 64)
"""Rows of a program: the smallest that holds a step's."""


@triton.jit(do_not_specialize=["M"])
def dense_linear_kernel(
    p_y, p_x, p_w, M, N, K, stride_x, stride_w, stride_y,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y ``[M, N]`` fp32. Grid (tiles of M, tiles of N): neighbours share a tile of W."""
    i_m, i_n = tl.program_id(0) * BM, tl.program_id(1) * BN
    b_n = tl.minimum(i_n + tl.arange(0, BN), N - 1)
    b_m = tl.minimum(i_m + tl.arange(0, BM), M - 1)
    b_k = tl.arange(0, BK)
    p_rows = p_w + b_n.to(tl.int64)[:, None] * stride_w + b_k[None, :]
    p_in = p_x + b_m[:, None] * stride_x + b_k[None, :]
    b_y = tl.zeros((BN, BM), dtype=tl.float32)
    for k in range(0, K, BK):
        if EVEN:
            b_w = tl.load(p_rows)
            b_x = tl.load(p_in)
        else:
            b_inside = k + b_k < K
            b_w = tl.load(p_rows, mask=b_inside[None, :], other=0.0)
            b_x = tl.load(p_in, mask=b_inside[None, :], other=0.0)
        if WIDE:
            b_y += tl.dot(b_w.to(tl.float32), tl.trans(b_x).to(tl.float32), input_precision="ieee")
        else:
            b_y += tl.dot(b_w, tl.trans(b_x))
        p_rows += BK
        p_in += BK
    b_columns = i_n + tl.arange(0, BN)
    b_tokens = i_m + tl.arange(0, BM)
    b_mask = (b_columns[:, None] < N) & (b_tokens[None, :] < M)
    tl.store(p_y + b_tokens.to(tl.int64)[None, :] * stride_y + b_columns[:, None], b_y, mask=b_mask)


def dense_linear(x: torch.Tensor, weight: torch.Tensor, *, wide: bool, out: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` ``[M, K]``, ``weight`` ``[N, K]`` of one type (fp32 x may meet a 16-bit weight if ``wide``): fp32 ``[M,
    N]``. ``out``: where to write it, with contiguous rows."""
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=torch.float32, device=x.device) if out is None else out
    bm = next((tile for tile in ROW_TILES if m <= tile), ROW_TILES[-1])
    # A layer has fewer outputs than a vocabulary: narrower tiles keep more processors busy. By W's shape alone.
    bn = BN if n >= _WIDE_FROM else _NARROW
    dense_linear_kernel[(triton.cdiv(m, bm), triton.cdiv(n, bn))](
        out, x, weight, m, n, k, x.stride(0), weight.stride(0), out.stride(0),
        BM=bm, BN=bn, BK=BK, EVEN=k % BK == 0, WIDE=wide, num_warps=4, num_stages=1 if wide else 4,
    )  # fmt: skip
    return out


def shipped_configurations() -> list[tuple[Any, dict[str, str], dict[str, Any], int, int, str]]:
    """See ``attention.shipped_configurations``; ``M`` is not specialised."""
    found = []
    for dtype in ("bf16", "fp16"):
        types = {name: "i32" for name in ("M", "N", "K", "stride_x", "stride_w", "stride_y")}
        types |= {"p_y": "*fp32", "p_x": f"*{dtype}", "p_w": f"*{dtype}"}
        for bm, bn in product(ROW_TILES, (BN, _NARROW)):
            constants: dict[str, Any] = {"BM": bm, "BN": bn, "BK": BK, "EVEN": True, "WIDE": False}
            label = f"dense_linear_kernel {dtype} M {bm}{', narrow' * (bn == _NARROW)}"
            found.append((dense_linear_kernel, types, constants, 4, 4, label))
    return found
