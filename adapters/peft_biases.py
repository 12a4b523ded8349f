"""The base's own biases where an adapter trained them (``bias`` = all, lora_only, vera_only): PEFT saves the new ones,
and what is served is the difference to the base's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from manylora.adapters.adapter_config import AdapterConfig
from manylora.adapters.base import BaseModel
from manylora.adapters.fp32 import Array, array
from manylora.adapters.kinds.kind import Place
from manylora.adapters.peft_tables import Read
from manylora.adapters.peft_tensors import SortedTensors
from manylora.kernels.sites import GLOBAL_PROJECTIONS


def changed_biases(
    config: AdapterConfig,
    tensors: SortedTensors,
    places: Iterable[Place],
    adapted: frozenset[str],
    base: BaseModel | None,
    read: Read,
) -> Mapping[str, Array]:
    """fp32 ``[n_out]`` by module path: new bias minus the base's. ``adapted``: the paths that have a delta.

    Problems go to ``tensors``. Without a ``base`` nothing is subtracted, and whether the base has such a bias is not
    checked.
    """
    result: dict[str, Array] = {}
    for place in places:
        entry = tensors.biases.get(place.path)
        trained = config.bias == "all" or (config.bias == "targets" and place.path in adapted)
        if entry is None and (not trained or base is None):
            continue
        own = place.bias(base) if base is not None and place.projection not in GLOBAL_PROJECTIONS else None
        if entry is None:
            if own is not None:
                tensors.problem("biases that the config says were trained and that have no tensors", place.path)
        elif not trained:
            tensors.problem(f"trained biases that the config does not announce (its bias is {config.bias})", entry.name)
        elif (place.path in tensors.frozen_bias) != (place.path in adapted) or (base is not None and own is None):
            tensors.problem("tensors that match no module of the base", entry.name)
        elif entry.shape != (place.n_out,):
            tensors.problem(
                "tensors that are missing or have the wrong shape",
                f"{entry.name} has shape {list(entry.shape)}, expected {[place.n_out]}",
            )
        elif (value := read(entry)) is not None:
            new = array(value)
            result[place.path] = new - array(own) if own is not None else np.zeros_like(new)
    return result
