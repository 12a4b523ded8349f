"""Tiny bases, adapters that PEFT writes for them, and what PEFT makes of both: for the tests of `manylora merge`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from manylora.server import cli
from tests.checkpoints import SIZES, save_tokenizer

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False, "head_dim": 32}),
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 12, "target_modules": ALL},
    "partial": {"r": 1, "lora_alpha": 3, "target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1]},
    "rslora-patterns": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ALL,
        "rank_pattern": {"v_proj": 20, r"0\.mlp\.up_proj": 2},
        "alpha_pattern": {"v_proj": 5, "o_proj": 1.5},
    },
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ALL},
    "lm_head": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "lm_head"]},
    "embed": {"r": 4, "lora_alpha": 6, "target_modules": ["v_proj", "embed_tokens"]},
    "both": {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "lm_head"]},
}
TABLES = ("lm_head", "embed", "both")
TOKENS = torch.tensor([[1, 7, 300, 42, 9, 11, 250, 3]])


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def make_bases(root: Path) -> dict[str, Path]:
    """Tiny bf16 checkpoints below ``root``."""
    for name, (family, options) in FAMILIES.items():
        torch.manual_seed(len(name))
        config = AutoConfig.for_model(family, **{**SIZES, "num_hidden_layers": 2, **options})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "norm" in parameter_name:
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in parameter_name else 0.0, std=0.1)
        model.save_pretrained(root / name)
        save_tokenizer(root / name)
    return {name: root / name for name in FAMILIES}


def make_adapter(base: Path, directory: Path, **options: Any) -> Path:
    """An adapter that PEFT writes; every trained tensor is random and B is not zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **options))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in name:
                    parameter.mul_(1 + 0.2 * noise)
                elif parameter.requires_grad and "lora_" in name:
                    parameter.copy_(0.1 * noise)
                elif parameter.requires_grad:
                    parameter.add_(0.1 * noise)
        model.save_pretrained(directory)
    return directory


def with_peft(base: Path, adapter: Path) -> Any:
    """The base in fp32 with the adapter on it, not merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load(base), adapter).eval()


def merge(*line: object) -> int:
    return cli.main(["merge", *map(str, line)])


def ulps(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """The largest distance between two bf16 tensors, in steps of bf16."""

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert ours.shape == theirs.shape
    return int((ordered(ours) - ordered(theirs)).abs().max())


def stored(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors
