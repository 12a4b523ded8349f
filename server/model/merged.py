"""A model with one adapter folded into a copy of the weights that it acts on; everything else is the base's own.

- *exact*: merged matrices are kept dense, in 16 bits (the type of ``Ops.prepare_dense``), rounded once;
- *compact*: they are quantised to NF4 again (blocks of 64, nested scales): as large as the base's, and as fast. What
  that costs is far more than exact's rounding (see ``requantize``), so it is to be measured.

Tables (``lm_head``, the embedding) are kept in bf16 either way, as the base's are. Modules without a delta keep the
base's bits; where one of a fused site's projections has one, the others come along as views, or in NF4 as a copy.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch

from manylora.kernels.lora_weights import LoraWeights, Module
from manylora.kernels.sites import GLOBAL_PROJECTIONS, SITES
from manylora.server.model.bnb_format import BLOCKSIZE
from manylora.server.model.decoder import Decoder
from manylora.server.model.decoder_weights import LAYER_SITES, DecoderWeights, LayerWeights, site_bias
from manylora.server.model.merging import merge_bias, merge_embedding, merge_table, merge_weight
from manylora.server.model.requantize import requantize

logger = logging.getLogger(__name__)

MergeMode = Literal["exact", "compact"]

_DENSE_COPIES: Final = 4
"""fp32 copies of a module that exist at once while it is merged: base, product, result, and what quantising takes."""
_TABLES: Final = 4096
"""Bytes of what an NF4 layer has besides its weights and their scales, whatever its size."""
_LOG_EVERY_S: Final = 5.0


class CannotMerge(ValueError):
    """An adapter cannot be folded into this base in this mode; the message names the module and the reason."""


@dataclass(frozen=True)
class MergeSize:
    """Bytes on the base's device: ``kept`` as long as the merged model lives, ``working`` while it is made besides."""

    kept: int
    working: int


def merge_size(base: Decoder, adapter: LoraWeights, mode: MergeMode) -> MergeSize:
    """What ``merge_adapter`` will take: an upper bound, a few per cent above what it turns out to be."""
    shapes, itemsize = base.spec.lora_shapes(), base.ops.dense_itemsize
    kept = largest = 0
    for layer in range(base.spec.n_layers):
        for site in LAYER_SITES:
            touched = _touched(adapter, site, layer)
            sizes = {p: shapes.in_features[p] * shapes.out_features[p] for p in SITES[site]}
            matrices = [p for p in touched if _changes_matrix(adapter, (p, layer))]
            if not touched:
                continue
            if mode == "exact" and matrices:
                kept += sum(sizes[p] for p in matrices) * itemsize
            else:  # copied as a whole: its parts are all held in one way
                kept += _nf4_bytes(base, sum(sizes.values()))
            largest = max([largest, *(sizes[p] for p in matrices)])
    for projection in GLOBAL_PROJECTIONS:
        if _changes_table(adapter, projection):
            size = base.spec.vocab_size * base.spec.hidden_size
            kept, largest = kept + 2 * size, max(largest, size)
    return MergeSize(kept, largest * 4 * _DENSE_COPIES)


def _nf4_bytes(base: Decoder, weights: int) -> int:
    """Of this many NF4 weights, as the base's own operations hold them."""
    first = base.weights.layers[0].sites["down"]
    shapes = base.spec.lora_shapes()
    size = shapes.in_features["down"] * shapes.out_features["down"]
    held: int = first.nbytes
    return -(-held * weights // size) + _TABLES


def merge_adapter(
    base: Decoder,
    adapter: LoraWeights,
    mode: MergeMode,
    *,
    what: str = "an adapter",
    proceed: Callable[[], None] = lambda: None,
) -> DecoderWeights:
    """Fold ``adapter`` into a copy of what it touches. On the caller's thread, module by module, logging progress.

    ``base`` is only read, and may compute meanwhile on another thread. ``what``: the adapter's name, for the log.
    ``proceed`` is called for each module, and may raise to end it here.
    Raises CannotMerge for a merged value that is not finite or does not fit the type, and for modules that cannot be
    quantised.
    """
    progress = _Progress(what, mode, sum(1 for _ in _modules(adapter)), proceed)
    layers = tuple(_merge_layer(base, adapter, mode, layer, progress) for layer in range(base.spec.n_layers))
    merged = replace(base.weights, layers=layers)
    if _changes_table(adapter, "embed"):
        # ``head``: it made logits, if at all, as the base's table, which stays.
        merged = replace(merged, embedding=base.ops.prepare_embedding(_merged_embedding(base, adapter), head=False))
        progress.step()
    if _changes_table(adapter, "lm_head"):
        head = base.ops.prepare_embedding(_merged_head(base, adapter), head=True)
        if merged.exact_head is not None:
            head = base.ops.exactly(head, merged.exact_head)
        merged = replace(merged, head=head)
        progress.step()
    vectors = adapter.vectors.get(("lm_head", 0))
    if vectors is not None and vectors.bias is not None:
        merged = replace(merged, head_bias=vectors.bias.to(base.ops.device, torch.float32))
    return merged


def own_bytes(merged: DecoderWeights, base: DecoderWeights) -> int:
    """Bytes of the matrices that ``merged`` does not have in common with ``base``."""
    shared = {id(matrix) for matrix in base.matrices}
    return sum(matrix.nbytes for matrix in merged.matrices if id(matrix) not in shared)


class _Progress:
    def __init__(self, what: str, mode: str, total: int, proceed: Callable[[], None]) -> None:
        self._what, self._mode, self._total, self._done = what, mode, total, 0
        self._proceed = proceed
        self._logged = time.monotonic()

    def step(self) -> None:
        self._proceed()
        self._done += 1
        now = time.monotonic()
        if now - self._logged >= _LOG_EVERY_S:
            self._logged = now
            logger.info("merging %s (%s): %d of %d modules", self._what, self._mode, self._done, self._total)


def _modules(adapter: LoraWeights) -> Iterator[Module]:
    yield from {*adapter.pairs, *adapter.vectors, *((name, 0) for name in adapter.tables)}


def _touched(adapter: LoraWeights, site: str, layer: int) -> list[str]:
    return [p for p in SITES[site] if (p, layer) in adapter.pairs or (p, layer) in adapter.vectors]


def _changes_matrix(adapter: LoraWeights, module: Module) -> bool:
    vectors = adapter.vectors.get(module)
    return module in adapter.pairs or (vectors is not None and vectors.gain is not None)


def _changes_table(adapter: LoraWeights, projection: str) -> bool:
    module = projection, 0
    if _changes_matrix(adapter, module) or projection in adapter.tables:
        return True
    # An output layer's bias is added to the logits; an embedding's is part of every row.
    vectors = adapter.vectors.get(module)
    return projection == "embed" and vectors is not None and vectors.bias is not None


def _merge_layer(base: Decoder, adapter: LoraWeights, mode: MergeMode, layer: int, progress: _Progress) -> LayerWeights:
    of_base = base.weights.layers[layer]
    sites: dict[str, Any] = dict(of_base.sites)
    biases: dict[str, torch.Tensor] = dict(of_base.biases)
    for site in LAYER_SITES:
        touched = _touched(adapter, site, layer)
        if not touched:
            continue
        parts = []
        for p in SITES[site]:
            module = p, layer
            if p in touched and _changes_matrix(adapter, module):
                parts.append(_merge_module(base, adapter, mode, module))
            else:
                parts.append(base.rows(p, layer))
            if (bias := merge_bias(biases.get(p), adapter.vectors.get(module))) is not None:
                biases[p] = bias
            progress.step()
        stacked = base.ops.stack(parts, site_bias(site, biases, base.spec.lora_shapes()))
        sites[site] = base.ops.exactly(stacked, of_base.exact[site]) if site in of_base.exact else stacked
    return replace(of_base, sites=sites, biases=biases)


def _merge_module(base: Decoder, adapter: LoraWeights, mode: MergeMode, module: Module) -> Any:
    """One projection of one layer, prepared."""
    ops = base.ops
    pair, vectors = adapter.pairs.get(module), adapter.vectors.get(module)
    name = "`{}` of layer {}".format(*module)
    try:
        weight = merge_weight(ops.dense(base.rows(*module)), pair, vectors)
        if mode == "exact":
            _check_range(weight, ops.dtype)
            return ops.prepare_dense(weight, None)
        if weight.shape[1] % BLOCKSIZE:
            raise ValueError(f"its rows of {weight.shape[1]} are not whole NF4 blocks of {BLOCKSIZE}; use mode exact")
        # The same module is rounded in the same way each time: equal merges have equal bits.
        return ops.prepare_linear([requantize(weight, zlib.crc32(name.encode()))], None)
    except ValueError as error:
        raise CannotMerge(f"{name}: {error}") from error


def _check_range(weight: torch.Tensor, dtype: torch.dtype) -> None:
    """float16 ends at 65504, bfloat16 a little below float32."""
    kept = torch.float16 if dtype == torch.float16 else torch.bfloat16
    if float(weight.abs().max()) > torch.finfo(kept).max:
        raise ValueError(f"merged values above {torch.finfo(kept).max:g} do not fit into {kept}")


def _merged_embedding(base: Decoder, adapter: LoraWeights) -> torch.Tensor:
    vectors = adapter.vectors.get(("embed", 0))
    try:
        table = merge_embedding(base.table("embed"), adapter.pairs.get(("embed", 0)), vectors)
        if vectors is not None and vectors.bias is not None:
            table += vectors.bias
        return merge_table(table, adapter.tables.get("embed")).bfloat16()
    except ValueError as error:
        raise CannotMerge(f"`embed`: {error}") from error


def _merged_head(base: Decoder, adapter: LoraWeights) -> torch.Tensor:
    module = ("lm_head", 0)
    try:
        table = merge_weight(base.table("lm_head"), adapter.pairs.get(module), adapter.vectors.get(module))
        return merge_table(table, adapter.tables.get("lm_head")).bfloat16()
    except ValueError as error:
        raise CannotMerge(f"`lm_head`: {error}") from error
