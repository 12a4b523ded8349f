"""How each family's ``config.json`` is read: what it says, what it leaves out, what is refused in it. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from manylora.server.model.config_reader import ConfigReader
from manylora.server.model.errors import UnsupportedModel
from manylora.server.model.families import ARCHITECTURES, Family, LayerType, ModelSpec
from manylora.server.model.rope import RopeSpec, parse_rope


def read_config(config: Mapping[str, Any], generation_config: Mapping[str, Any], what: str) -> ModelSpec:
    """The `ModelSpec` of a config; ``what`` names the model. Raises UnsupportedModel with every reason."""
    named = config.get("architectures") or []
    if not isinstance(named, list) or len(named) != 1 or named[0] not in ARCHITECTURES:
        found = ", ".join(map(str, named)) if isinstance(named, list) and named else "none"
        raise UnsupportedModel(what, f"architecture {found} is not one of {', '.join(ARCHITECTURES)}")
    architecture = str(named[0])
    family = ARCHITECTURES[architecture]
    model_type = config.get("model_type", family)
    if model_type != family:
        raise UnsupportedModel(what, f"architecture {architecture} with model_type `{model_type}`")
    return _READERS[family](config, what).spec(architecture, generation_config)


class _Llama(ConfigReader):
    family: ClassVar[Family] = "llama"

    def traits(self) -> dict[str, Any]:
        attention_bias = bool(self.config.get("attention_bias", False))
        mlp_bias = bool(self.config.get("mlp_bias", False))
        return super().traits() | {"qkv_bias": attention_bias, "o_bias": attention_bias, "mlp_bias": mlp_bias}

    def default_kv_heads(self, n_heads: int) -> int | None:
        # Only Llama lets it default to the number of heads (Llama 1); elsewhere its absence would be a guess.
        return n_heads

    def windows(self, n_layers: int) -> tuple[int | None, tuple[LayerType, ...]]:
        window = self.window(None)
        if window is not None:
            self.reasons.append("a sliding window in a Llama model")
        every: LayerType = "full_attention"
        return self._as_derived(None, (every,) * n_layers)

    def _as_derived(
        self, window: int | None, derived: tuple[LayerType, ...]
    ) -> tuple[int | None, tuple[LayerType, ...]]:
        """``derived``: ``layer_types`` may say the same, and nothing else."""
        window, types = self.layer_types(window, derived)
        if types != derived:
            self.reasons.append(f"`layer_types` in a {self.family} model, which transformers does not apply")
        return window, types


class _Mistral(_Llama):
    family: ClassVar[Family] = "mistral"

    def traits(self) -> dict[str, Any]:
        return ConfigReader.traits(self)

    def default_kv_heads(self, n_heads: int) -> int | None:
        return None

    def windows(self, n_layers: int) -> tuple[int | None, tuple[LayerType, ...]]:
        # Mistral 7B v0.1 relied on the class default; a file that says null (v0.2 on) has no window.
        window = self.window(4096)
        every: LayerType = "full_attention" if window is None else "sliding_attention"
        return self._as_derived(window, (every,) * n_layers)

    def refuse_features(self) -> None:
        super().refuse_features()
        # transformers ignores these keys for these families: the weights they would need are not in its model.
        if self.config.get("attention_bias"):
            self.reasons.append("a Mistral model with attention biases")
        _refuse_mlp_bias(self)


class _Qwen2(ConfigReader):
    family: ClassVar[Family] = "qwen2"

    def traits(self) -> dict[str, Any]:
        return super().traits() | {"qkv_bias": True}

    def windows(self, n_layers: int) -> tuple[int | None, tuple[LayerType, ...]]:
        window = self.window(4096)
        if not self.config.get("use_sliding_window", False):
            window = None
        first = self.config.get("max_window_layers", 28)
        derived: tuple[LayerType, ...] = tuple(
            "sliding_attention" if window is not None and layer >= first else "full_attention"
            for layer in range(n_layers)
        )
        return self.layer_types(window, derived)

    def refuse_features(self) -> None:
        super().refuse_features()
        if self.config.get("attention_bias") is False:
            self.reasons.append("a Qwen2 model without attention biases")
        _refuse_mlp_bias(self)


class _Qwen3(_Qwen2):
    family: ClassVar[Family] = "qwen3"

    def traits(self) -> dict[str, Any]:
        attention_bias = bool(self.config.get("attention_bias", False))
        return ConfigReader.traits(self) | {"qkv_bias": attention_bias, "o_bias": attention_bias, "qk_norm": True}

    def default_head_dim(self, hidden: int, n_heads: int) -> int:
        return 128

    def refuse_features(self) -> None:
        ConfigReader.refuse_features(self)
        _refuse_mlp_bias(self)


class _SmolLM3(_Llama):
    """Llama, but some layers are not rotated (NoPE), and those alone may have a window."""

    family: ClassVar[Family] = "smollm3"
    reads: ClassVar[frozenset[str]] = frozenset({"no_rope_layers"})
    default_theta: ClassVar[float] = 2_000_000.0
    tied_by_default: ClassVar[bool] = True

    def default_kv_heads(self, n_heads: int) -> int | None:
        return None

    def windows(self, n_layers: int) -> tuple[int | None, tuple[LayerType, ...]]:
        window = self.window(None) if self.config.get("use_sliding_window", False) else None
        derived: tuple[LayerType, ...] = tuple(
            "sliding_attention" if window is not None and not rotated else "full_attention"
            for rotated in self._rotated(n_layers)
        )
        return self.layer_types(window, derived)

    def layer_ropes(self, rope: RopeSpec, layer_types: tuple[LayerType, ...]) -> tuple[RopeSpec | None, ...]:
        return tuple(rope if rotated else None for rotated in self._rotated(len(layer_types)))

    def refuse_features(self) -> None:
        super().refuse_features()
        given = self.config.get("no_rope_layers")
        n_layers = self.config.get("num_hidden_layers")
        if given is not None and (not isinstance(given, list) or any(value not in (0, 1) for value in given)):
            self.reasons.append(f"`no_rope_layers` must be a list of 1 (rotated) and 0, got {given!r}")
        elif given is not None and isinstance(n_layers, int) and len(given) != n_layers:
            # transformers takes longer lists and ignores the rest; then the file was made for another model.
            self.reasons.append(f"`no_rope_layers` names {len(given)} layers of {n_layers}")

    def _rotated(self, n_layers: int) -> list[bool]:
        given = self.config.get("no_rope_layers")
        if given is None:
            interval = self.size("no_rope_layer_interval", default=4) or 1
            return [(layer + 1) % interval != 0 for layer in range(n_layers)]
        # What is wrong with it was said in ``refuse_features``.
        return [bool(value) for value in given] if isinstance(given, list) and len(given) == n_layers else []


class _Phi3(ConfigReader):
    """Phi-3, Phi-3.5 and Phi-4: Llama with fused projections."""

    family: ClassVar[Family] = "phi3"
    default_eps: ClassVar[float] = 1e-5

    _OWN_CODE: ClassVar = frozenset({"configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM"})

    def default_kv_heads(self, n_heads: int) -> int | None:
        return n_heads  # as its config class has it

    def rope(self, max_position: int) -> RopeSpec:
        rope = super().rope(max_position)
        if rope.kind != "default":  # transformers takes `yarn` for another kind here, and no others
            self.reasons.append(f"rope type `{rope.kind}` in a Phi-3 model (known: default)")
        return rope

    def windows(self, n_layers: int) -> tuple[int | None, tuple[LayerType, ...]]:
        window = self.window(None)
        every: LayerType = "full_attention" if window is None else "sliding_attention"
        if self.config.get("layer_types") is not None:
            self.reasons.append("`layer_types` in a Phi-3 model, which transformers does not apply")
        return window, (every,) * n_layers

    def custom_code(self) -> None:
        # Microsoft's checkpoints bring copies of the classes that transformers has; any other class may differ.
        named = self.config.get("auto_map") or {}
        if not isinstance(named, Mapping) or any(name not in self._OWN_CODE for name in map(str, named.values())):
            super().custom_code()

    def refuse_features(self) -> None:
        super().refuse_features()
        for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
            if self.config.get(key):
                self.reasons.append(f"`{key}` in a Phi-3 model, which transformers does not apply")


class _Gemma2(ConfigReader):
    """Gemma 2: scaled embeddings, norms of weight 1 + w before and behind each half of a block, GeGLU, caps on scores
    and logits, a window on every other layer."""

    family: ClassVar[Family] = "gemma2"
    reads: ClassVar[frozenset[str]] = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})
    tied_by_default: ClassVar[bool] = True

    def traits(self) -> dict[str, Any]:
        attention_bias = bool(self.config.get("attention_bias", False))
        scalar = self.positive("query_pre_attn_scalar", 256)
        if scalar is None:
            self.reasons.append("`query_pre_attn_scalar` must be a positive number")
        return super().traits() | {
            "qkv_bias": attention_bias,
            "o_bias": attention_bias,
            "hidden_act": "gelu_tanh",
            "norm_offset": 1.0,
            "out_norms": True,
            "embed_scale": _rounded(self.size("hidden_size") ** 0.5, self.dtype()),
            "attention_scale": (scalar or 1.0) ** -0.5,
            **self.caps(),
        }

    def caps(self) -> dict[str, float]:
        return {
            "attention_softcap": self.positive("attn_logit_softcapping", 50.0) or 0.0,
            "logit_softcap": self.positive("final_logit_softcapping", 30.0) or 0.0,
        }

    def default_head_dim(self, hidden: int, n_heads: int) -> int:
        return 256

    def windows(self, n_layers: int) -> tuple[int | None, tuple[LayerType, ...]]:
        window = self.window(4096)
        derived: tuple[LayerType, ...] = tuple(
            "full_attention" if layer % 2 else "sliding_attention" for layer in range(n_layers)
        )
        return self.layer_types(window, derived)

    def activation(self) -> None:
        # transformers reads `hidden_activation` alone; a `hidden_act` that says otherwise leaves open what was trained.
        self.only("hidden_activation", "gelu_pytorch_tanh")
        self.only("hidden_act", "gelu_pytorch_tanh")

    def refuse_features(self) -> None:
        super().refuse_features()
        _refuse_mlp_bias(self)
        if self.config.get("use_bidirectional_attention"):
            self.reasons.append("attention to later tokens (`use_bidirectional_attention`)")


class _Gemma3(_Gemma2):
    """Gemma 3's text models: Gemma 2 with norms of queries and keys in place of the cap on scores, and a rotary
    embedding of their own for the layers with a window."""

    family: ClassVar[Family] = "gemma3_text"
    reads: ClassVar[frozenset[str]] = frozenset({"final_logit_softcapping"})  # the other, transformers ignores here
    default_theta: ClassVar[float] = 1_000_000.0

    def traits(self) -> dict[str, Any]:
        return super().traits() | {"qk_norm": True}

    def caps(self) -> dict[str, float]:
        return {"logit_softcap": self.positive("final_logit_softcapping", None) or 0.0}

    def windows(self, n_layers: int) -> tuple[int | None, tuple[LayerType, ...]]:
        window = self.window(4096)
        pattern = self.size("sliding_window_pattern", default=6) or 1
        derived: tuple[LayerType, ...] = tuple(
            "sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(n_layers)
        )
        return self.layer_types(window, derived)

    def rope(self, max_position: int) -> RopeSpec:
        """Of the layers that see everything; ``rope_scaling`` is theirs alone."""
        return self._rope_of("full_attention", max_position, self.default_theta)

    def layer_ropes(self, rope: RopeSpec, layer_types: tuple[LayerType, ...]) -> tuple[RopeSpec | None, ...]:
        local = self._rope_of("sliding_attention", self.size("max_position_embeddings"), 10_000.0)
        return tuple(local if layer == "sliding_attention" else rope for layer in layer_types)

    def _rope_of(self, kind: LayerType, max_position: int, theta: float) -> RopeSpec:
        """transformers 5 writes ``rope_parameters`` by layer type; older files have ``rope_theta`` with an optional
        ``rope_scaling``, and ``rope_local_base_freq``."""
        written = self.config.get("rope_parameters")
        parts = {key: self.config[key] for key in ("partial_rotary_factor",) if key in self.config}
        if kind == "full_attention":
            parts |= {key: self.config[key] for key in ("rope_theta", "rope_scaling") if key in self.config}
        elif "rope_local_base_freq" in self.config:
            parts["rope_theta"] = self.config["rope_local_base_freq"]
        if written is not None:
            if not isinstance(written, Mapping) or set(written) - {"full_attention", "sliding_attention"}:
                self.reasons.append(f"`rope_parameters` that are not by layer type in a Gemma 3 model: {written!r}")
                return RopeSpec()
            parts["rope_parameters"] = written.get(kind)
        rope, reasons = parse_rope(parts, max_position, default_theta=theta)
        self.reasons += reasons
        return rope


class _Gpt2(ConfigReader):
    """GPT-2: learned positions instead of rotary ones, LayerNorm, an MLP without a gate, biases everywhere."""

    family: ClassVar[Family] = "gpt2"
    keys: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
        "rms_norm_eps": "layer_norm_epsilon",
    }
    default_eps: ClassVar[float] = 1e-5
    tied_by_default: ClassVar[bool] = True

    def traits(self) -> dict[str, Any]:
        return super().traits() | {
            "qkv_bias": True,
            "o_bias": True,
            "mlp_bias": True,
            "hidden_act": "gelu_tanh",
            "norm": "layer",
            "gated": False,
            "learned_positions": True,
            "attention_scale": None if self.config.get("scale_attn_weights", True) else 1.0,
        }

    def default_kv_heads(self, n_heads: int) -> int | None:
        return n_heads

    def default_intermediate_size(self, hidden: int) -> int | None:
        return 4 * hidden

    def rope(self, max_position: int) -> RopeSpec:
        return RopeSpec()  # of no layer

    def layer_ropes(self, rope: RopeSpec, layer_types: tuple[LayerType, ...]) -> tuple[RopeSpec | None, ...]:
        return (None,) * len(layer_types)

    def activation(self) -> None:
        self.only("activation_function", "gelu_new")

    def refuse_features(self) -> None:
        super().refuse_features()
        for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
            if self.config.get(key):
                self.reasons.append(f"config feature `{key}` = {self.config[key]!r}")
        # transformers reads neither in a GPT-2 config: whoever wrote them meant another model.
        for key in ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act"):
            if self.config.get(key) is not None:
                self.reasons.append(f"`{key}` in a GPT-2 model, which transformers does not apply")
        hidden, heads = self.config.get("n_embd"), self.config.get("n_head")
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads:
            self.reasons.append(f"`n_embd` {hidden} is not a multiple of `n_head` {heads}")


def _rounded(value: float, dtype: str) -> float:
    """A factor as a model of this type multiplies with it: Gemma was trained with sqrt(hidden) in its weights' type."""
    bits = {"bfloat16": 8, "float16": 11}.get(dtype)
    if bits is None or value == 0:
        return value
    step = 2.0 ** (math.frexp(value)[1] - bits)
    return round(value / step) * step  # to even, as the type rounds


def _refuse_mlp_bias(reader: ConfigReader) -> None:
    if reader.config.get("mlp_bias"):
        reader.reasons.append(f"MLP biases in a {reader.family} model")


_READERS: Final[Mapping[Family, type[ConfigReader]]] = {
    reader.family: reader for reader in (_Llama, _Mistral, _Qwen2, _Qwen3, _SmolLM3, _Phi3, _Gemma2, _Gemma3, _Gpt2)
}
