"""``manylora merge``: a base and an adapter become one plain bf16 checkpoint, as PEFT's ``merge_and_unload`` makes it.

The base is read, merged and written tensor by tensor; in memory are the adapter, one weight in fp32 (twice), and the
shard that is being filled. Sums are made in fp32 and rounded once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from manylora.adapters.errors import AdapterRefused
from manylora.adapters.peft_loader import load_peft_adapter
from manylora.adapters.source import resolve_source
from manylora.adapters.weights import AdapterWeights
from manylora.kernels.lora_weights import LoraWeights
from manylora.kernels.sites import GLOBAL_PROJECTIONS
from manylora.server.model.errors import ModelError
from manylora.server.model.families import ModelSpec
from manylora.server.model.layout import (
    LM_HEAD,
    embed_name,
    plain_shapes,
    projection_shapes,
    stored_weight,
    stored_weights,
)
from manylora.server.model.merging import merge_bias, merge_embedding, merge_table, merge_weight
from manylora.server.model.opened import OpenedModel
from manylora.server.model.progress import Progress
from manylora.server.model.resolve import open_model, resolve
from manylora.server.model.stored_base import StoredBase
from manylora.server.model.writer import (
    MAX_SHARD,
    check_disk,
    check_new_directory,
    new_directory,
    write_groups,
    write_json,
)

DTYPE: Final = torch.bfloat16


@dataclass(frozen=True)
class Merged:
    """What `merge_checkpoint` wrote."""

    directory: Path
    n_modules: int
    """Modules of the base that the adapter changed, counting each layer's."""
    untied: bool
    """The base's lm_head was its embedding, and the merged model's is a matrix of its own."""
    chat_template: bool
    """The adapter brought its own chat template, which took the place of the base's."""
    warnings: tuple[str, ...]


def merge_checkpoint(
    base: str, adapter: str, out: str | os.PathLike[str], *, progress: bool = True, max_shard: int = MAX_SHARD
) -> Merged:
    """Merge the adapter (directory or hub id) into ``base`` (directory, GGUF file or hub id; 16/32 bits or NF4), and
    write the result to the new directory ``out``, which appears whole or not at all.

    NF4 is dequantised first. DoRA's norms are those of the base as it is given. Raises AdapterError, with every reason
    that there is against the adapter, or ModelError.
    """
    target = Path(out).expanduser()
    check_new_directory(target)
    found = resolve(base)
    opened = open_model(found)
    stored = StoredBase(opened)
    source = resolve_source(adapter)
    weights = load_peft_adapter(source, opened.spec.lora_shapes(), base=stored, base_name=found.name)
    reasons = _obstacles(opened.spec, weights.lora)
    if reasons:
        raise AdapterRefused(f"in {source}", reasons)
    opened.tokenizer()  # a checkpoint that cannot be served is not worth the wait
    merger = _Merger(opened, stored, weights)
    with new_directory(target) as directory:
        check_disk(f"{opened.what} merged, in bf16,", merger.nbytes(), directory)
        write_groups(merger.groups(progress=progress), directory, max_shard=max_shard)
        opened.save_tokenizer(directory)
        if weights.chat_template is not None:
            # Where transformers looks first.
            (directory / "chat_template.jinja").write_text(weights.chat_template, encoding="utf-8")
        if opened.generation_config:
            write_json(directory / "generation_config.json", opened.generation_config)
        write_json(directory / "config.json", merged_config(opened.config, tied=merger.tied))
    return Merged(
        directory=target,
        n_modules=len(_touched(weights.lora)),
        untied=opened.spec.tie_embeddings and not merger.tied,
        chat_template=weights.chat_template is not None,
        warnings=weights.report.warnings,
    )


def merged_config(config: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """The base's ``config.json`` for the merged weights: not quantised, bf16, ``tie_word_embeddings`` as they are."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    return kept | {"dtype": str(DTYPE).removeprefix("torch."), "tie_word_embeddings": tied}


def _touched(lora: LoraWeights) -> set[tuple[str, int]]:
    """Every module that an adapter changes."""
    return {*lora.pairs, *lora.vectors, *((projection, 0) for projection in lora.tables)}


def _obstacles(spec: ModelSpec, lora: LoraWeights) -> list[str]:
    """What of the adapter has no place in a checkpoint of this architecture."""
    homeless: dict[str, int] = {}
    for (projection, _), vectors in lora.vectors.items():
        has_bias = projection not in GLOBAL_PROJECTIONS and spec.has_bias(projection)
        if vectors.bias is not None and not has_bias:
            homeless[projection] = homeless.get(projection, 0) + 1
    reasons = [
        f"it adds a bias to `{projection}` ({count} of them), and {spec.architecture} with this config has none there; "
        "PEFT cannot merge it either. Serve it with `manylora serve --adapter` instead"
        for projection, count in homeless.items()
    ]
    for projection, table in lora.tables.items():
        beyond = int((table.ids >= spec.vocab_size).sum())
        if beyond:
            reasons.append(
                f"it has {beyond} rows of `{projection}` beyond the base's vocabulary of {spec.vocab_size}; merging "
                "added tokens is not supported. Serve it with `manylora serve --adapter` instead"
            )
    return reasons


class _Merger:
    """The merged tensors, by checkpoint name."""

    def __init__(self, opened: OpenedModel, stored: StoredBase, weights: AdapterWeights) -> None:
        self._opened, self._stored, self._lora = opened, stored, weights.lora
        self._shapes = {**plain_shapes(opened.spec), **projection_shapes(opened.spec)}
        self._embed = embed_name(opened.spec)
        self.tied = opened.spec.tie_embeddings
        """Whether the merged lm_head is the merged embedding; known once those have been made."""

    def nbytes(self) -> int:
        """Bytes of the merged tensors; the most that they can be before it is known whether they are tied."""
        sizes = sum(torch.Size(shape).numel() for shape in self._shapes.values())
        if self.tied and (("embed", 0) in _touched(self._lora) or ("lm_head", 0) in _touched(self._lora)):
            sizes += torch.Size(self._shapes[self._embed]).numel()
        return sizes * DTYPE.itemsize

    def groups(self, *, progress: bool) -> Iterator[dict[str, torch.Tensor]]:
        """All tensors, in bf16, a few at a time. Raises ModelError for values that bf16 does not hold."""
        with Progress("Merging", self.nbytes(), show=progress) as bar:
            for group in self._tensors():
                rounded = {name: self._round(name, tensor) for name, tensor in group.items()}
                group.clear()
                if self.tied and LM_HEAD in rounded:
                    self.tied = torch.equal(rounded[LM_HEAD], rounded[self._embed])
                    if self.tied:
                        del rounded[LM_HEAD]
                yield rounded
                bar.advance(sum(int(tensor.nbytes) for tensor in rounded.values()))

    def _tensors(self) -> Iterator[dict[str, torch.Tensor]]:
        spec = self._opened.spec
        merged = {self._embed, LM_HEAD}
        yield self._tables()
        for stored in stored_weights(spec):
            merged |= {stored.weight, stored.bias}
            weights, biases = [], []
            for projection in stored.projections:
                weights.append(self._weight(projection, stored.layer))
                vectors = self._lora.vectors.get((projection, stored.layer))
                with _naming(stored.bias):
                    summed = merge_bias(self._stored.bias(projection, stored.layer), vectors)
                biases += [] if summed is None else [summed]
            whole = torch.cat(weights) if len(weights) > 1 else weights[0]
            yield {stored.weight: whole.T.contiguous() if stored.transposed else whole}
            if biases:
                yield {stored.bias: torch.cat(biases)}
        for name in self._shapes:
            if name not in merged:
                yield {name: self._stored.plain(name)}

    def _weight(self, projection: str, layer: int) -> torch.Tensor:
        module = (projection, layer)
        weight, lora = self._stored.weight(projection, layer), self._lora
        if module not in lora.pairs and module not in lora.vectors:
            return weight
        with _naming(stored_weight(self._opened.spec, projection, layer).weight):
            return merge_weight(weight, lora.pairs.get(module), lora.vectors.get(module))

    def _tables(self) -> dict[str, torch.Tensor]:
        """The embedding and, unless it stays the embedding, the output layer."""
        touched = _touched(self._lora)
        tables = {self._embed: self._table("embed")}
        if not self.tied or ("embed", 0) in touched or ("lm_head", 0) in touched:
            tables[LM_HEAD] = self._table("lm_head")
        return tables

    def _table(self, projection: str) -> torch.Tensor:
        table, lora, module = self._stored.table(projection), self._lora, (projection, 0)
        with _naming(self._embed if projection == "embed" else LM_HEAD):
            if projection in lora.tables:
                return merge_table(table, lora.tables[projection])
            if module not in lora.pairs and module not in lora.vectors:
                return table
            merge = merge_embedding if projection == "embed" else merge_weight
            return merge(table, lora.pairs.get(module), lora.vectors.get(module))

    def _round(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        rounded = tensor.to(DTYPE)
        with _naming(name):
            if not bool(torch.isfinite(rounded).all()):
                raise ValueError("the sum is beyond what bf16 holds")
        return rounded


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turns a ValueError of the tensor maths into a ModelError that names the weight."""
    try:
        yield
    except ValueError as error:
        raise ModelError(f"Merging fails at {name}: {error}.") from error
