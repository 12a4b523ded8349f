"""Reading GGUF files (llama.cpp): config, tensors one at a time, tokenizer.

The file is read here rather than through transformers' ``from_pretrained(gguf_file=...)``, which holds the whole model
dequantised and passes over what it does not know (rope scaling, some pre-tokenizers). Here every architecture key and
every tensor is accounted for, or the file is refused. Weights come out as transformers would load them in bf16.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch

from manylora.server.model.checkpoint import TensorInfo
from manylora.server.model.errors import BadCheckpoint, UnsupportedModel
from manylora.server.model.families import ModelSpec, RopeSpec, rope_inv_freq
from manylora.server.model.gguf_tokenizer import load_gguf_tokenizer
from manylora.server.model.tokenizer import Tokenizer

_ARCHITECTURES: Final[Mapping[str, str]] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""GGUF architecture -> transformers'. Mistral files call themselves llama, and compute the same."""

_SIZES: Final[Mapping[str, str]] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}

_HEAD_SIZES: Final = ("rope.dimension_count", "attention.key_length", "attention.value_length")
"""All three must be the head size: fewer rotary dimensions, or values of another width, are not computed here."""

_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "vocab_size": (),  # the embedding's rows are the truth
    "rope.freq_base": (),
    "rope.scaling.type": (),
    "rope.scaling.factor": (),
    "rope.scaling.original_context_length": (),
    "rope.scaling.finetuned": (),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
}
"""Other keys that are understood; with values given, only these."""

_GLOBAL_NAMES: Final[Mapping[str, str]] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES: Final[Mapping[str, str]] = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR: Final = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FREQS: Final = "rope_freqs.weight"


class GgufModel:
    """A GGUF file as an `opened.OpenedModel`. Raises BadCheckpoint or UnsupportedModel."""

    quantized = False

    def __init__(self, path: Path) -> None:
        self.what = str(path)
        self.path = path
        reader = _open(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        metadata = {
            key: field.contents()
            for key, field in reader.fields.items()
            if not (key.startswith("tokenizer.") and field.types[0] == gguf.GGUFValueType.ARRAY)
        }
        self._tokenizer_kind = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
        if metadata.get("split.count", 0) > 1:
            raise UnsupportedModel(
                self.what, "a GGUF split over several files; join them with `llama-gguf-split --merge`"
            )
        rope_freqs = tensors.pop(_ROPE_FREQS, None)
        self.config = _config(self.what, metadata, tensors, None if rope_freqs is None else np.array(rope_freqs.data))
        self.generation_config: dict[str, Any] = {}
        self.spec = ModelSpec.from_hf_config(self.config, what=self.what)
        self.source = GgufSource(self.what, tensors, self.spec, permuted=metadata["general.architecture"] == "llama")

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self._hf_tokenizer, eos_token_ids=self.spec.eos_token_ids)

    def save_tokenizer(self, directory: Path) -> None:
        self._hf_tokenizer.save_pretrained(str(directory))

    @functools.cached_property
    def _hf_tokenizer(self) -> Any:
        return load_gguf_tokenizer(self.path, *self._tokenizer_kind)


class GgufSource:
    """The tensors of a GGUF file under transformers' names: matrices dequantised to bf16, vectors to fp32."""

    def __init__(self, what: str, tensors: Mapping[str, Any], spec: ModelSpec, *, permuted: bool) -> None:
        self.what = what
        self._spec = spec
        self._permuted = permuted
        self._tensors = {_hf_name(name): tensor for name, tensor in tensors.items()}
        self.infos = {
            name: TensorInfo(
                dtype="BF16" if len(tensor.shape) > 1 else "F32",
                # ggml lists the fastest-moving dimension first
                shape=tuple(int(size) for size in reversed(tensor.shape)),
            )
            for name, tensor in self._tensors.items()
        }

    def get(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UnsupportedModel(self.what, f"{name} is of ggml type {tensor.tensor_type.name}") from error
        info = self.infos[name]
        weight = torch.from_numpy(np.array(values, dtype=np.float32)).view(info.shape)
        if self._permuted and ".q_proj." in name:
            weight = _unpermute(weight, self._spec.n_heads)
        elif self._permuted and ".k_proj." in name:
            weight = _unpermute(weight, self._spec.n_kv_heads)
        return weight.to(torch.bfloat16) if info.dtype == "BF16" else weight


def _unpermute(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order of q and k (``LlamaModel.permute`` in convert_hf_to_gguf.py).

    llama.cpp rotates neighbouring rows ``(2i, 2i + 1)`` of a head, transformers rows ``(i, i + d / 2)``.
    """
    return weight.view(n_heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _open(path: Path) -> Any:
    try:
        return gguf.GGUFReader(str(path))
    # What the reader's slicing and reshaping does on a file that ends early or is none of its kind.
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, OSError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise BadCheckpoint(
            str(path), f"it is truncated or not a GGUF file ({error}; {size} bytes on disk); fetch the file again"
        ) from error


def _hf_name(name: str) -> str:
    """transformers' name of a GGUF tensor; an unknown one is left as it is, and refused by the check of all names."""
    match = _LAYER_TENSOR.fullmatch(name)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    return _GLOBAL_NAMES.get(name, name)


def _config(
    what: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any], rope_freqs: np.ndarray[Any, Any] | None
) -> dict[str, Any]:
    """The ``config.json`` that transformers would have for this file; refuses keys that it would not account for."""
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in _ARCHITECTURES:
        raise UnsupportedModel(what, f"GGUF architecture `{arch}` is not one of {', '.join(_ARCHITECTURES)}")
    keys = {key.removeprefix(f"{arch}."): value for key, value in metadata.items() if key.startswith(f"{arch}.")}
    reasons = []
    config: dict[str, Any] = {"architectures": [_ARCHITECTURES[arch]], "model_type": arch, "hidden_act": "silu"}
    for key, value in keys.items():
        if key in _SIZES:
            config[_SIZES[key]] = _shortest(value)
        elif key in _HEAD_SIZES:
            pass
        elif key not in _NEUTRAL:
            reasons.append(f"GGUF key `{arch}.{key}` = {value!r}")
        elif _NEUTRAL[key] and value not in _NEUTRAL[key]:
            reasons.append(f"GGUF key `{arch}.{key}` = {value!r} (only {_NEUTRAL[key][0]!r} is)")
    missing = [f"{arch}.{key}" for key in _SIZES if key not in keys and key != "attention.head_count_kv"]
    if missing or "token_embd.weight" not in tensors:
        lost = [*missing, *([] if "token_embd.weight" in tensors else ["token_embd.weight"])]
        raise BadCheckpoint(what, f"it lacks {', '.join(lost)}")
    # llama.cpp leaves the number of key-value heads out where it equals that of the query heads.
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config["head_dim"] = keys.get("attention.key_length", config["hidden_size"] // config["num_attention_heads"])
    reasons += [
        f"GGUF key `{arch}.{key}` = {keys[key]}, another size than the heads' {config['head_dim']}"
        for key in _HEAD_SIZES
        if keys.get(key, config["head_dim"]) != config["head_dim"]
    ]
    rope, reason = _rope(keys, rope_freqs, config)
    reasons += [reason] if reason else []
    if reasons:
        raise UnsupportedModel(what, reasons)
    return config | {
        "rope_parameters": rope,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        # the head is in the file only when it is not the embedding
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": arch == "qwen2" or "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "dtype": "bfloat16",
    }


def _rope(
    keys: Mapping[str, Any], rope_freqs: np.ndarray[Any, Any] | None, config: Mapping[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """The rope parameters, and why they cannot be had.

    llama.cpp stores Llama 3's scaling as one divisor per frequency (``rope_freqs.weight``). Every Llama 3.1-3.3 was
    made with the same three parameters, and a factor that the largest divisor shows; they are taken only if they
    reproduce all the divisors.
    """
    theta = _shortest(keys.get("rope.freq_base", 10_000.0))
    kind = keys.get("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope = {"rope_type": kind, "rope_theta": theta, "factor": _shortest(keys.get("rope.scaling.factor", 1.0))}
        if kind == "yarn" and "rope.scaling.original_context_length" in keys:
            rope["original_max_position_embeddings"] = keys["rope.scaling.original_context_length"]
        return rope, None if rope_freqs is None else f"rope scaling `{kind}` together with {_ROPE_FREQS}"
    if kind != "none":
        return {}, f"GGUF rope scaling `{kind}`"
    if rope_freqs is None:
        return {"rope_type": "default", "rope_theta": theta}, None
    factor = _shortest(float(rope_freqs.max()))
    guess = RopeSpec(theta=theta, kind="llama3", factor=factor, original_max_position=8192)
    scaled, _ = rope_inv_freq(guess, config["head_dim"])
    plain, _ = rope_inv_freq(RopeSpec(theta=theta), config["head_dim"])
    divisors = np.array(plain) / np.array(scaled)
    if divisors.shape != rope_freqs.shape or not np.allclose(divisors, rope_freqs, rtol=1e-4):
        return {}, f"{_ROPE_FREQS} that are not Llama 3's; serve the safetensors checkpoint"
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": guess.low_freq_factor,
        "high_freq_factor": guess.high_freq_factor,
        "original_max_position_embeddings": guess.original_max_position,
    }, None


def _shortest(value: Any) -> Any:
    """An fp32 as the shortest decimal that is that fp32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
