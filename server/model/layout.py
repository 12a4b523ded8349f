"""Which tensors a checkpoint of each family holds, by transformers' names; the check that it holds exactly those."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from manylora.kernels.sites import SEPARATE
from manylora.server.model.errors import BadCheckpoint, UnsupportedModel
from manylora.server.model.families import ModelSpec

LM_HEAD: Final = "lm_head.weight"
POSITIONS: Final = "transformer.wpe.weight"

_IGNORED: Final = re.compile(r"(.*\.)?rotary_emb\.inv_freq|transformer\.h\.\d+\.attn\.(masked_)?bias")
"""Buffers of older transformers that are computed from the config (GPT-2's are its causal mask)."""

REQUIRED_PARTS: Final = ("absmax", "quant_map", "quant_state.bitsandbytes__nf4")
NESTED_PARTS: Final = ("nested_absmax", "nested_quant_map")
"""What bitsandbytes stores beside an NF4 ``….weight``: always, and when its scales are quantised too."""


@dataclass(frozen=True)
class StoredWeight:
    """One linear layer of one block as a checkpoint has it: ``projections`` lie in its weight ``(N, K)`` one behind the
    other, and in its bias, which it has if ``has_bias``."""

    path: str
    layer: int
    projections: tuple[str, ...]
    shape: tuple[int, int]
    has_bias: bool
    sizes: tuple[int, ...]
    """Rows of each projection."""
    transposed: bool = False
    """Whether a checkpoint that is not quantised has it as ``(K, N)``; in NF4 it is always ``(N, K)``."""

    @property
    def plain_shape(self) -> tuple[int, int]:
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def weight(self) -> str:
        return f"{self.path}.weight"

    @property
    def bias(self) -> str:
        return f"{self.path}.bias"

    def rows(self, projection: str) -> slice:
        """Where a projection's rows are."""
        place = self.projections.index(projection)
        first = sum(self.sizes[:place])
        return slice(first, first + self.sizes[place])


def stored_weights(spec: ModelSpec) -> list[StoredWeight]:
    """Every linear layer of the blocks, in layer order."""
    shapes = spec.lora_shapes()
    found = []
    for layer in range(spec.n_layers):
        for linear in spec.names.linears:
            sizes = tuple(shapes.out_features[p] for p in linear.projections)
            shape = sum(sizes), shapes.in_features[linear.projections[0]]
            has_bias = spec.has_bias(linear.projections[0])
            path = spec.names.path(linear, layer)
            stored = StoredWeight(path, layer, linear.projections, shape, has_bias, sizes, spec.names.transposed)
            found.append(stored)
    return found


def stored_weight(spec: ModelSpec, projection: str, layer: int) -> StoredWeight:
    """The linear layer that holds a projection."""
    return next(one for one in stored_weights(spec) if one.layer == layer and projection in one.projections)


def projection_weight(projection: str, layer: int) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` for ``("q", 3)``, where each projection is a module of its own."""
    return f"{_separate(projection, layer)}.weight"


def projection_bias(projection: str, layer: int) -> str:
    return f"{_separate(projection, layer)}.bias"


def _separate(projection: str, layer: int) -> str:
    linear = next(linear for linear in SEPARATE.linears if linear.projections == (projection,))
    return SEPARATE.path(linear, layer)


@dataclass(frozen=True)
class NormNames:
    """What the norms of a block are called, by what they do; ``attention_out`` and ``mlp_out``, if there are such, norm
    what is then added to the residual stream."""

    attention: str = "input_layernorm"
    mlp: str = "post_attention_layernorm"
    attention_out: str | None = None
    mlp_out: str | None = None
    final: str = "model.norm"
    """The full path of the last norm, which is of no block."""

    @property
    def of_block(self) -> tuple[str, ...]:
        named = (self.attention, self.mlp, self.attention_out, self.mlp_out)
        return tuple(name for name in named if name is not None)


_LLAMA_NORMS: Final = NormNames()
_OUT_NORMS: Final = NormNames(
    mlp="pre_feedforward_layernorm", attention_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm"
)
"""Gemma 2's. ``post_attention_layernorm`` is another norm there than Llama's of that name."""


_LAYER_NORMS: Final = NormNames("ln_1", "ln_2", final="transformer.ln_f")
"""GPT-2's."""


def norm_names(spec: ModelSpec) -> NormNames:
    if spec.norm == "layer":
        return _LAYER_NORMS
    return _OUT_NORMS if spec.out_norms else _LLAMA_NORMS


def norm_path(spec: ModelSpec, norm: str, layer: int) -> str:
    """``norm``: one of `NormNames`, ``self_attn.q_norm`` or ``self_attn.k_norm``."""
    return f"{spec.names.blocks}.{layer}.{norm}"


def embed_name(spec: ModelSpec) -> str:
    """The embedding's weight."""
    return f"{spec.names.embed}.weight"


def projection_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Weight name -> ``(N, K)`` of every weight that is quantised, in layer order."""
    return {stored.weight: stored.shape for stored in stored_weights(spec)}


def plain_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that stays in 16 or 32 bits. A tied ``lm_head`` is not among them."""
    hidden = spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {embed_name(spec): (spec.vocab_size, hidden)}
    names = norm_names(spec)
    norms = [names.final]
    for layer in range(spec.n_layers):
        norms += [norm_path(spec, norm, layer) for norm in names.of_block]
        if spec.qk_norm:
            heads = (norm_path(spec, norm, layer) for norm in ("self_attn.q_norm", "self_attn.k_norm"))
            shapes |= {f"{norm}.weight": (spec.head_dim,) for norm in heads}
    parts = ("weight", "bias") if spec.norm == "layer" else ("weight",)
    shapes |= {f"{norm}.{part}": (hidden,) for norm in norms for part in parts}
    if spec.learned_positions:
        shapes[POSITIONS] = (spec.max_position, hidden)
    shapes |= {stored.bias: stored.shape[:1] for stored in stored_weights(spec) if stored.has_bias}
    if not spec.tie_embeddings:
        shapes[LM_HEAD] = (spec.vocab_size, hidden)
    return shapes


def check_plain(what: str, spec: ModelSpec, found: Mapping[str, tuple[int, ...]]) -> None:
    """Check an unquantised checkpoint's tensor names and shapes; raises BadCheckpoint with everything wrong."""
    stored = {one.weight: one.plain_shape for one in stored_weights(spec)}
    _check(what, {**plain_shapes(spec), **stored}, dict(found))


def check_quantized(what: str, spec: ModelSpec, found: Mapping[str, tuple[int, ...]]) -> None:
    """Check an NF4 checkpoint's tensor names, and the shapes of what is not packed; raises BadCheckpoint."""
    names = dict(found)
    if f"{LM_HEAD}.absmax" in names:
        raise UnsupportedModel(what, "its lm_head is quantised too; quantise the 16-bit model with `manylora quantize`")
    expected: dict[str, tuple[int, ...] | None] = dict(plain_shapes(spec))
    kept: list[str] = []
    for weight, shape in projection_shapes(spec).items():
        parts = [f"{weight}.{part}" for part in (*REQUIRED_PARTS, *NESTED_PARTS)]
        if names.get(weight) == shape and not any(part in names for part in parts):
            kept.append(weight)
        nested = any(f"{weight}.{part}" in names for part in NESTED_PARTS)
        expected |= dict.fromkeys((weight, *(parts if nested else parts[: len(REQUIRED_PARTS)])))
    if kept:
        raise UnsupportedModel(
            what,
            f"{len(kept)} projections are not quantised ({', '.join(kept)}); quantise the 16-bit model with "
            "`manylora quantize`",
        )
    _check(what, expected, names)


def _check(what: str, expected: Mapping[str, tuple[int, ...] | None], found: Mapping[str, tuple[int, ...]]) -> None:
    missing = sorted(name for name in expected if name not in found)
    # A tied head may be stored all the same; the loader compares it with the embedding.
    unexpected = [name for name in found if name not in expected and name != LM_HEAD and not _IGNORED.fullmatch(name)]
    reasons = []
    if missing:
        reasons.append(f"{len(missing)} tensors are missing: {', '.join(missing)}")
    if unexpected:
        reasons.append(f"{len(unexpected)} tensors are not part of this architecture: {', '.join(sorted(unexpected))}")
    reasons += [
        f"{name} has shape {list(found[name])}, the config says {list(shape)}"
        for name, shape in expected.items()
        if shape is not None and name in found and found[name] != shape
    ]
    if reasons:
        raise BadCheckpoint(what, reasons)
