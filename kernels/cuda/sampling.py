"""Next tokens drawn on the device: three launches, one program per row, no sorting.

- **examine**: the largest raw logit, whether it is finite, its first token; then the row's sparse edits, in place.
- **draw**: the inverse of the cumulative distribution over the tokens from the most to the least likely, ties by id.
- **restore**: what the edits replaced is put back, so that the logits end as they came.

Weights ``exp((logit - highest) / temperature)`` are integers, in units of ``2**-43``. Integer sums are exact in any
order, so a row's token depends on that row alone, not on its neighbours or the block size; what lies above a logit plus
its ties is what lies at or above it, without rounding; and nothing per element needs fp64, which consumer cards
have at 1/64 of the rate (exp in fp64 would take ~0.5 ms a pass there). A weight itself carries the 24 bits of an fp32
``exp2``: relative to the total, cumulated weights are within ~2e-7 of fp64's, and a point nearer than that to a
boundary may fall on its other side. The point and the shares of the total are fp64: one multiplication per row.

The threshold logit (of ``top_k`` by count, of ``top_p`` and of the draw by weight) is bracketed between keys: int32
whose order is that of the fp32 logits. A pass over the row measures what lies above four pivots. As soon as at most
``CAP`` tokens are left in the bracket they are gathered, and the rest of the search reads only them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from manylora.kernels.cuda.sampling_buffers import SamplingBuffers
from manylora.kernels.cuda.sampling_search import gather, keys, largest_below, locate, maximum, measure, narrow, pivots

BLOCK = 1024
"""Logits looked at at a time: 2 per thread. With 4, their counts and weights (64 bits) would not fit its registers."""
NUM_WARPS = 16

NOT_FINITE, NO_TOKEN = 1, 2
"""Statuses besides 0: the largest raw logit is NaN or infinite; the edits left nothing finite to choose."""

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def examine_kernel(
    p_x,
    p_active,
    p_offsets,
    p_edit_token,
    p_edit_bias,
    p_edit_repetition,
    p_edit_frequency,
    p_edit_presence,
    p_replaced,
    p_token,
    p_status,
    p_highest,
    stride_x,
    n,
    BLOCK: tl.constexpr,
):
    """Raw maximum of a row, then its edits: ``x + bias``, divided or multiplied by ``repetition``, minus the two
    others, each operation rounded as IEEE says. A bias of -inf is a ban."""
    i_row = tl.program_id(0)
    if tl.load(p_active + i_row) == 0:
        tl.store(p_token + i_row, -1)
        tl.store(p_status + i_row, 0)
        tl.store(p_highest + i_row, 0.0)
        return
    p_row = p_x + i_row.to(tl.int64) * stride_x
    highest, best = maximum(p_row, n, BLOCK)
    finite = tl.abs(highest) < float("inf")  # not so of a NaN
    tl.store(p_token + i_row, tl.where(finite, best, -1))
    tl.store(p_status + i_row, tl.where(finite, 0, 1))
    tl.store(p_highest + i_row, highest)
    first, last = tl.load(p_offsets + i_row), tl.load(p_offsets + i_row + 1)
    tl.debug_barrier()  # the maximum was of the raw logits
    if finite:
        for start in range(first, last, BLOCK):
            e = start + tl.arange(0, BLOCK)
            held = e < last
            p_at = p_row + tl.load(p_edit_token + e, mask=held, other=0)
            b_x = tl.load(p_at, mask=held, other=0.0)
            tl.store(p_replaced + e, b_x, mask=held)
            b_x += tl.load(p_edit_bias + e, mask=held, other=0.0)
            b_repetition = tl.load(p_edit_repetition + e, mask=held, other=1.0)
            b_x = tl.where(b_x > 0, tl.div_rn(b_x, b_repetition), b_x * b_repetition)
            b_x -= tl.load(p_edit_frequency + e, mask=held, other=0.0)
            b_x -= tl.load(p_edit_presence + e, mask=held, other=0.0)
            tl.store(p_at, b_x, mask=held)


@triton.jit
def restore_kernel(p_x, p_active, p_offsets, p_edit_token, p_replaced, p_status, stride_x, BLOCK: tl.constexpr):
    """Undoes the edits of a row that had them."""
    i_row = tl.program_id(0)
    if (tl.load(p_active + i_row) == 0) | (tl.load(p_status + i_row) == 1):
        return
    p_row = p_x + i_row.to(tl.int64) * stride_x
    last = tl.load(p_offsets + i_row + 1)
    for start in range(tl.load(p_offsets + i_row), last, BLOCK):
        e = start + tl.arange(0, BLOCK)
        held = e < last
        b_token = tl.load(p_edit_token + e, mask=held, other=0)
        tl.store(p_row + b_token, tl.load(p_replaced + e, mask=held, other=0.0), mask=held)


@triton.jit
def draw_kernel(
    p_x,
    p_active,
    p_offsets,
    p_scale,
    p_reach,
    p_top_k,
    p_top_p,
    p_point,
    p_kept_x,
    p_kept_i,
    p_token,
    p_status,
    p_highest,
    stride_x,
    n,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The token of a row, over the one that ``examine_kernel`` wrote. ``scale``: log2(e) / temperature, 0 if greedy;
    ``reach``: how far below the highest logit min_p allows."""
    i_row = tl.program_id(0)
    if (tl.load(p_active + i_row) == 0) | (tl.load(p_status + i_row) != 0):
        return
    p_row = p_x + i_row.to(tl.int64) * stride_x
    p_own_x, p_own_i = p_kept_x + i_row * CAP, p_kept_i + i_row * CAP
    highest, best = tl.load(p_highest + i_row), tl.load(p_token + i_row)
    if tl.load(p_offsets + i_row) < tl.load(p_offsets + i_row + 1):
        highest, best = maximum(p_row, n, BLOCK)
        if tl.abs(highest) < float("inf"):
            tl.store(p_token + i_row, best)
        else:
            tl.store(p_token + i_row, -1)
            tl.store(p_status + i_row, 2)
    scale = tl.load(p_scale + i_row)
    if (scale > 0) & (tl.abs(highest) < float("inf")):
        top = keys(highest)
        # The smallest key of those at least ``cut``, which lies between two fp32 values.
        cut = highest.to(tl.float64) - tl.load(p_reach + i_row)
        rounded = cut.to(tl.float32)
        floor = keys(rounded) + (rounded.to(tl.float64) < cut).to(tl.int32)
        floor = tl.minimum(floor, top)
        # Most draws end within 8 temperatures of the highest; these four measures start every search.
        near = tl.maximum(keys(highest - 3.0 * _LOG2_E / scale), floor)
        far = tl.maximum(keys(highest - 8.0 * _LOG2_E / scale), floor)
        none, nothing = tl.zeros((), tl.int32), tl.zeros((), tl.int64)
        first_keys = (top, near, far, floor)
        first_counts, first_weights = measure(p_row, n, first_keys, highest, scale, none, nothing, BLOCK)
        n_floor, w_floor = first_counts[3], first_weights[3]
        total = w_floor  # of what has not been cut off
        gathered = none  # 1: this search's bracket, 2: everything from the floor of a bracket up
        n_kept = none
        for stage in range(3):  # top_k, top_p, the draw: each raises the floor or lowers the total
            by_count = stage == 0
            # Weights are integers: m > x where m >= floor(x) + 1, and m >= x where m >= ceil(x).
            top_p = tl.load(p_top_p + i_row)
            share = tl.where(stage == 1, top_p, tl.load(p_point + i_row)) * total.to(tl.float64)
            target = share.to(tl.int64)
            if stage == 0:
                top_k = tl.load(p_top_k + i_row)
                target = top_k.to(tl.int64)
                wanted = (top_k > 0) & (top_k < n_floor)
            elif stage == 1:
                target += (target.to(tl.float64) < share).to(tl.int64)
                wanted = top_p < 1.0
            else:
                target += 1
                wanted = True
            if wanted:
                if stage > 0:
                    # At least one token is kept; rounding may put the point on the very end: the last that weighs.
                    target = tl.maximum(tl.minimum(target, total), 1)
                low, n_low, w_low = floor, n_floor, w_floor
                high, n_high, w_high = top + 1, none, nothing
                low, n_low, w_low, high, n_high, w_high = narrow(
                    low, n_low, w_low, high, n_high, w_high, first_keys, first_counts, first_weights, target, by_count
                )
                gathered = tl.where(gathered == 2, 2, 0)
                n_above, w_above = none, nothing  # besides what was gathered
                step = none
                while low + 1 < high:  # their difference may need 33 bits
                    if (gathered == 0) & (n_low - n_high <= CAP):
                        end = high
                        gathered = 1
                        if n_low <= CAP:  # then what later searches need is there too
                            end = top + 1
                            gathered = 2
                        else:
                            n_above, w_above = n_high, w_high
                        n_kept = gather(p_row, n, low, end, p_own_x, p_own_i, BLOCK)
                    elif (gathered > 0) & (n_low - n_high == 1):
                        low = largest_below(p_own_x, n_kept, high, BLOCK)
                        high = low + 1
                    else:
                        # By logits: tokens lie about evenly there. By keys: ends in 14 passes whatever the logits.
                        by_value = (step % 2 == 0) & (step < 12)
                        tried = pivots(low, high, by_value)
                        if gathered > 0:
                            ns, ws = measure(p_own_x, n_kept, tried, highest, scale, n_above, w_above, BLOCK)
                        else:
                            ns, ws = measure(p_row, n, tried, highest, scale, n_above, w_above, BLOCK)
                        low, n_low, w_low, high, n_high, w_high = narrow(
                            low, n_low, w_low, high, n_high, w_high, tried, ns, ws, target, by_count
                        )
                        step += 1
                # ``low`` is the threshold; its ties weigh the same.
                weight = tl.maximum((w_low - w_high) // tl.maximum(n_low - n_high, 1), 1)
                floor, n_floor, w_floor = low, n_low, w_low
                if stage == 0:
                    total = w_low
                elif stage == 1:
                    total = w_high + (target - w_high + weight - 1) // weight * weight
                else:
                    place = ((target - 1 - w_high) // weight).to(tl.int32)
                    token = best
                    if (low < top) | (place > 0):
                        if gathered > 0:
                            token = tl.load(p_own_i + locate(p_own_x, n_kept, low, place, BLOCK))
                        else:
                            token = locate(p_row, n, low, place, BLOCK)
                    tl.store(p_token + i_row, token)


def launch(logits: torch.Tensor, buffers: SamplingBuffers, rows: int, *, block: int = BLOCK) -> None:
    """Draws tokens for the first ``rows`` rows: three launches, which a CUDA graph may hold (nothing is allocated).

    Semantics: for each row that ``buffers.fill`` made active, edits, temperature, min_p, top_k, top_p, draw, in this
    order, as in ``server.engine.sampler``; the token, status and largest raw logit go to ``buffers``. ``logits``:
    fp32 ``[>= rows, vocab]``, rows at any distance; changed by the edits meanwhile, then restored. ``block``: logits
    looked at at a time, a power of two. ValueError if a shape, a dtype or a layout is another.
    """
    if logits.ndim != 2 or logits.shape[0] < rows or logits.shape[1] != buffers.vocab or logits.dtype != torch.float32:
        raise ValueError(
            f"logits must be float32 [>= {rows}, {buffers.vocab}], got {logits.dtype} {list(logits.shape)}"
        )
    if logits.stride(1) != 1 or (rows > 1 and logits.stride(0) < buffers.vocab):
        raise ValueError(f"rows of logits must be contiguous and apart, got strides {logits.stride()}")
    if not 0 < rows <= buffers.max_rows:
        raise ValueError(f"rows must be in 1..{buffers.max_rows}, got {rows}")
    d, stride = buffers.device_arrays, logits.stride(0)
    edits = (d["edit_bias"], d["edit_repetition"], d["edit_frequency"], d["edit_presence"])
    # Without fusing multiplications and subtractions: the edits are the host's, bit for bit.
    examine_kernel[(rows,)](
        logits, d["active"], d["offsets"], d["edit_token"], *edits, buffers.replaced, buffers.token, buffers.status,
        buffers.highest, stride, buffers.vocab, BLOCK=block, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    draw_kernel[(rows,)](
        logits, d["active"], d["offsets"], d["scale"], d["reach"], d["top_k"], d["top_p"], d["point"], buffers.kept_x,
        buffers.kept_i, buffers.token, buffers.status, buffers.highest, stride, buffers.vocab,
        CAP=buffers.cap, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip
    restore_kernel[(rows,)](
        logits, d["active"], d["offsets"], d["edit_token"], buffers.replaced, buffers.status, stride,
        BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip


_TYPES = {
    "p_active": "*i32", "p_offsets": "*i32", "p_edit_token": "*i32", "p_token": "*i32", "p_status": "*i32",
    "p_kept_i": "*i32", "p_top_k": "*i32", "p_reach": "*fp64", "p_top_p": "*fp64", "p_point": "*fp64",
}  # fmt: skip


def shipped_configurations() -> list[tuple[Any, dict[str, str], dict[str, Any], int, int, str]]:
    """``(kernel, types of the arguments that are no constexprs, constexprs, num_warps, num_stages, label)``."""
    found = []
    for kernel in (examine_kernel, draw_kernel, restore_kernel):
        constants = {"BLOCK": BLOCK, **({"CAP": SamplingBuffers.cap} if kernel is draw_kernel else {})}
        types = {
            name: _TYPES.get(name, "*fp32" if name.startswith("p_") else "i32")
            for name in kernel.arg_names
            if name not in constants
        }
        found.append((kernel, types, constants, NUM_WARPS, 3, kernel.__name__))
    return found
