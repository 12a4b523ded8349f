"""Small random adapters for the demo base, strong enough that greedy text is another one with each.

They are written by hand in PEFT's format, so that making one takes milliseconds and no base.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN, LAYERS = 576, 30
OUT_FEATURES = {"q_proj": 576, "v_proj": 192}
"""Of SmolLM2-135M-Instruct, the demo base."""


def host_bytes(rank: int) -> int:
    """Bytes of the weights that ``write_adapter`` writes."""
    return sum(rank * (HIDDEN + out) for out in OUT_FEATURES.values()) * LAYERS * 4


def write_adapter(path: Path, seed: int, *, rank: int = 4, strength: float = 2.0) -> Path:
    """Write an adapter on q and v of every layer; equal arguments give equal files, another seed another adapter.

    A keeps the scale of what it reads, and B has about ``strength`` as the norm of its rows: at 1 the delta is as large
    as what it is added to, and text is another one after a few tokens; at 2, after one or two.
    """
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module, out in OUT_FEATURES.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            a = random.normal(0.0, HIDDEN**-0.5, (rank, HIDDEN))
            b = random.normal(0.0, strength * rank**-0.5, (out, rank))
            tensors[f"{stem}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = b.astype(np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "target_modules": sorted(OUT_FEATURES),
    }
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")
    return path
