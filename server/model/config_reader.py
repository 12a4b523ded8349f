"""Reading a ``config.json`` into a `ModelSpec`: what all families have in common, and where they may differ.

Torch-free. Every reason to refuse a config is collected before any is raised. The families themselves are in
``config_readers.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from manylora.server.model.errors import UnsupportedModel
from manylora.server.model.families import Family, LayerType, ModelSpec
from manylora.server.model.rope import RopeSpec, parse_rope


def _absent(value: Any) -> bool:
    return value is None or value is False or value == 0 or value in ([], {}, "")


def _one(value: Any) -> bool:
    return value is None or value == 1


NEUTRAL: Final[Mapping[str, Callable[[Any], bool]]] = {
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


class ConfigReader:
    """Reads the config of one family. A family overrides the class variables, and the methods whose answer is its own.

    ``reads``: keys of ``NEUTRAL`` that it understands; the defaults are those of its config class. ``spec`` raises
    UnsupportedModel; all other methods add to ``reasons``.
    """

    family: ClassVar[Family]
    keys: ClassVar[Mapping[str, str]] = {}
    """The family's own spelling of keys, where it is not Llama's."""
    reads: ClassVar[frozenset[str]] = frozenset()
    default_eps: ClassVar[float] = 1e-6
    default_theta: ClassVar[float] = 10_000.0
    tied_by_default: ClassVar[bool] = False

    def __init__(self, config: Mapping[str, Any], what: str) -> None:
        self.config = config
        self.what = what
        self.reasons: list[str] = []

    def spec(self, architecture: str, generation_config: Mapping[str, Any]) -> ModelSpec:
        """The whole architecture, or UnsupportedModel with every reason against it."""
        self.refuse_features()
        hidden = self.size("hidden_size")
        n_layers = self.size("num_hidden_layers")
        n_heads = self.size("num_attention_heads")
        n_kv_heads = self.size("num_key_value_heads", default=self.default_kv_heads(n_heads))
        head_dim = self.size("head_dim", default=self.default_head_dim(hidden, n_heads))
        max_position = self.size("max_position_embeddings")
        if n_kv_heads and n_heads % n_kv_heads:
            self.reasons.append(f"{n_heads} attention heads are not a multiple of {n_kv_heads} key-value heads")
        if head_dim % 2:
            self.reasons.append(f"rotary embeddings need an even head_dim, got {head_dim}")
        rope = self.rope(max_position)
        sliding_window, layer_types = self.windows(n_layers)
        spec = ModelSpec(
            family=self.family,
            architecture=architecture,
            vocab_size=self.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.size("intermediate_size", default=self.default_intermediate_size(hidden)),
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=self.eps(),
            max_position=max_position,
            rope=rope,
            layer_ropes=self.layer_ropes(rope, layer_types),
            sliding_window=sliding_window,
            layer_types=layer_types,
            tie_embeddings=bool(self.config.get("tie_word_embeddings", self.tied_by_default)),
            bos_token_id=next(iter(self._token_ids(self.config.get("bos_token_id"))), None),
            eos_token_ids=self._eos(generation_config),
            dtype=self.dtype(),
            **self.traits(),
        )
        if self.reasons:
            raise UnsupportedModel(self.what, list(dict.fromkeys(self.reasons)))
        return spec

    # --- what differs between families ------------------------------------------------------------------------------

    def traits(self) -> dict[str, Any]:
        """The remaining fields of `ModelSpec`, by name."""
        return {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_norm": False}

    def default_kv_heads(self, n_heads: int) -> int | None:
        """What ``num_key_value_heads`` is if the config does not say; None: its absence would be a guess."""
        return None

    def default_intermediate_size(self, hidden: int) -> int | None:
        return None

    def default_head_dim(self, hidden: int, n_heads: int) -> int:
        return hidden // max(n_heads, 1)

    def rope(self, max_position: int) -> RopeSpec:
        rope, reasons = parse_rope(self.config, max_position, default_theta=self.default_theta)
        self.reasons += reasons
        return rope

    def layer_ropes(self, rope: RopeSpec, layer_types: tuple[LayerType, ...]) -> tuple[RopeSpec | None, ...]:
        """Each layer's rotary embedding; None for a layer without."""
        return (rope,) * len(layer_types)

    def windows(self, n_layers: int) -> tuple[int | None, tuple[LayerType, ...]]:
        """The attention window in tokens, if there is one, and which layers have it."""
        every: LayerType = "full_attention"
        return None, (every,) * n_layers

    def activation(self) -> None:
        """Refuse any other activation than the family's."""
        self.only("hidden_act", "silu")

    def only(self, key: str, known: str) -> None:
        """Refuse any other value of ``key``, which is the activation's; absent, it is ``known``."""
        activation = self.config.get(key, known)
        if activation != known:
            self.reasons.append(f"activation `{activation}` (known: {known})")

    def refuse_features(self) -> None:
        for key, neutral in NEUTRAL.items():
            if key not in self.reads and not neutral(self.config.get(key)):
                self.reasons.append(f"config feature `{key}` = {self.config[key]!r}")
        self.activation()
        self.custom_code()
        self.reasons += _refuse_quantization(self.config.get("quantization_config"))

    def custom_code(self) -> None:
        if self.config.get("auto_map"):
            self.reasons.append("custom model code (`auto_map`), which is never run")

    # --- single keys --------------------------------------------------------------------------------------------------

    def size(self, key: str, *, default: int | None = None) -> int:
        """A positive integer; ``default`` where the key is absent or null."""
        key = self.keys.get(key, key)
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            self.reasons.append(
                f"config key `{key}` is missing" if value is None else f"`{key}` must be a positive integer: {value!r}"
            )
            return 0
        return value

    def eps(self) -> float:
        key = self.keys.get("rms_norm_eps", "rms_norm_eps")
        eps = self.config.get(key, self.default_eps)
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
            self.reasons.append(f"`{key}` must be a small positive number, got {eps!r}")
            return 1e-6
        return float(eps)

    def positive(self, key: str, default: float | None) -> float | None:
        """A positive number, or null; ``default`` where the key is absent."""
        value = self.config.get(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.reasons.append(f"`{key}` must be a positive number or null, got {value!r}")
            return None
        return float(value)

    def window(self, default: int | None) -> int | None:
        """``sliding_window``: a number of tokens, or null; ``default`` where the key is absent."""
        window = self.config.get("sliding_window", default)
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window <= 0):
            self.reasons.append(f"`sliding_window` must be a positive integer or null, got {window!r}")
            return None
        return window

    def layer_types(
        self, window: int | None, derived: tuple[LayerType, ...]
    ) -> tuple[int | None, tuple[LayerType, ...]]:
        """``layer_types`` if the config has it, else what the family derives; and the window, if any layer has it."""
        given, types = self.config.get("layer_types"), derived
        if given is not None:
            if not isinstance(given, list) or set(given) - {"full_attention", "sliding_attention"}:
                self.reasons.append(f"layer types other than full and sliding attention: {given!r}")
            elif len(given) != len(derived):
                self.reasons.append(f"`layer_types` names {len(given)} layers of {len(derived)}")
            else:
                types = tuple(given)
        if "sliding_attention" in types and window is None:
            self.reasons.append("`layer_types` has sliding-window layers, but no sliding window is in use")
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

    def dtype(self) -> str:
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
