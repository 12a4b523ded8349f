"""Tiny random checkpoints of every served family, made once with transformers, a byte-level tokenizer for them, and
adapters as PEFT's files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: tests must not reach for the network

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from manylora.adapters.peft_tensors import places_of
from manylora.kernels.lora_weights import LoraWeights
from manylora.kernels.sites import LoraShapes

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] + '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
}
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}


def save_tokenizer(directory: Path) -> None:
    """A byte-level BPE: 256 bytes, the merge ``Ġa`` (256), and the special tokens bos, eos, unk (257, 258, 259)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    vocab["Ġa"] = 256
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|unk|>"})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> directory of a tiny bf16 checkpoint with tokenizer; not to be written to."""
    root = tmp_path_factory.mktemp("checkpoints")
    for family, options in FAMILIES.items():
        torch.manual_seed(len(family))
        config = transformers.AutoConfig.for_model(family, **SIZES, **options)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # transformers starts them at 0 and 1, which hides mistakes
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
        model.save_pretrained(root / family)
        save_tokenizer(root / family)
    return {family: root / family for family in FAMILIES}


def write_weights(path: Path, shapes: LoraShapes, weights: LoraWeights, base_name: str | None = None) -> Path:
    """Write pairs of one rank as a PEFT LoRA; each pair's scale goes into its B. Returns ``path``."""
    tensors, ranks = {}, set()
    for place in places_of(shapes).values():
        pair = weights.pairs.get((place.projection, place.layer))
        if pair is not None:
            tensors[f"base_model.model.{place.path}.lora_A.weight"] = pair.a.contiguous()
            tensors[f"base_model.model.{place.path}.lora_B.weight"] = (pair.b * pair.scale).contiguous()
            ranks.add(pair.rank)
    (rank,) = ranks
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base_name is None else f"org/{base_name}",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.split(".lora_")[0].removeprefix("base_model.model.") for name in tensors}),
    }
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")
    return path
