"""Builders of PEFT adapter directories: by peft itself over a tiny Llama, or by hand where peft would refuse.

``TINY`` is the base; ``SHAPES`` are its shapes. ``write_dir`` writes whatever it is given.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

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


def tiny_llama(*, tied: bool = False) -> Any:
    """A transformers LlamaForCausalLM with the shapes of ``SHAPES`` and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCAB,
            tie_word_embeddings=tied,
        )
    )


def peft_model(seed: int = 0, **config: Any) -> Any:
    """A PeftModel over ``tiny_llama`` whose every LoRA factor is random and not zero."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def save_peft(path: Path, **config: Any) -> Any:
    """Have peft write an adapter to ``path``; returns the model that wrote it."""
    model = peft_model(**config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return model


def load_peft(path: Path) -> Any:
    """What peft makes of the directory: the reference for what we make of it.

    Not the model that wrote it: peft sorts the keys of its patterns when it saves, and the first match wins, so that
    overlapping patterns mean something else after a reload.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(tiny_llama(), path)


def peft_deltas(model: Any) -> dict[str, torch.Tensor]:
    """``delta_W`` by module path, as peft computes it, ``[out, in]`` (the embedding's turned to that, too)."""
    deltas = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach()
            deltas[name] = delta.T if name.endswith("embed_tokens") else delta
    return deltas


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
