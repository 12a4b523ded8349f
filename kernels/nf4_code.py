"""The 16 values of the NF4 data type."""

from __future__ import annotations

from typing import Final

NF4_CODE: Final = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a standard normal, scaled to [-1, 1] (Dettmers et al. 2023, QLoRA, appendix E), as bitsandbytes has
them in fp32; the index is the 4-bit code."""
