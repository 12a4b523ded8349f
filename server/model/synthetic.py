"""Base models and adapters of random weights: the shapes of a real model without its files, for benchmarks and
tests."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

import torch

from manylora.kernels.lora_weights import LoraPair, LoraWeights
from manylora.kernels.nf4_code import NF4_CODE
from manylora.kernels.nf4_tensor import NestedAbsmax, Nf4Tensor
from manylora.kernels.sites import LAYER_PROJECTIONS, LoraShapes
from manylora.server.model.families import ModelSpec
from manylora.server.model.weights import BaseWeights

SHAPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    },
    "tiny": {
        "vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    },
}  # fmt: skip
"""Configs of Llama models, by name."""


def synthetic_spec(name: str, **changes: Any) -> ModelSpec:
    """The architecture of ``SHAPES[name]``; ``changes`` replace or add keys of its ``config.json``."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    return ModelSpec.from_hf_config({**config, **SHAPES[name], **changes}, what=f"synthetic {name}")


def synthetic_nf4(n: int, k: int, random: torch.Generator, *, nested: bool = True) -> Nf4Tensor:
    """A weight ``[n, k]`` of random codes, scaled so that a product keeps its input's magnitude; on the generator's
    device."""
    device, blocks = random.device, -(-n * k // 64)
    packed = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device=device, generator=random)
    # Uniform codes have a standard deviation of 0.58.
    scale = 1.7 / k**0.5
    absmax: torch.Tensor | NestedAbsmax
    if nested:
        absmax = NestedAbsmax(
            codes=torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device, generator=random),
            code=torch.linspace(-1, 1, 256, device=device),
            absmax=torch.rand(-(-blocks // 256), device=device, generator=random) * (0.3 * scale),
            offset=scale,
        )
    else:
        absmax = (torch.rand(blocks, device=device, generator=random) * 0.6 + 0.7) * scale
    return Nf4Tensor(packed, absmax, torch.tensor(NF4_CODE, device=device), (n, k))


def synthetic_base(
    spec: ModelSpec, *, seed: int = 0, device: torch.device | str = "cpu", nested: bool = True
) -> BaseWeights:
    """Random weights of an architecture; norms, biases, embedding and head included."""
    random = torch.Generator(device).manual_seed(seed)
    shapes, hidden = spec.lora_shapes(), spec.hidden_size

    def vector(size: int, mean: float) -> torch.Tensor:
        return torch.randn(size, device=device, generator=random) * 0.1 + mean

    def table() -> torch.Tensor:
        rows = torch.randn(spec.vocab_size, hidden, device=device, generator=random, dtype=torch.bfloat16)
        return rows.mul_(hidden**-0.5)

    def norms(there: bool, mean: float = 1.0 - spec.norm_offset) -> tuple[torch.Tensor, ...]:
        return tuple(vector(hidden, mean) for _ in range(spec.n_layers if there else 0))

    has_bias = spec.norm == "layer"
    places = [(p, layer) for layer in range(spec.n_layers) for p in LAYER_PROJECTIONS if shapes.out_features[p]]
    heads = [vector(spec.head_dim, 1.0 - spec.norm_offset) for _ in range(2 * spec.n_layers if spec.qk_norm else 0)]
    return BaseWeights(
        projections={
            (p, layer): synthetic_nf4(shapes.out_features[p], shapes.in_features[p], random, nested=nested)
            for p, layer in places
        },
        biases={(p, layer): vector(shapes.out_features[p], 0.0) for p, layer in places if spec.has_bias(p)},
        input_norms=norms(True),
        post_attention_norms=norms(True),
        q_norms=tuple(heads[::2]),
        k_norms=tuple(heads[1::2]),
        final_norm=vector(hidden, 1.0 - spec.norm_offset),
        embed=table(),
        lm_head=None if spec.tie_embeddings else table(),
        attention_out_norms=norms(spec.out_norms),
        mlp_out_norms=norms(spec.out_norms),
        input_norm_biases=norms(has_bias, 0.0),
        post_attention_norm_biases=norms(has_bias, 0.0),
        final_norm_bias=vector(hidden, 0.0) if has_bias else None,
        positions=torch.randn(spec.max_position, hidden, device=device, generator=random) * hidden**-0.5
        if spec.learned_positions
        else None,
    )


def synthetic_adapter(
    shapes: LoraShapes,
    rank: int,
    *,
    seed: int = 0,
    projections: Collection[str] = LAYER_PROJECTIONS,
    dtype: torch.dtype = torch.bfloat16,
) -> LoraWeights:
    """A random adapter with a delta of about a tenth of the base's magnitude on each of ``projections``."""
    random = torch.Generator().manual_seed(seed)
    pairs = {}
    for p in projections:
        if not shapes.out_features[p]:
            continue
        k, n = shapes.in_features[p], shapes.out_features[p]
        for layer in range(shapes.layers_of(p)):
            a = torch.randn(rank, k, generator=random) / k**0.5
            b = torch.randn(n, rank, generator=random) / rank**0.5
            pairs[p, layer] = LoraPair(a.to(dtype), b.to(dtype), 0.1 + 0.01 * layer)
    return LoraWeights(pairs)
