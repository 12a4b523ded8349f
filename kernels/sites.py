"""Where a LoRA adapter can act in the decoder: projections, the fused sites that hold them, and their shapes.

Torch-free, so that adapter checks and the scheduler's tests import it in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

RANK_PAGE: Final = 16
"""Ranks are stored in pages of this many; an adapter of rank r costs ceil(r / RANK_PAGE) pages per projection."""

LAYER_PROJECTIONS: Final = ("q", "k", "v", "o", "gate", "up", "down")
"""The seven projections of a decoder layer, in the order every per-projection table uses."""

GLOBAL_PROJECTIONS: Final = ("lm_head", "embed")
"""Projections that exist once in the model: treated as having a single layer 0."""

PROJECTIONS: Final = LAYER_PROJECTIONS + GLOBAL_PROJECTIONS

SITES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",), "lm_head": ("lm_head",)}
)
"""The fused linear layers. A site's output is the concatenation of its projections' outputs, in this order."""


@dataclass(frozen=True)
class LinearModule:
    """A linear layer of a block as a checkpoint and PEFT have it: ``path`` within the block, and the projections that
    its weight holds, their rows one behind the other."""

    path: str
    projections: tuple[str, ...]


@dataclass(frozen=True)
class ModuleNames:
    """What transformers calls the modules of a base model. ``blocks`` and the paths of ``linears`` make the full path
    of a layer's module, ``model.layers.3.self_attn.q_proj``."""

    linears: tuple[LinearModule, ...]
    blocks: str = "model.layers"
    embed: str = "model.embed_tokens"
    head: str = "lm_head"
    transposed: bool = False
    """Whether the layers' weights are stored as ``[in, out]`` (Conv1D)."""

    def path(self, linear: LinearModule, layer: int) -> str:
        return f"{self.blocks}.{layer}.{linear.path}"

    @property
    def prefix(self) -> str:
        """What begins the names of all modules but the output layer: ``model.``"""
        return self.embed[: self.embed.index(".") + 1]

    def table(self, projection: str) -> str:
        """The path of ``embed`` or ``lm_head``."""
        return self.embed if projection == "embed" else self.head


SEPARATE: Final = ModuleNames(
    (
        LinearModule("self_attn.q_proj", ("q",)),
        LinearModule("self_attn.k_proj", ("k",)),
        LinearModule("self_attn.v_proj", ("v",)),
        LinearModule("self_attn.o_proj", ("o",)),
        LinearModule("mlp.gate_proj", ("gate",)),
        LinearModule("mlp.up_proj", ("up",)),
        LinearModule("mlp.down_proj", ("down",)),
    )
)
"""Llama's names, which most families have: a module for each projection."""

FUSED: Final = ModuleNames(
    (
        LinearModule("self_attn.qkv_proj", ("q", "k", "v")),
        LinearModule("self_attn.o_proj", ("o",)),
        LinearModule("mlp.gate_up_proj", ("gate", "up")),
        LinearModule("mlp.down_proj", ("down",)),
    )
)
"""Phi-3's."""

CONV1D: Final = ModuleNames(
    (
        LinearModule("attn.c_attn", ("q", "k", "v")),
        LinearModule("attn.c_proj", ("o",)),
        LinearModule("mlp.c_fc", ("up",)),
        LinearModule("mlp.c_proj", ("down",)),
    ),
    blocks="transformer.h",
    embed="transformer.wte",
    transposed=True,
)
"""GPT-2's, whose MLP has no gate."""


@dataclass(frozen=True)
class LoraShapes:
    """The shapes that a LoRA adapter of one base model must have, and what the modules are called.

    ``in_features[p]`` and ``out_features[p]`` are the K and N of projection ``p``'s weight ``[N, K]``. For ``embed``
    K is the vocabulary size (its input is a one-hot token) and N the hidden size. A projection that the base does not
    have has N = 0: the site that would hold it is computed without.
    """

    n_layers: int
    in_features: Mapping[str, int]
    out_features: Mapping[str, int]
    names: ModuleNames = SEPARATE

    def layers_of(self, projection: str) -> int:
        """Number of layers that have ``projection``: 1 for the global ones."""
        return 1 if projection in GLOBAL_PROJECTIONS else self.n_layers

    def site_offsets(self, site: str) -> tuple[int, ...]:
        """Column where each projection of ``site`` starts in the site's fused output, and the total at the end."""
        offsets = [0]
        for projection in SITES[site]:
            offsets.append(offsets[-1] + self.out_features[projection])
        return tuple(offsets)
