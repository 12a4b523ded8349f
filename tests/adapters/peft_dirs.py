"""Builders of PEFT adapter directories: by peft itself over tiny models, or by hand where peft would refuse.

``SHAPES`` are the shapes of every tiny model. ``write_dir`` writes whatever it is given.
"""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from manylora.adapters.peft_tensors import places_of
from manylora.kernels.lora_weights import LoraWeights
from manylora.kernels.sites import LoraShapes

HIDDEN, INTERMEDIATE, LAYERS, VOCAB, KV = 32, 48, 2, 64, 16
SHAPES = LoraShapes(
    n_layers=LAYERS,
    in_features={
        **dict.fromkeys(("q", "k", "v", "o", "gate", "up", "lm_head"), HIDDEN),
        "down": INTERMEDIATE,
        "embed": VOCAB,
    },
    out_features={
        "q": HIDDEN,
        "k": KV,
        "v": KV,
        "o": HIDDEN,
        "gate": INTERMEDIATE,
        "up": INTERMEDIATE,
        "down": HIDDEN,
        "lm_head": VOCAB,
        "embed": HIDDEN,
    },
)
PLACES = places_of(SHAPES)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@functools.cache
def _tiny(family: str, tied: bool) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HIDDEN // 4,
        vocab_size=VOCAB,
        tie_word_embeddings=tied,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # which transformers makes zero
                parameter.normal_()
    return model


def tiny_model(family: str = "Llama", *, tied: bool = False) -> Any:
    """A transformers model with the shapes of ``SHAPES`` and random weights, the same at every call. Qwen2 has biases
    at q, k and v."""
    return copy.deepcopy(_tiny(family, tied))


def tiny_llama(*, tied: bool = False) -> Any:
    return tiny_model(tied=tied)


class HfBase:
    """A transformers model as a ``BaseModel``."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def _module(self, projection: str, layer: int) -> Any:
        path = next(p.path for p in PLACES.values() if (p.projection, p.layer) == (projection, layer))
        return self.model.get_submodule(path)

    def weight(self, projection: str, layer: int) -> torch.Tensor:
        return self._module(projection, layer).weight.detach().float()

    def bias(self, projection: str, layer: int) -> torch.Tensor | None:
        bias = self._module(projection, layer).bias
        return None if bias is None else bias.detach().float()

    def table(self, projection: str) -> torch.Tensor:
        return self._module(projection, 0).weight.detach().float()

    @property
    def tied(self) -> bool:
        return bool(self.model.config.tie_word_embeddings)


def peft_model(seed: int = 0, *, model: Any = None, peft_config: Any = None, std: float = 1.0, **config: Any) -> Any:
    """A PeftModel over ``model`` (``tiny_llama()``) with every trainable parameter random and not zero.

    ``config`` are the fields of a LoraConfig; or give a ``peft_config`` of another kind.
    """
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_config = peft_config or LoraConfig(task_type="CAUSAL_LM", **config)
        model = get_peft_model(tiny_llama() if model is None else model, peft_config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(parameter * (1 + noise) if "magnitude" in name else noise)
    return model


def save_peft(path: Path, **kwargs: Any) -> Any:
    """Have peft write an adapter (of ``peft_model``) to ``path``; returns the model that wrote it."""
    model = peft_model(**kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return model


def load_peft(path: Path, model: Any = None) -> Any:
    """What peft makes of the directory: the reference for what we make of it.

    Not the model that wrote it: peft sorts the keys of its patterns when it saves, and the first match wins, so that
    overlapping patterns mean something else after a reload.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(tiny_llama() if model is None else model, path)


def peft_deltas(model: Any) -> dict[str, torch.Tensor]:
    """``delta_W`` by module path, as peft computes it, ``[out, in]`` (the embedding's turned to that, too)."""
    deltas = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach()
            deltas[name] = delta.T if name.endswith("embed_tokens") else delta
    return deltas


@torch.no_grad()
def with_adapter(model: Any, lora: LoraWeights) -> Any:
    """``model`` in fp64 with the formula of ``kernels.lora_weights`` written into its weights: every module computes
    ``(gain * W + scale * B A) x + b + bias``, and has its table's rows replaced."""
    model = model.double()
    head = model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # apart from the embedding, if they were tied
    for place in PLACES.values():
        module = model.get_submodule(place.path)
        weight = module.weight.T if place.projection == "embed" else module.weight
        if (vectors := lora.vectors.get((place.projection, place.layer))) is not None:
            if vectors.gain is not None:
                weight *= vectors.gain.double()[:, None]
            if vectors.bias is not None:
                bias = vectors.bias.double()
                module.bias = torch.nn.Parameter(bias if module.bias is None else module.bias + bias)
        if (pair := lora.pairs.get((place.projection, place.layer))) is not None:
            weight += pair.scale * (pair.b.double() @ pair.a.double())
        if (rows := lora.tables.get(place.projection)) is not None:
            module.weight[rows.ids] = rows.rows.double()
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """fp64 logits of every token of the vocabulary, in a fixed order, in two prompts."""
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1)).view(2, -1)
    return model.double().eval()(input_ids=ids).logits


def plain_config(**changes: Any) -> dict[str, Any]:
    """The config of ``plain_tensors``, with some fields changed."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/tiny",
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    } | changes


def plain_tensors(rank: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """LoRA on q and v of every layer, by PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for projection in ("q", "v"):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{projection}_proj"
            a = torch.randn((rank, SHAPES.in_features[projection]), generator=generator)
            b = torch.randn((SHAPES.out_features[projection], rank), generator=generator)
            tensors[f"{stem}.lora_A.weight"] = a.to(dtype)
            tensors[f"{stem}.lora_B.weight"] = b.to(dtype)
    return tensors


def write_dir(
    path: Path,
    config: Mapping[str, Any] | str | None = None,
    tensors: Mapping[str, torch.Tensor] | bytes | None = None,
) -> Path:
    """Write an adapter directory; what is not given is plain. Strings and bytes are written as they are."""
    path.mkdir(parents=True, exist_ok=True)
    config = plain_config() if config is None else config
    tensors = plain_tensors() if tensors is None else tensors
    (path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if isinstance(tensors, bytes):
        (path / "adapter_model.safetensors").write_bytes(tensors)
    else:
        save_file(dict(tensors), path / "adapter_model.safetensors")
    return path
