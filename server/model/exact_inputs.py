"""Which positions of x a base's linear layers multiply as they are, where the operations round x coarsely.

A few positions of the residual stream are large in nearly every row (LLM.int8(), Dettmers et al. 2022): rounded in
spans that share a scale, they cost their neighbours most of the levels. So ``Ops.exact_inputs`` positions of each site
are kept out of that, those with the largest mean square over a few random tokens. Which tokens hardly matters: 32 find
as good ones as 2048, or as a text does (docs/log.md, "positions kept out of the bytes").
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, cast

import numpy as np
import torch

from manylora.kernels.ops import Ops, PagedSequences
from manylora.server.model.decoder import Decoder
from manylora.server.model.decoder_weights import DecoderWeights
from manylora.server.model.families import ModelSpec
from manylora.server.model.forward_batch import ForwardBatch
from manylora.server.model.kv_cache import KVCache

logger = logging.getLogger(__name__)

TOKENS: Final = 32
_SEED: Final = 7
_SITES: Final = ("qkv", "gate_up", "down")
"""Not ``o``: what attention brings together has no such positions."""
_HEAD: Final = -1, "lm_head"

Place = tuple[int, str]
"""A layer and a site, or `_HEAD`."""


def with_exact_inputs(spec: ModelSpec, weights: DecoderWeights, ops: Ops) -> DecoderWeights:
    """The same weights, each site and the table that makes logits told which positions of x it multiplies as they are:
    always the same ones for the same weights. As they were where the operations have no use for it. What is given
    values that are not finite has none.

    Computes a step of ``TOKENS`` tokens, in a KV cache of its own.
    """
    if ops.exact_inputs == 0:
        return weights
    began = time.monotonic()
    magnitudes = input_magnitudes(spec, weights, ops)
    exact = {
        place: _largest(found, ops.exact_inputs) for place, found in magnitudes.items() if np.isfinite(found).all()
    }
    if len(exact) < len(magnitudes):
        logger.warning(
            "%d of %d products are given values that are not finite: all that they multiply is rounded.",
            len(magnitudes) - len(exact), len(magnitudes),
        )  # fmt: skip
    logger.info(
        "%d products take the %d largest positions of their inputs exactly: found in %.1f s",
        len(exact), ops.exact_inputs, time.monotonic() - began,
    )  # fmt: skip
    layers, head = [], exact.get(_HEAD)
    for i, layer in enumerate(weights.layers):
        own = {site: exact[i, site] for site in _SITES if (i, site) in exact}
        sites = {
            site: ops.exactly(weight, own[site]) if site in own else weight for site, weight in layer.sites.items()
        }
        layers.append(replace(layer, sites=sites, exact=own))
    made = replace(weights, layers=tuple(layers), exact_head=head)
    if head is None:
        return made
    table = ops.exactly(weights.head, head)
    return replace(made, head=table, embedding=table if weights.tied else weights.embedding)


def input_magnitudes(spec: ModelSpec, weights: DecoderWeights, ops: Ops) -> Mapping[Place, np.ndarray]:
    """Sums of squares of each position of x, fp64 ``[K]``, over some random tokens, at each site that may need them,
    and of the last hidden states."""
    count = min(TOKENS, len(weights.rope[0][0]))
    ids = torch.randint(0, spec.vocab_size, (count,), generator=torch.Generator().manual_seed(_SEED))
    pages = KVCache.pages_for(count)
    sequences = PagedSequences(
        starts=torch.tensor([0, count], dtype=torch.int32),
        contexts=torch.tensor([count], dtype=torch.int32),
        tables=torch.arange(pages, dtype=torch.int32).view(1, pages),
        positions=torch.arange(count, dtype=torch.int32),
    )
    places = {id(layer.sites[site]): (i, site) for i, layer in enumerate(weights.layers) for site in _SITES}
    watched = _Watched(ops, places)
    with torch.inference_mode():
        decoder = Decoder(spec, weights, cast(Ops, watched), None)
        batch = ForwardBatch(ids.to(ops.device), sequences, None, None)
        decoder.logits(decoder.hidden(batch, KVCache(spec, pages, ops)), batch, None)
    return watched.found


class _Watched:
    """The operations, which look at what some linear layers are given. ``places``: by the weight's ``id``."""

    def __init__(self, ops: Ops, places: Mapping[int, Place]) -> None:
        self._ops, self._places = ops, places
        self.found: dict[Place, np.ndarray] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def recordings(self) -> None:
        """What is looked at here is not queued."""

    def linear(self, x: torch.Tensor, weight: Any, **options: Any) -> torch.Tensor:
        place = self._places.get(id(weight))
        if place is not None:
            self._look_at(x, place)
        return self._ops.linear(x, weight, **options)

    def logits(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        self._look_at(x, _HEAD)
        return self._ops.logits(x, weight)

    def _look_at(self, x: torch.Tensor, place: Place) -> None:
        self._ops.flush()
        # Row by row: torch and numpy add up a column in an order that may depend on the machine.
        total = np.zeros(x.shape[1])
        for row in x.to("cpu", torch.float64).numpy():
            total += row * row
        self.found[place] = total


def _largest(magnitudes: np.ndarray, count: int) -> torch.Tensor:
    """int64 ``[count]``, ascending; of equal ones the first."""
    return torch.from_numpy(np.sort(np.argsort(-magnitudes, kind="stable")[:count]))
