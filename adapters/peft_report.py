"""What a loaded adapter amounts to: whether it does anything, whether it may be combined, and the report for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np

from manylora.adapters.fp32 import array, highest, peaks
from manylora.adapters.kinds.kind import Kind
from manylora.adapters.weights import LoadReport
from manylora.kernels.lora_weights import LoraPair, LoraVectors, LoraWeights, Module
from manylora.kernels.sites import PROJECTIONS

_SHOWN: Final = 4
"""How many modules or tensors with one kind of problem are named before the rest is only counted."""
_MAX_REASONS: Final = 100
_HIGHEST: Final = float(np.finfo(np.float32).max)


def listed(items: Sequence[str]) -> str:
    """The first few items, each cut to a line, and how many more there are."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "; ".join(item if len(item) <= 300 else f"{item[:297]}..." for item in items[:_SHOWN]) + more


def bounded(reasons: list[str]) -> list[str]:
    """The reasons, of which a hostile file could have a hundred thousand."""
    rest = len(reasons) - _MAX_REASONS
    return reasons if rest <= 0 else [*reasons[:_MAX_REASONS], f"and {rest} more"]


def not_applicable(pair: LoraPair | None, vectors: LoraVectors) -> str | None:
    """Why folded tensors cannot be computed with, although every value in the file is finite; or None."""
    for what, vector in (("gain", vectors.gain), ("bias", vectors.bias)):
        if vector is not None and not np.isfinite(array(vector)).all():
            return f"its {what} is not finite"
    if pair is None:
        return None
    # Seldom is a closer look needed; NaN if a factor itself overflowed.
    if abs(pair.scale) * pair.rank * highest(pair.a) * highest(pair.b) < _HIGHEST / 2:
        return None
    # An upper bound of every element of scale * B A.
    bound = abs(pair.scale) * float(peaks(pair.a, 1).astype(np.float64) @ peaks(pair.b, 0).astype(np.float64))
    return None if bound <= _HIGHEST else f"scale * B A may reach {bound:.3g}, more than fp32 holds"


def without_effect(pair: LoraPair | None, vectors: LoraVectors | None) -> bool:
    """Whether a module computes as the base does: no rank contributes (for each, its row of A or its column of B is
    zero, or the scale is), no gain, no bias."""
    if vectors is not None:
        # A gain that was never trained is a quotient of two norms of the same row, in two orders of summation.
        if vectors.gain is not None and float(np.abs(array(vectors.gain) - 1).max(initial=0.0)) > 1e-5:
            return False
        if vectors.bias is not None and array(vectors.bias).any():
            return False
    if pair is None or pair.scale == 0:
        return True
    of_first = array(pair.a[:, :1]).ravel() * array(pair.b[:1]).ravel()
    if of_first.any():
        return False  # the first input reaches the first output: no need to look at all of them
    return not bool(((peaks(pair.a, 1) > 0) & (peaks(pair.b, 0) > 0)).any())


def not_composable(kind: Kind | None, lora: LoraWeights, changed_biases: bool) -> str | None:
    """Why the adapter can only be asked for alone and at scale 1; None if it may be rescaled and combined."""
    reasons = [kind.not_composable] if kind is not None and kind.not_composable is not None else []
    if lora.tables:
        reasons.append("it replaces rows of the embedding or of the output layer")
    if changed_biases:
        reasons.append("it was trained with the base's biases, which PEFT does not combine with others")
    return "; ".join(reasons) or None


def report_of(
    kind: str,
    lora: LoraWeights,
    dtypes: Iterable[str],
    base_model: str | None,
    unmatched: Sequence[str],
    warnings: Sequence[str],
) -> LoadReport:
    """The report of a load; ``dtypes`` are those of the file."""
    touched: Mapping[Module, object] = {**lora.pairs, **lora.vectors}
    present = {projection for projection, _ in touched}
    return LoadReport(
        ranks=tuple(sorted({pair.rank for pair in lora.pairs.values()})),
        scales=tuple(sorted({pair.scale for pair in lora.pairs.values()})),
        modules=tuple(projection for projection in PROJECTIONS if projection in present),
        n_modules=len(touched),
        nbytes=lora.nbytes,
        dtype="+".join(sorted(set(dtypes))),
        base_model=base_model,
        warnings=tuple(warnings),
        kind=kind,
        unmatched=tuple(unmatched),
        replaced_rows={projection: len(rows.ids) for projection, rows in lora.tables.items()},
    )
