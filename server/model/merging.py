"""Folding an adapter into copies of the weights it acts on: pure functions of tensors, no files and no devices.

A merged module computes ``y = W' x + b'`` with

* ``W' = gain * W + scale * B A`` (LoRA, Hu et al. 2021, section 4.1; with a gain, which then is in B already, DoRA,
  Liu et al. 2024, eq. 5: ``m / ||W + s B A|| * (W + s B A)``), and
* ``b' = b + bias``,

which is what PEFT's ``merge_and_unload`` leaves behind. Sums are made in fp32, in the order PEFT makes them: the
product of B and A, times the scale, then added. The caller rounds once, to whatever type it keeps. No argument is ever
written to, and every result has memory of its own. A result with a NaN or an infinity is refused with ValueError; the
caller knows the module's name.
"""

from __future__ import annotations

import torch

from manylora.kernels.lora_weights import LoraPair, LoraVectors, TableRows


def merge_weight(weight: torch.Tensor, pair: LoraPair | None, vectors: LoraVectors | None = None) -> torch.Tensor:
    """``gain * weight + scale * b @ a``: fp32 ``[N, K]``, a new tensor on ``weight``'s device.

    ``weight``: ``[N, K]`` in any float type, computed with in fp32; at its peak one fp32 ``[N, K]`` is made, two where
    ``weight`` is not fp32. Raises ValueError for shapes that do not fit, and for a result that is not finite.
    """
    n, k = weight.shape
    base = weight.float()
    gain = None if vectors is None or vectors.gain is None else _vector(vectors.gain, n, "gain", weight.device)
    if pair is None:
        merged = base.clone() if gain is None else base * gain.unsqueeze(1)
    else:
        if pair.a.shape != (pair.rank, k) or pair.b.shape != (n, pair.rank):
            raise ValueError(f"A {list(pair.a.shape)} and B {list(pair.b.shape)} do not fit a weight of {[n, k]}")
        a, b = (factor.to(weight.device, torch.float32) for factor in (pair.a, pair.b))
        merged = torch.mm(b, a).mul_(pair.scale)
        merged.add_(base) if gain is None else merged.addcmul_(base, gain.unsqueeze(1))
    return _finite(merged)


def merge_bias(bias: torch.Tensor | None, vectors: LoraVectors | None) -> torch.Tensor | None:
    """``bias + vectors.bias``: fp32 ``[N]``, a new tensor; None if there is neither.

    Raises ValueError for shapes that do not fit, and for a result that is not finite.
    """
    added = None if vectors is None else vectors.bias
    if bias is None:
        return None if added is None else _finite(added.to(torch.float32, copy=True))
    base = bias.to(torch.float32, copy=True)
    return _finite(base if added is None else base.add_(_vector(added, base.shape[0], "bias", base.device)))


def merge_table(table: torch.Tensor, rows: TableRows | None) -> torch.Tensor:
    """``table`` with an adapter's own rows in their places: ``[vocab, hidden]``, a new tensor of ``table``'s type.

    Give a table of the type in which the result is kept, or of fp32 to round once later. Raises ValueError for rows of
    another width, ids that the table does not have, and values that are not finite.
    """
    merged = table.clone()
    if rows is None:
        return merged
    vocab, hidden = table.shape
    count = rows.ids.shape[0]
    if rows.rows.shape != (count, hidden):
        raise ValueError(f"{count} rows of shape {list(rows.rows.shape)} do not fit a table of {[vocab, hidden]}")
    if count and (int(rows.ids.min()) < 0 or int(rows.ids.max()) >= vocab):
        raise ValueError(f"rows for ids up to {int(rows.ids.max())}, but the table has {vocab}")
    merged[rows.ids.to(table.device)] = _finite(rows.rows).to(table.device, table.dtype)
    return merged


def merge_embedding(table: torch.Tensor, pair: LoraPair | None, vectors: LoraVectors | None = None) -> torch.Tensor:
    """`merge_weight` for the embedding, whose ``table`` ``[vocab, hidden]`` is its weight transposed: a projection of
    one-hot tokens has K = vocabulary (see kernels.sites). fp32 ``[vocab, hidden]``, contiguous.
    """
    # A row-major product of the transposed factors, so that the sums over the rank are those of an output layer's.
    if pair is not None:
        pair = LoraPair(a=pair.b.T, b=pair.a.T, scale=pair.scale)
    gain = None if vectors is None else vectors.gain
    if gain is None:
        return merge_weight(table, pair)
    # The gain is one number a hidden channel: here a column.
    scaled = table.float() * _vector(gain, table.shape[1], "gain", table.device)
    return merge_weight(scaled, pair)


def _vector(values: torch.Tensor, size: int, what: str, device: torch.device) -> torch.Tensor:
    if values.shape != (size,):
        raise ValueError(f"a {what} of shape {list(values.shape)} does not fit {size} outputs")
    return values.to(device, torch.float32)


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError("the merged values are not all finite")
    return tensor
