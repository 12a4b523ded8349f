"""The model families that are served, each config read into one `ModelSpec`: the whole architecture as data.

Torch-free. A config feature that the decoder would not compute in full is refused by name, with all the others found;
keys that are absent mean what they mean to transformers (its config classes' defaults). ``config_reader.py`` and
``config_readers.py`` do the reading, family by family; docs/families.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from manylora.kernels.sites import CONV1D, FUSED, SEPARATE, LoraShapes, ModuleNames
from manylora.server.model.rope import RopeKind, RopeSpec, rope_inv_freq

__all__ = ["ARCHITECTURES", "Activation", "Family", "LayerType", "ModelSpec", "RopeKind", "RopeSpec", "rope_inv_freq"]

Family = Literal["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma2", "gemma3_text", "gpt2"]
LayerType = Literal["full_attention", "sliding_attention"]
Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu_tanh"]

ARCHITECTURES: Final[Mapping[str, Family]] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
    "Phi3ForCausalLM": "phi3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "GPT2LMHeadModel": "gpt2",
}
"""The served architectures and their ``model_type``."""

_NAMES: Final[Mapping[Family, ModuleNames]] = {"phi3": FUSED, "gpt2": CONV1D}
"""What the modules are called, where that is not what Llama calls them."""


@dataclass(frozen=True)
class ModelSpec:
    """The architecture of a base model. Lengths are in elements, ``max_position`` in tokens.

    ``sliding_window`` is the number of positions a token of a ``sliding_attention`` layer sees, itself included
    (transformers: key > query - window). ``eos_token_ids`` holds every id that ends generation, the generation
    config's first. ``dtype`` names the 16/32-bit type the checkpoint was saved in (``bfloat16``). ``rope`` is the
    model's rotary embedding, ``layer_ropes`` each layer's own: None where queries and keys are not rotated.

    What only some families have: ``norm_offset`` is added to the weight of every norm; ``out_norms``: what attention
    and MLP give is normed before it is added to the residual stream; ``embed_scale`` multiplies embeddings, adapters'
    deltas included; ``attention_scale`` multiplies scores, None for ``head_dim ** -0.5``; ``attention_softcap`` and
    ``logit_softcap`` c make ``c * tanh(s / c)`` of scores and logits s, 0 for none. ``norm`` "layer": LayerNorm with a
    bias, whose epsilon is ``rms_norm_eps`` too; not ``gated``: the MLP has no gate; ``learned_positions``: each
    position has a vector that is added to its token's embedding.
    """

    family: Family
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    rope: RopeSpec
    layer_ropes: tuple[RopeSpec | None, ...]
    sliding_window: int | None
    layer_types: tuple[LayerType, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str
    hidden_act: Activation = "silu"
    norm_offset: float = 0.0
    out_norms: bool = False
    embed_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    norm: Norm = "rms"
    gated: bool = True
    learned_positions: bool = False

    @classmethod
    def from_hf_config(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None, *, what: str = "the model"
    ) -> ModelSpec:
        """Read ``config.json`` (and ``generation_config.json``); ``what`` names the model in the error.

        Raises UnsupportedModel with every reason found.
        """
        from manylora.server.model.config_readers import read_config  # which needs this module

        return read_config(config, generation_config or {}, what)

    @property
    def names(self) -> ModuleNames:
        """What checkpoints and adapters call the modules."""
        return _NAMES.get(self.family, SEPARATE)

    @property
    def q_size(self) -> int:
        """Width of all query heads; the K of ``o`` (not always the hidden size: Qwen3)."""
        return self.n_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads."""
        return self.n_kv_heads * self.head_dim

    def window(self, layer: int) -> int | None:
        """The attention window of ``layer``; None when it sees every earlier position."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    def has_bias(self, projection: str) -> bool:
        """Whether a layer projection (kernels.sites.LAYER_PROJECTIONS) has a bias."""
        if projection in ("q", "k", "v"):
            return self.qkv_bias
        return self.o_bias if projection == "o" else self.mlp_bias

    def lora_shapes(self) -> LoraShapes:
        """K and N of every projection an adapter can act on; for ``embed`` K is the vocabulary."""
        hidden, inner, vocab = self.hidden_size, self.intermediate_size, self.vocab_size
        into = {"q": hidden, "k": hidden, "v": hidden, "o": self.q_size, "gate": hidden, "up": hidden, "down": inner}
        out = {
            "q": self.q_size,
            "k": self.kv_size,
            "v": self.kv_size,
            "o": hidden,
            "gate": inner if self.gated else 0,
            "up": inner,
            "down": hidden,
        }
        return LoraShapes(
            n_layers=self.n_layers,
            in_features={**into, "lm_head": hidden, "embed": vocab},
            out_features={**out, "lm_head": vocab, "embed": hidden},
            names=self.names,
        )
