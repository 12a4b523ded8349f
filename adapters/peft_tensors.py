"""The tensors of an ``adapter_model.safetensors``, sorted by what they are: a module's LoRA factor, a copy of a base
weight that PEFT saves beside an adapted embedding, or something that is not served. Works on names and shapes only.

Only the names that PEFT itself writes are accepted; prefixes are not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from manylora.adapters.safetensors_file import TensorEntry
from manylora.kernels.sites import LoraShapes

_PREFIX: Final = "base_model.model."
_LINEAR: Final = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_EMBEDDING: Final = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_embedding_(?P<side>[AB])")
_BASE_COPY: Final = re.compile(
    r"base_model\.model\.(?P<module>model\.embed_tokens|lm_head)(?P<lora>\.base_layer)?\.weight"
)
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.")
_EMBED_MODULE: Final = "model.embed_tokens"

# Tensors of features that are not served: pattern, the config field that would have announced it, what to say.
_FEATURES: Final = (
    (re.compile(r"lora_magnitude_vector"), "use_dora", "DoRA magnitudes, which are not served"),
    (re.compile(r"lora_[AB]\.bias$"), "lora_bias", "biases of lora_B, which are not served"),
    (re.compile(r"trainable_tokens_delta"), "trainable_token_indices", "retrained token embeddings, not served"),
    (re.compile(r"\.modules_to_save\."), "modules_to_save", "whole replaced modules, which are not served"),
    (re.compile(r"\.lora_diag"), "kasa_config", "KaSA singular values, which are not served"),
    (re.compile(r"\.lora_E$|\.ranknum$"), "peft_type", "AdaLoRA singular values, which are not served"),
    (re.compile(r"lora_(embedding_)?[AB]\.(?!weight$)[^.]+(\.weight)?$"), "",
     "names that still hold the adapter's name; save the adapter with PEFT's save_pretrained, not with torch"),
    (re.compile(r"\.bias$"), "bias", "trained biases, which are not served"),
)  # fmt: skip


def module_paths(shapes: LoraShapes) -> dict[str, tuple[str, int]]:
    """PEFT's path of every module that an adapter of this base may adapt, to its ``(projection, layer)``."""
    paths: dict[str, tuple[str, int]] = {}
    for projection in shapes.in_features:
        for layer in range(shapes.layers_of(projection)):
            if projection == "embed":
                path = _EMBED_MODULE
            elif projection == "lm_head":
                path = "lm_head"
            else:
                block = "self_attn" if projection in ("q", "k", "v", "o") else "mlp"
                path = f"model.layers.{layer}.{block}.{projection}_proj"
            paths[path] = (projection, layer)
    return paths


@dataclass
class SortedTensors:
    """``factors[module]["A" or "B"]``, copies of base weights by module, and the problems found, grouped by kind."""

    factors: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)
    base_copies: dict[str, TensorEntry] = field(default_factory=dict)
    frozen_copies: set[str] = field(default_factory=set)
    """Of ``base_copies``, those that PEFT saved because LoRA froze and adapted the module."""
    problems: dict[str, list[str]] = field(default_factory=dict)

    def problem(self, kind: str, item: str) -> None:
        self.problems.setdefault(kind, []).append(item)


def sort_tensors(
    entries: Iterable[TensorEntry], paths: Mapping[str, tuple[str, int]], n_layers: int, told: frozenset[str]
) -> SortedTensors:
    """Sort the tensors of a file. ``paths`` are the base's modules (``module_paths``); features whose config field is
    in ``told`` were refused already, and their tensors are not reported a second time."""
    result = SortedTensors()
    for entry in entries:
        factor = _LINEAR.fullmatch(entry.name) or _EMBEDDING.fullmatch(entry.name)
        # An embedding has its own spelling, and only an embedding has it.
        if factor and (factor["module"] == _EMBED_MODULE) == ("lora_embedding_" in entry.name):
            _add_factor(result, entry, factor["module"], factor["side"], paths, n_layers)
        elif match := _BASE_COPY.fullmatch(entry.name):
            if match["lora"] or "modules_to_save" not in told:
                result.base_copies[match["module"]] = entry
                if match["lora"]:
                    result.frozen_copies.add(match["module"])
        else:
            _explain(result, entry, told)
    return result


def _add_factor(
    result: SortedTensors,
    entry: TensorEntry,
    module: str,
    side: str,
    paths: Mapping[str, tuple[str, int]],
    n_layers: int,
) -> None:
    if module in paths:
        result.factors.setdefault(module, {})[side] = entry
    elif (layer := _LAYER.match(module)) and int(layer[1]) >= n_layers:
        result.problem(f"layers that the base does not have (its layers are 0 to {n_layers - 1})", entry.name)
    else:
        result.problem("tensors that match no module of the base", entry.name)


def _explain(result: SortedTensors, entry: TensorEntry, told: frozenset[str]) -> None:
    if not entry.name.startswith(_PREFIX):
        result.problem(f"tensors without the prefix {_PREFIX} that PEFT writes", entry.name)
        return
    for pattern, config_field, what in _FEATURES:
        if pattern.search(entry.name):
            if not config_field or config_field not in told:
                result.problem(f"tensors {'of' if config_field else 'with'} {what}", entry.name)
            return
    if "modules_to_save" not in told:  # PEFT saves those under the module's own name
        result.problem("tensors that match no module of the base", entry.name)


def check_shape(
    module: str, factors: Mapping[str, TensorEntry], rank: int, in_features: int, out_features: int
) -> list[str]:
    """What is wrong with a module's two factors, given the rank its config says and the base's shapes."""
    wrong = [
        f"{module} has no lora_{side}, only lora_{'B' if side == 'A' else 'A'}" for side in "AB" if side not in factors
    ]
    for side, entry in factors.items():
        expected = (rank, in_features) if side == "A" else (out_features, rank)
        if entry.shape == expected:
            continue
        axis = 0 if side == "A" else 1
        of_file = entry.shape[axis] if len(entry.shape) == 2 else None
        only_rank = of_file is not None and entry.shape[1 - axis] == expected[1 - axis]
        why = f" (rank {of_file} in the file, {rank} by the config's r and rank_pattern)" if only_rank else ""
        wrong.append(f"{entry.name} has shape {list(entry.shape)}, expected {list(expected)}{why}")
    return wrong


def check_copy_shape(entry: TensorEntry, rows: int, columns: int) -> str | None:
    """What is wrong with a copy of the embedding or of the output layer, whose shape is ``[vocab, hidden]``."""
    if entry.shape == (rows, columns):
        return None
    hint = " (was the vocabulary resized for training? added tokens are not served)"
    return f"{entry.name} has shape {list(entry.shape)}, the base's is {[rows, columns]}{hint}"
