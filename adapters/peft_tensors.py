"""The tensors of an ``adapter_model.safetensors``, sorted by what they are. Works on names and shapes only.

Only the names that PEFT itself writes are accepted; prefixes are not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from manylora.adapters.kinds.kind import Place, Shape
from manylora.adapters.safetensors_file import TensorEntry
from manylora.kernels.sites import GLOBAL_PROJECTIONS, LoraShapes

PREFIX: Final = "base_model.model."
_LAYER: Final = re.compile(r"model\.layers\.(\d{1,9})\.")

PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "LORA": ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_B.bias",
             "lora_magnitude_vector"),
    "ADALORA": ("lora_A", "lora_B", "lora_E"),
    "VERA": ("vera_lambda_b", "vera_lambda_d"),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "TRAINABLE_TOKENS": (),
}  # fmt: skip
"""How the names of a module's tensors end, by ``peft_type``."""

_SHARED: Final[Mapping[str, tuple[str, ...]]] = {"VERA": ("base_model.vera_A", "base_model.vera_B")}
_TOKENS: Final = {
    "LORA": "token_adapter.trainable_tokens_delta",
    "ADALORA": "token_adapter.trainable_tokens_delta",
    "TRAINABLE_TOKENS": "trainable_tokens_delta",
}

# Tensors that no served adapter of the type has: pattern, the config field that would have announced it, what to say.
_FEATURES: Final = (
    (re.compile(r"lora_magnitude_vector"), "use_dora", "with DoRA magnitudes, which this type does not have"),
    (re.compile(r"trainable_tokens_delta"), "trainable_token_indices", "with retrained token embeddings"),
    (re.compile(r"\.modules_to_save\."), "modules_to_save",
     "of modules_to_save under PEFT's inner names; save the adapter with PEFT's save_pretrained, not with torch"),
    (re.compile(r"\.lora_diag"), "kasa_config", "with KaSA singular values, which are not served"),
    (re.compile(r"\.(lora_E|ranknum)$"), "peft_type", "of AdaLoRA, in an adapter of another type"),
    (re.compile(r"\.hada_t[12]$|\.lokr_t2$"), "use_effective_conv2d", "of convolutions, which are not served"),
    (re.compile(r"(lora_(embedding_)?[AB]|vera_lambda_[bd]|hada_w._.|lokr_w[^.]*)\.(?!weight$)[^.]+(\.weight)?$"), "",
     "with names that still hold the adapter's name; save the adapter with PEFT's save_pretrained, not with torch"),
)  # fmt: skip


def places_of(shapes: LoraShapes) -> dict[str, Place]:
    """Every module that an adapter of this base may adapt, by PEFT's path of it, in the order of the projections."""
    places: dict[str, Place] = {}
    names, into, out = shapes.names, shapes.in_features, shapes.out_features
    for linear in names.linears:
        first, *others = linear.projections
        sizes = tuple(out[p] for p in linear.projections)
        for layer in range(shapes.n_layers):
            path = names.path(linear, layer)
            places[path] = Place(path, first, layer, into[first], sum(sizes), tuple(others), sizes if others else ())
    for projection in GLOBAL_PROJECTIONS:
        path = names.table(projection)
        places[path] = Place(path, projection, 0, into[projection], out[projection])
    return places


@dataclass
class SortedTensors:
    """``parts[module][ending]``, and the rest by module; and the problems found, grouped by kind."""

    parts: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)
    shared: dict[str, TensorEntry] = field(default_factory=dict)
    whole: dict[str, TensorEntry] = field(default_factory=dict)
    """Whole weights of the embedding and the output layer: modules_to_save, or what PEFT saved beside."""
    frozen: dict[str, TensorEntry] = field(default_factory=dict)
    """Copies of those two that PEFT saved because it adapted, and so froze, the module."""
    tokens: dict[str, TensorEntry] = field(default_factory=dict)
    biases: dict[str, TensorEntry] = field(default_factory=dict)
    """Of a module of the base, adapted (``frozen_bias``) or not."""
    frozen_bias: set[str] = field(default_factory=set)
    problems: dict[str, list[str]] = field(default_factory=dict)

    def problem(self, kind: str, item: str) -> None:
        self.problems.setdefault(kind, []).append(item)


def sort_tensors(
    entries: Iterable[TensorEntry], peft_type: str, places: Mapping[str, Place], n_layers: int, told: frozenset[str]
) -> SortedTensors:
    """Sort the tensors of a file. Features whose config field is in ``told`` were refused already, and their tensors
    are not reported a second time."""
    result = SortedTensors()
    for entry in entries:
        if entry.name in _SHARED.get(peft_type, ()):
            result.shared[entry.name] = entry
        elif not entry.name.startswith(PREFIX):
            result.problem(f"tensors without the prefix {PREFIX} that PEFT writes", entry.name)
        elif not _sort_one(result, entry, entry.name.removeprefix(PREFIX), peft_type, places):
            _explain(result, entry, n_layers, told)
    return result


def _sort_one(
    result: SortedTensors, entry: TensorEntry, name: str, peft_type: str, places: Mapping[str, Place]
) -> bool:
    """Whether the tensor belongs to a module of the base."""
    for part in PARTS[peft_type]:
        module = name.removesuffix(f".{part}")
        if module != name and module in places:
            # An embedding has its own spelling of LoRA's factors, and only an embedding has it.
            if part.startswith(("lora_embedding", "lora_A", "lora_B")) and (
                part.startswith("lora_embedding") != (places[module].projection == "embed")
            ):
                return False
            result.parts.setdefault(module, {})[part] = entry
            return True
    module, _, last = name.rpartition(".")
    plain = module.removesuffix(".base_layer")
    if last == "weight" and _is_table(places.get(plain)):
        (result.whole if plain == module else result.frozen)[plain] = entry
        return True
    if last == "bias" and plain in places:
        result.biases[plain] = entry
        if plain != module:
            result.frozen_bias.add(plain)
        return True
    tokens = _TOKENS.get(peft_type)
    if tokens is not None and (module := name.removesuffix(f".{tokens}")) != name and _is_table(places.get(module)):
        result.tokens[module] = entry
        return True
    return False


def _is_table(place: Place | None) -> bool:
    return place is not None and place.projection in GLOBAL_PROJECTIONS


def _explain(result: SortedTensors, entry: TensorEntry, n_layers: int, told: frozenset[str]) -> None:
    module = entry.name.removeprefix(PREFIX)
    if (layer := _LAYER.match(module)) and int(layer[1]) >= n_layers:
        result.problem(f"layers that the base does not have (its layers are 0 to {n_layers - 1})", entry.name)
        return
    for pattern, config_field, what in _FEATURES:
        if pattern.search(entry.name):
            if not config_field or config_field not in told:
                result.problem(f"tensors {what}", entry.name)
            return
    if "modules_to_save" not in told:  # PEFT saves those under the module's own name
        result.problem("tensors that match no module of the base", entry.name)


def check_shape(entry: TensorEntry, expected: Shape, rank: int) -> str | None:
    """What is wrong with the shape of a module's tensor, given the rank that its config says."""
    if entry.shape == expected:
        return None
    why = ""
    if len(entry.shape) == len(expected):
        differ = [i for i, (have, want) in enumerate(zip(entry.shape, expected, strict=True)) if have != want]
        if len(differ) == 1 and expected[differ[0]] == rank:
            why = f" (rank {entry.shape[differ[0]]} in the file, {rank} by the config's r and rank_pattern)"
    return f"{entry.name} has shape {list(entry.shape)}, expected {list(expected)}{why}"


def check_table_shape(entry: TensorEntry, place: Place) -> str | None:
    """What is wrong with a whole embedding or output layer, whose shape is ``[vocab, hidden]``."""
    rows, columns = (place.n_in, place.n_out) if place.projection == "embed" else (place.n_out, place.n_in)
    if entry.shape == (rows, columns):
        return None
    hint = ""
    if len(entry.shape) == 2 and entry.shape[0] != rows:
        hint = " (was the vocabulary resized for training? added tokens are not served)"
    return f"{entry.name} has shape {list(entry.shape)}, the base's is {[rows, columns]}{hint}"
