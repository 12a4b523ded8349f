"""A tiny base with an adapter of every kind of part, and the same model in float64, of whatever weights it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from manylora.kernels.lora_weights import LoraVectors, LoraWeights, TableRows
from manylora.kernels.ops import Ops, PagedSequences
from manylora.kernels.sites import LAYER_PROJECTIONS
from manylora.server.model.decoder import Decoder
from manylora.server.model.decoder_weights import DecoderWeights
from manylora.server.model.families import ModelSpec
from manylora.server.model.forward_batch import ForwardBatch
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.synthetic import synthetic_adapter, synthetic_base, synthetic_spec
from manylora.server.model.weights import BaseWeights

PLAIN = synthetic_spec("tiny")
BIASES = synthetic_spec("tiny", attention_bias=True, mlp_bias=True, tie_word_embeddings=True)

_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
Weight = Callable[[str, int], torch.Tensor]


def make_decoder(spec: ModelSpec, ops: Ops, *, seed: int = 0) -> tuple[BaseWeights, Decoder]:
    """The base, in two copies: as it was loaded, and as it is computed with."""
    base = synthetic_base(spec, seed=seed)
    weights = DecoderWeights.prepare(spec, synthetic_base(spec, seed=seed), ops, max_context=128)
    return base, Decoder(spec, weights, ops, None)


def _normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def full_adapter(spec: ModelSpec) -> LoraWeights:
    """Pairs of unequal ranks on most projections (k only in layer 1, o nowhere), gains and biases with and without
    them, a delta on the output layer with a bias, new rows in the embedding."""
    shapes = spec.lora_shapes()
    pairs = dict(synthetic_adapter(shapes, 5, seed=1, projections=("q", "v", "gate", "down", "lm_head")).pairs)
    pairs |= synthetic_adapter(shapes, 20, seed=2, projections=("up",)).pairs
    k = synthetic_adapter(shapes, 3, seed=3, projections=("k",)).pairs
    pairs["k", 1] = k["k", 1]
    n = shapes.out_features
    vectors = {
        ("q", 0): LoraVectors(gain=1 + 0.2 * _normal(n["q"], seed=4)),
        ("down", 1): LoraVectors(gain=1 + 0.2 * _normal(n["down"], seed=5), bias=0.3 * _normal(n["down"], seed=6)),
        ("o", 0): LoraVectors(bias=0.3 * _normal(n["o"], seed=7)),
        ("k", 0): LoraVectors(gain=1 + 0.2 * _normal(n["k"], seed=8)),
        ("lm_head", 0): LoraVectors(bias=0.3 * _normal(n["lm_head"], seed=9)),
    }
    rows = TableRows(torch.tensor([3, 17, spec.vocab_size - 1]), _normal(3, spec.hidden_size, seed=10))
    return LoraWeights(pairs, vectors, {"embed": rows})


def double_model(
    spec: ModelSpec, base: BaseWeights, weight: Weight, table: Callable[[str], torch.Tensor],
    biases: Mapping[tuple[str, int], torch.Tensor],
) -> LlamaForCausalLM:  # fmt: skip
    """transformers' own model in float64 with the given matrices and biases; norms are the base's."""
    config = LlamaConfig(
        vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.n_layers, num_attention_heads=spec.n_heads, num_key_value_heads=spec.n_kv_heads,
        head_dim=spec.head_dim, rms_norm_eps=spec.rms_norm_eps, max_position_embeddings=spec.max_position,
        rope_theta=spec.rope.theta, tie_word_embeddings=False, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    state = {"model.norm.weight": base.final_norm, "model.embed_tokens.weight": table("embed")}
    state["lm_head.weight"] = table("lm_head")
    for layer in range(spec.n_layers):
        prefix = f"model.layers.{layer}."
        state[prefix + "input_layernorm.weight"] = base.input_norms[layer]
        state[prefix + "post_attention_layernorm.weight"] = base.post_attention_norms[layer]
        for p in LAYER_PROJECTIONS:
            matrix = weight(p, layer)
            state[f"{prefix}{_MODULES[p]}.weight"] = matrix
            state[f"{prefix}{_MODULES[p]}.bias"] = biases.get((p, layer), torch.zeros(matrix.shape[0]))
    model.load_state_dict({name: tensor.double() for name, tensor in state.items()})
    return model


@torch.inference_mode()
def logits(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    """fp32 ``[tokens, vocab]`` on the CPU, of one prompt in pages of its own."""
    pages = KVCache.pages_for(len(tokens))
    cache, device = KVCache(decoder.spec, pages, decoder.ops), decoder.ops.device
    count = torch.tensor([len(tokens)], dtype=torch.int32, device=device)
    sequences = PagedSequences(
        starts=torch.tensor([0, len(tokens)], dtype=torch.int32, device=device),
        contexts=count,
        tables=torch.arange(pages, dtype=torch.int32, device=device)[None],
        positions=torch.arange(len(tokens), dtype=torch.int32, device=device),
    )
    batch = ForwardBatch(torch.tensor(tokens, device=device), sequences, None, None)
    return decoder.forward(batch, cache).cpu()


def with_weights(decoder: Decoder, weights: DecoderWeights) -> Decoder:
    return Decoder(decoder.spec, weights, decoder.ops, None)
