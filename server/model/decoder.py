"""The decoder of every served family, driven by its `ModelSpec`: pre-norm blocks of attention and SwiGLU."""

from __future__ import annotations

from typing import Any

import torch

from manylora.kernels.lora import BatchedLora
from manylora.kernels.ops import AttentionShape, Ops
from manylora.server.model.families import ModelSpec, rope_inv_freq
from manylora.server.model.forward_batch import ForwardBatch
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.linear import SiteLinear
from manylora.server.model.weights import BaseWeights


def rope_tables(spec: ModelSpec, n_positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position, fp32 ``[n_positions, head_dim / 2]``, computed in fp64 (RoPE, Su et al. 2021)."""
    frequencies, attention_scaling = rope_inv_freq(spec.rope, spec.head_dim)
    angles = torch.outer(torch.arange(n_positions, dtype=torch.float64), torch.tensor(frequencies, dtype=torch.float64))
    cos, sin = angles.cos() * attention_scaling, angles.sin() * attention_scaling
    return cos.float().to(device).contiguous(), sin.float().to(device).contiguous()


class _Layer:
    """One block; holds its prepared weights."""

    def __init__(self, spec: ModelSpec, weights: BaseWeights, layer: int, ops: Ops, lora: BatchedLora | None) -> None:
        def norm(weight: torch.Tensor) -> torch.Tensor:
            return weight.to(ops.device, torch.float32).contiguous()

        self.input_norm = norm(weights.input_norms[layer])
        self.post_attention_norm = norm(weights.post_attention_norms[layer])
        self.q_norm = norm(weights.q_norms[layer]) if spec.qk_norm else None
        self.k_norm = norm(weights.k_norms[layer]) if spec.qk_norm else None
        self.qkv, self.o, self.gate_up, self.down = (
            SiteLinear(ops, weights, site, layer, lora) for site in ("qkv", "o", "gate_up", "down")
        )
        self.attention = AttentionShape(spec.n_heads, spec.n_kv_heads, spec.head_dim, spec.window(layer) or 0)

    @property
    def nbytes(self) -> int:
        return sum(site.nbytes for site in (self.qkv, self.o, self.gate_up, self.down))


class Decoder:
    """The forward pass over one step's batch.

    Takes over the weights: what the operations repack replaces the caller's tensors, which should be let go of.
    ``max_context`` bounds the positions the rotary tables are made for.
    """

    def __init__(
        self, spec: ModelSpec, weights: BaseWeights, ops: Ops, lora: BatchedLora | None, *, max_context: int
    ) -> None:
        self.spec, self.ops, self.lora = spec, ops, lora
        self._layers = [_Layer(spec, weights, layer, ops, lora) for layer in range(spec.n_layers)]
        self._final_norm = weights.final_norm.to(ops.device, torch.float32).contiguous()
        tied = weights.lm_head is None
        self._embedding = ops.prepare_embedding(weights.embed, head=tied)
        self._head = self._embedding if tied else ops.prepare_embedding(weights.output_embedding, head=True)
        self._rope = rope_tables(spec, max_context, ops.device)
        self.nbytes: int = sum(layer.nbytes for layer in self._layers) + sum(
            table.nbytes for table in {id(t): t for t in (self._embedding, self._head)}.values()
        )
        """Bytes of the base's matrices as they are held for computing."""

    def forward(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """Compute the batch's tokens, storing their keys and values in ``cache``; logits fp32 ``[sampled, vocab]``."""
        ops, epsilon = self.ops, self.spec.rms_norm_eps
        x = ops.embed(batch.token_ids, self._embedding)
        adapters = batch.routed
        if batch.lora is not None and self.lora is not None:
            self.lora.add_embedding_(x, batch.token_ids, batch.lora)
            if adapters is None:
                adapters = self.lora.route(batch.lora, x.shape[0])
        with ops.together():
            for layer, pages in zip(self._layers, cache.layers, strict=True):
                with ops.together():
                    qkv = layer.qkv(ops.rms_norm(x, layer.input_norm, epsilon), adapters)
                    if layer.q_norm is not None and layer.k_norm is not None:
                        q, k = layer.attention.q_size, layer.attention.kv_size
                        ops.head_norm_(qkv[:, :q], layer.q_norm, epsilon)
                        ops.head_norm_(qkv[:, q : q + k], layer.k_norm, epsilon)
                    attended = ops.attention(qkv, self._rope, pages, batch.sequences, layer.attention)
                    x = layer.o(attended, adapters, add_to=x)
                    gate_up = layer.gate_up(ops.rms_norm(x, layer.post_attention_norm, epsilon), adapters)
                    x = layer.down(ops.silu_mul(gate_up), adapters, add_to=x)
        return self._logits(x, batch)

    def table(self, projection: str) -> torch.Tensor:
        """The base's own ``embed`` or ``lm_head`` matrix, fp32 ``[vocab, hidden]``: a copy, for checks."""
        weight = {"embed": self._embedding, "lm_head": self._head}[projection]
        return self.ops.embed(torch.arange(self.spec.vocab_size, device=self.ops.device), weight)

    def _logits(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        sampled = batch.sample_rows
        if sampled is not None:
            if sampled.numel() == 0:
                return torch.empty(0, self.spec.vocab_size, dtype=torch.float32, device=self.ops.device)
            x = x[sampled]
        hidden = self.ops.rms_norm(x, self._final_norm, self.spec.rms_norm_eps)
        logits = self.ops.logits(hidden, self._head)
        if self.lora is None:
            return logits
        adapters: Any = batch.routed
        if batch.lora is not None and self.lora.touches("lm_head", batch.lora):
            adapters = batch.lora if sampled is None else batch.lora.select(sampled)
        if adapters is not None:
            self.lora.add_(logits, hidden, adapters, "lm_head", 0)
        return logits
