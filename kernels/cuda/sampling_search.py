"""Device functions of ``sampling``: passes over one row's logits, and the bracket that they narrow.

A logit's key is an int32 whose order is that of the fp32 logits; a bracket ``[low, high)`` of keys comes with the count
and the weight of the logits at or above either end.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-2139095041)  # the key of -inf


@triton.jit
def keys(b_x):
    """int32 in the order of the fp32 values; equal for 0.0 and -0.0, which are ties."""
    b_bits = tl.where(b_x == 0.0, 0.0, b_x).to(tl.int32, bitcast=True)
    return tl.where(b_bits >= 0, b_bits, b_bits ^ 0x7FFFFFFF)


@triton.jit
def value(key):
    """The logit of a key."""
    return tl.where(key >= 0, key, key ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def weights(b_x, highest, scale):
    """``2**43 * 2**((x - highest) * scale)`` rounded down, int64: the mantissa of the fp32 result, shifted. At most
    2**43, so that 2**19 of them fit 63 bits."""
    b_bits = tl.exp2((b_x - highest) * scale).to(tl.int32, bitcast=True)
    b_mantissa = ((b_bits & 0x7FFFFF) | 0x800000).to(tl.int64) << 20
    return b_mantissa >> tl.minimum(127 - (b_bits >> 23), 63).to(tl.int64)


@triton.jit
def maximum(p_x, n, BLOCK: tl.constexpr):
    """The largest of n values and the first index that has it; a NaN if there is one."""
    b_best = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_at = tl.zeros((BLOCK,), tl.int32)
    b_nan = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        b_x = tl.load(p_x + i, mask=i < n, other=float("-inf"))
        b_nan |= (b_x != b_x).to(tl.int32)
        b_more = b_x > b_best
        b_best = tl.where(b_more, b_x, b_best)
        b_at = tl.where(b_more, i, b_at)
    highest = tl.max(b_best, 0)
    at = tl.min(tl.where(b_best == highest, b_at, 0x7FFFFFFF), 0)
    return tl.where(tl.max(b_nan, 0) > 0, float("nan"), highest), at


@triton.jit
def measure(p_x, n, pivot_keys, highest, scale, n_above, w_above, BLOCK: tl.constexpr):
    """How many of n logits have at least each of four keys, and what they weigh together, besides those above them."""
    k0, k1, k2, k3 = pivot_keys
    b_n0 = tl.zeros((BLOCK,), tl.int32)
    b_n1 = tl.zeros((BLOCK,), tl.int32)
    b_n2 = tl.zeros((BLOCK,), tl.int32)
    b_n3 = tl.zeros((BLOCK,), tl.int32)
    b_w0 = tl.zeros((BLOCK,), tl.int64)
    b_w1 = tl.zeros((BLOCK,), tl.int64)
    b_w2 = tl.zeros((BLOCK,), tl.int64)
    b_w3 = tl.zeros((BLOCK,), tl.int64)
    # Lanes keep their own sums until the end: no warp waits for another inside the loop.
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        b_x = tl.load(p_x + i, mask=i < n, other=float("-inf"))
        b_key = tl.where(i < n, keys(b_x), -0x80000000)  # below the key of -inf: in no bracket
        b_weight = weights(b_x, highest, scale)
        b_n0 += (b_key >= k0).to(tl.int32)
        b_n1 += (b_key >= k1).to(tl.int32)
        b_n2 += (b_key >= k2).to(tl.int32)
        b_n3 += (b_key >= k3).to(tl.int32)
        b_w0 += tl.where(b_key >= k0, b_weight, 0)
        b_w1 += tl.where(b_key >= k1, b_weight, 0)
        b_w2 += tl.where(b_key >= k2, b_weight, 0)
        b_w3 += tl.where(b_key >= k3, b_weight, 0)
    n0, n1, n2, n3 = tl.sum(b_n0, 0), tl.sum(b_n1, 0), tl.sum(b_n2, 0), tl.sum(b_n3, 0)
    w0, w1, w2, w3 = tl.sum(b_w0, 0), tl.sum(b_w1, 0), tl.sum(b_w2, 0), tl.sum(b_w3, 0)
    counts = (n0 + n_above, n1 + n_above, n2 + n_above, n3 + n_above)
    return counts, (w0 + w_above, w1 + w_above, w2 + w_above, w3 + w_above)


@triton.jit
def narrow(low, n_low, w_low, high, n_high, w_high, pivot_keys, counts, masses, target, by_count):
    """The bracket after measuring four more keys: ``low`` reaches the target, ``high`` (excluded) does not."""
    for j in tl.static_range(4):
        key, n, w = pivot_keys[j], counts[j], masses[j]
        reaches = tl.where(by_count, n.to(tl.int64), w) >= target
        up = reaches & (key > low)
        down = (reaches == 0) & (key < high)
        low, n_low, w_low = tl.where(up, key, low), tl.where(up, n, n_low), tl.where(up, w, w_low)
        high, n_high, w_high = tl.where(down, key, high), tl.where(down, n, n_high), tl.where(down, w, w_high)
    return low, n_low, w_low, high, n_high, w_high


@triton.jit
def pivots(low, high, by_value):
    """Four keys strictly inside the bracket, at equal distances either of logits or of keys."""
    below = value(low)
    rise, gap = (value(high) - below) * 0.2, high.to(tl.int64) - low
    k0 = tl.where(by_value, keys(below + rise), (low + gap // 5).to(tl.int32))
    k1 = tl.where(by_value, keys(below + rise * 2), (low + gap * 2 // 5).to(tl.int32))
    k2 = tl.where(by_value, keys(below + rise * 3), (low + gap * 3 // 5).to(tl.int32))
    k3 = tl.where(by_value, keys(below + rise * 4), (low + gap * 4 // 5).to(tl.int32))
    first, last = low + 1, high - 1
    k0, k1 = tl.minimum(tl.maximum(k0, first), last), tl.minimum(tl.maximum(k1, first), last)
    k2, k3 = tl.minimum(tl.maximum(k2, first), last), tl.minimum(tl.maximum(k3, first), last)
    return k0, k1, k2, k3


@triton.jit
def gather(p_x, n, low, high, p_kept_x, p_kept_i, BLOCK: tl.constexpr):
    """The logits whose keys are in ``[low, high)``, and their tokens, in the order of their tokens; how many."""
    n_kept = tl.zeros((), tl.int32)
    tl.debug_barrier()  # what was gathered before has been read
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        b_x = tl.load(p_x + i, mask=i < n, other=float("-inf"))
        b_key = keys(b_x)
        b_in = (b_key >= low) & (b_key < high) & (i < n)
        b_at = n_kept + tl.cumsum(b_in.to(tl.int32), 0) - 1
        tl.store(p_kept_x + b_at, b_x, mask=b_in)
        tl.store(p_kept_i + b_at, i, mask=b_in)
        n_kept += tl.sum(b_in.to(tl.int32), 0)
    tl.debug_barrier()  # threads read what others have stored
    return n_kept


@triton.jit
def largest_below(p_x, n, high, BLOCK: tl.constexpr):
    """The largest key under ``high`` of n logits."""
    b_best = tl.full((BLOCK,), _LOWEST, tl.int32)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        b_key = keys(tl.load(p_x + i, mask=i < n, other=float("-inf")))
        b_best = tl.maximum(b_best, tl.where(b_key < high, b_key, _LOWEST))
    return tl.max(b_best, 0)


@triton.jit
def locate(p_x, n, key, place, BLOCK: tl.constexpr):
    """The index of the logit that has ``place`` equal ones (of this key) before it."""
    found = tl.zeros((), tl.int32) - 1
    first = tl.zeros((), tl.int32)
    while (found < 0) & (first < n):
        i = first + tl.arange(0, BLOCK)
        b_tie = (keys(tl.load(p_x + i, mask=i < n, other=float("-inf"))) == key) & (i < n)
        b_before = tl.cumsum(b_tie.to(tl.int32), 0) - 1
        found = tl.max(tl.where(b_tie & (b_before == place), i, -1), 0)
        place -= tl.sum(b_tie.to(tl.int32), 0)
        first += BLOCK
    return found
