"""The model families that are served, each config read into one `ModelSpec`: the whole architecture as data.

Torch-free. A config feature that the decoder would not compute in full is refused by name, with all the others found;
keys that are absent mean what they mean to transformers (its config classes' defaults).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from manylora.kernels.sites import LoraShapes
from manylora.server.model.errors import UnsupportedModel
from manylora.server.model.rope import RopeKind, RopeSpec, parse_rope, rope_inv_freq

__all__ = ["ARCHITECTURES", "LayerType", "ModelSpec", "RopeKind", "RopeSpec", "rope_inv_freq"]

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
LayerType = Literal["full_attention", "sliding_attention"]

ARCHITECTURES: Final[Mapping[str, Family]] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""The served architectures and their ``model_type``."""


def _absent(value: Any) -> bool:
    return value is None or value is False or value == 0 or value in ([], {}, "")


def _one(value: Any) -> bool:
    return value is None or value == 1


_NEUTRAL: Final[Mapping[str, Callable[[Any], bool]]] = {
    # Features of other architectures, or of forks that kept a served architecture's name. Transformers ignores most
    # of them there; a model that was trained with one computes something else without it.
    "pretraining_tp": lambda value: _absent(value) or value == 1,
    "attn_logit_softcapping": _absent,
    "final_logit_softcapping": _absent,
    "logit_scale": _one,
    "logits_scaling": _one,
    "residual_multiplier": _one,
    "embedding_multiplier": _one,
    "scale_emb": _one,
    "scale_depth": _one,
    "clip_qkv": _absent,
    "use_qk_norm": _absent,
    "qk_layernorm": _absent,
    "parallel_attn": _absent,
    "use_parallel_residual": _absent,
    "alibi": _absent,
    "use_mrope": _absent,
    "dual_chunk_attention_config": _absent,
    "attention_chunk_size": _absent,
    "no_rope_layers": _absent,
    "kv_lora_rank": _absent,
    "num_local_experts": _absent,
    "num_experts": _absent,
    "n_routed_experts": _absent,
    "num_experts_per_tok": _absent,
    "vision_config": _absent,
    "audio_config": _absent,
    "text_config": _absent,
    "is_encoder_decoder": _absent,
    "add_cross_attention": _absent,
}
"""Config keys that must be absent or neutral for the decoder to compute the model in full."""


@dataclass(frozen=True)
class ModelSpec:
    """The architecture of a base model. Lengths are in elements, ``max_position`` in tokens.

    ``sliding_window`` is the number of positions a token of a ``sliding_attention`` layer sees, itself included
    (transformers: key > query - window). ``eos_token_ids`` holds every id that ends generation, the generation
    config's first. ``dtype`` names the 16/32-bit type the checkpoint was saved in (``bfloat16``).
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
    hidden_act: Literal["silu"] = "silu"

    @classmethod
    def from_hf_config(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None, *, what: str = "the model"
    ) -> ModelSpec:
        """Read ``config.json`` (and ``generation_config.json``); ``what`` names the model in the error.

        Raises UnsupportedModel with every reason found.
        """
        return _ConfigReader(config, what).spec(generation_config or {})

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
            "gate": inner,
            "up": inner,
            "down": hidden,
        }
        return LoraShapes(
            n_layers=self.n_layers,
            in_features={**into, "lm_head": hidden, "embed": vocab},
            out_features={**out, "lm_head": vocab, "embed": hidden},
        )


class _ConfigReader:
    """Reads one config, collecting every reason to refuse it before raising."""

    def __init__(self, config: Mapping[str, Any], what: str) -> None:
        self.config = config
        self.what = what
        self.reasons: list[str] = []

    def spec(self, generation_config: Mapping[str, Any]) -> ModelSpec:
        architecture = self._architecture()
        family = ARCHITECTURES[architecture]
        self._refuse_features(family)
        hidden = self._size("hidden_size")
        n_layers = self._size("num_hidden_layers")
        n_heads = self._size("num_attention_heads")
        # Only Llama lets it default to the number of heads (Llama 1); elsewhere its absence would be a guess.
        n_kv_heads = self._size("num_key_value_heads", default=n_heads if family == "llama" else None)
        head_dim = self._size("head_dim", default=128 if family == "qwen3" else hidden // max(n_heads, 1))
        max_position = self._size("max_position_embeddings")
        if n_kv_heads and n_heads % n_kv_heads:
            self.reasons.append(f"{n_heads} attention heads are not a multiple of {n_kv_heads} key-value heads")
        if head_dim % 2:
            self.reasons.append(f"rotary embeddings need an even head_dim, got {head_dim}")
        rope, reasons = parse_rope(self.config, max_position)
        self.reasons += reasons
        sliding_window, layer_types = self._windows(family, n_layers)
        attention_bias = bool(self.config.get("attention_bias", False))
        spec = ModelSpec(
            family=family,
            architecture=architecture,
            vocab_size=self._size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self._size("intermediate_size"),
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=self._eps(),
            max_position=max_position,
            rope=rope,
            sliding_window=sliding_window,
            layer_types=layer_types,
            qkv_bias=True if family == "qwen2" else attention_bias and family in ("llama", "qwen3"),
            o_bias=attention_bias and family in ("llama", "qwen3"),
            mlp_bias=bool(self.config.get("mlp_bias", False)) and family == "llama",
            qk_norm=family == "qwen3",
            tie_embeddings=bool(self.config.get("tie_word_embeddings", False)),
            bos_token_id=next(iter(self._token_ids(self.config.get("bos_token_id"))), None),
            eos_token_ids=self._eos(generation_config),
            dtype=self._dtype(),
        )
        if self.reasons:
            raise UnsupportedModel(self.what, self.reasons)
        return spec

    def _architecture(self) -> str:
        known = ", ".join(ARCHITECTURES)
        named = self.config.get("architectures") or []
        if not isinstance(named, list) or len(named) != 1 or named[0] not in ARCHITECTURES:
            found = ", ".join(map(str, named)) if isinstance(named, list) and named else "none"
            raise UnsupportedModel(self.what, f"architecture {found} is not one of {known}")
        architecture = str(named[0])
        model_type = self.config.get("model_type", ARCHITECTURES[architecture])
        if model_type != ARCHITECTURES[architecture]:
            raise UnsupportedModel(self.what, f"architecture {architecture} with model_type `{model_type}`")
        return architecture

    def _refuse_features(self, family: Family) -> None:
        for key, neutral in _NEUTRAL.items():
            if not neutral(self.config.get(key)):
                self.reasons.append(f"config feature `{key}` = {self.config[key]!r}")
        activation = self.config.get("hidden_act", "silu")
        if activation != "silu":
            self.reasons.append(f"activation `{activation}` (known: silu)")
        if self.config.get("auto_map"):
            self.reasons.append("custom model code (`auto_map`), which is never run")
        # transformers ignores these keys for these families: the weights they would need are not in its model.
        if family == "qwen2" and self.config.get("attention_bias") is False:
            self.reasons.append("a Qwen2 model without attention biases")
        if family == "mistral" and self.config.get("attention_bias"):
            self.reasons.append("a Mistral model with attention biases")
        if family != "llama" and self.config.get("mlp_bias"):
            self.reasons.append(f"MLP biases in a {family} model")
        self.reasons += _refuse_quantization(self.config.get("quantization_config"))

    def _size(self, key: str, *, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            self.reasons.append(
                f"config key `{key}` is missing" if value is None else f"`{key}` must be a positive integer: {value!r}"
            )
            return 0
        return value

    def _eps(self) -> float:
        eps = self.config.get("rms_norm_eps", 1e-6)
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
            self.reasons.append(f"`rms_norm_eps` must be a small positive number, got {eps!r}")
            return 1e-6
        return float(eps)

    def _windows(self, family: Family, n_layers: int) -> tuple[int | None, tuple[LayerType, ...]]:
        """The window, and which layers have it: all of Mistral's, some or none of Qwen's, none of Llama's."""
        # Mistral 7B v0.1 relied on the class default; a file that says null (v0.2 on) has no window.
        window = self.config.get("sliding_window", 4096 if family in ("mistral", "qwen2", "qwen3") else None)
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window <= 0):
            self.reasons.append(f"`sliding_window` must be a positive integer or null, got {window!r}")
            window = None
        if family == "llama" and window is not None:
            self.reasons.append("a sliding window in a Llama model")
        if family in ("qwen2", "qwen3") and not self.config.get("use_sliding_window", False):
            window = None
        first = self.config.get("max_window_layers", 28) if family in ("qwen2", "qwen3") else 0
        derived: tuple[LayerType, ...] = tuple(
            "sliding_attention" if window is not None and layer >= first else "full_attention"
            for layer in range(n_layers)
        )
        given = self.config.get("layer_types")
        if given is None:
            types = derived
        elif not isinstance(given, list) or set(given) - {"full_attention", "sliding_attention"}:
            self.reasons.append(f"layer types other than full and sliding attention: {given!r}")
            types = derived
        elif len(given) != n_layers:
            self.reasons.append(f"`layer_types` names {len(given)} layers of {n_layers}")
            types = derived
        else:
            types = tuple(given)
        if "sliding_attention" in types and window is None:
            self.reasons.append("`layer_types` has sliding-window layers, but no sliding window is in use")
        if family in ("llama", "mistral") and types != derived:
            self.reasons.append(f"`layer_types` in a {family} model, which transformers does not apply")
        return (window if "sliding_attention" in types else None), types

    def _token_ids(self, value: Any) -> tuple[int, ...]:
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in values):
            self.reasons.append(f"token ids must be non-negative integers, got {value!r}")
            return ()
        return tuple(values)

    def _eos(self, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
        ids = self._token_ids(generation_config.get("eos_token_id"))
        return tuple(dict.fromkeys((*ids, *self._token_ids(self.config.get("eos_token_id")))))

    def _dtype(self) -> str:
        """transformers 5 writes ``dtype``, earlier versions ``torch_dtype``; without one it loads as fp32."""
        name = str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32").removeprefix("torch.")
        if name not in ("bfloat16", "float16", "float32"):
            self.reasons.append(f"weights of type `{name}` (known: bfloat16, float16, float32)")
        return name


def _refuse_quantization(quantization: Any) -> list[str]:
    """Reasons why a ``quantization_config`` is not the bitsandbytes NF4 that the loader reads."""
    if quantization is None:
        return []
    if not isinstance(quantization, Mapping):
        return [f"`quantization_config` is not an object: {quantization!r}"]
    method = quantization.get("quant_method")
    if method != "bitsandbytes":
        return [f"quantisation method `{method}` (known: bitsandbytes NF4); serve the unquantised checkpoint"]
    if not (quantization.get("load_in_4bit") or quantization.get("_load_in_4bit")):
        return ["bitsandbytes quantisation that is not 4-bit; serve the unquantised checkpoint"]
    kind = quantization.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        return [f"bitsandbytes 4-bit type `{kind}` (known: nf4); serve the unquantised checkpoint"]
    return []
