"""DoRA's gain (Liu et al. 2024, eq. 5): the trained magnitude over the norm of the adapted weight's rows.

``y = m / ||W + scale * B A|| * (W + scale * B A) x``, the norm taken over each output's weights. PEFT trains and runs
with the norm of the *dequantised* base, so this takes it of the very weights that are served. It is computed once, at
load, in fp32.
"""

from __future__ import annotations

import numpy as np
import torch

from manylora.adapters.base import BaseModel
from manylora.adapters.fp32 import Array, array
from manylora.adapters.kinds.kind import Place
from manylora.kernels.lora_weights import LoraPair

_CHUNK = 1 << 20
"""Weights that are adapted at a time, so that the copies in between stay at a few MiB."""


def dora_gain(place: Place, pair: LoraPair, magnitude: torch.Tensor, base: BaseModel) -> Array:
    """fp32 ``[n_out]``; not finite where an adapted row is zero or overflows."""
    if place.projection == "embed":
        # The table is the weight's transpose: an output's weights are a column of it.
        norms = _column_norms(array(base.table("embed")), pair)
    else:
        is_head = place.projection == "lm_head"
        weight = base.table("lm_head") if is_head else place.weight(base)
        norms = _row_norms(array(weight), pair)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(np.isfinite(norms), array(magnitude) / norms, np.float32("nan"))


def _row_norms(weight: Array, pair: LoraPair) -> Array:
    """``||weight + scale * b @ a||`` of each row."""
    a, b = array(pair.a), array(pair.b) * np.float32(pair.scale)
    norms = np.empty(len(weight), np.float32)
    step = max(1, _CHUNK // weight.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, len(weight), step):
            rows = slice(first, first + step)
            adapted = b[rows] @ a
            adapted += weight[rows]
            norms[rows] = np.sqrt(np.square(adapted, out=adapted).sum(axis=1))
    return norms


def _column_norms(table: Array, pair: LoraPair) -> Array:
    """``||table + scale * (b @ a).T||`` of each column."""
    a, b = array(pair.a), array(pair.b) * np.float32(pair.scale)
    squares = np.zeros(table.shape[1], np.float64)
    step = max(1, _CHUNK // table.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, len(table), step):
            rows = slice(first, first + step)
            adapted = a[:, rows].T @ b.T
            adapted += table[rows]
            squares += np.square(adapted, out=adapted).sum(axis=0)
    return np.sqrt(squares).astype(np.float32)
