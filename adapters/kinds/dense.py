"""Deltas that are products of small matrices, but not of two: written as a pair, exactly, where the rank allows it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from manylora.adapters.fp32 import Array, tensor
from manylora.adapters.kinds.kind import Place
from manylora.kernels.lora_weights import LoraPair


def pair_of(
    place: Place, rank: int, scale: float, factors: Callable[[], tuple[Array, Array]], whole: Callable[[], Array]
) -> LoraPair:
    """The delta as a pair whose rank is the least of ``rank`` and the module's own two sizes.

    ``factors()`` are b ``[n_out, rank]`` and a ``[rank, n_in]``; ``whole()`` is ``b @ a``, computed as PEFT does, for
    modules so small that the delta itself with an identity beside it is the smaller pair.
    """
    if rank <= min(place.n_in, place.n_out):
        b, a = factors()
        return LoraPair(tensor(a), tensor(b), scale)
    if place.n_out <= place.n_in:
        return LoraPair(tensor(whole()), tensor(np.eye(place.n_out, dtype=np.float32)), scale)
    return LoraPair(tensor(np.eye(place.n_in, dtype=np.float32)), tensor(whole()), scale)
