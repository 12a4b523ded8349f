"""What a decoder computes with, apart from the computing: prepared linear layers, norms, tables.

Decoders share them: a merged model has most in common with the base, and what is common is in memory once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from manylora.kernels.ops import AttentionShape, Ops
from manylora.kernels.sites import LAYER_PROJECTIONS, SITES, LoraShapes
from manylora.server.model.families import ModelSpec, RopeSpec, rope_inv_freq
from manylora.server.model.weights import BaseWeights

LAYER_SITES = tuple(site for site in SITES if site != "lm_head")
RopeTables = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, fp32 ``[positions, head_dim / 2]``."""


@dataclass(frozen=True)
class Norm:
    """fp32 ``[hidden]``, the model's offset in it; with a ``bias`` it is a LayerNorm, else an RMSNorm."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerWeights:
    """One block. ``sites``: the prepared linear layer of each fused site, by
    ``LAYER_SITES``. ``biases``: fp32 ``[out_features]`` on the CPU, by projection, of those that have one (they are in
    the prepared layers already). ``attention_out_norm`` and ``mlp_out_norm``: of what is added to the residual stream,
    if that is normed. ``exact``: by site, the positions of x that it multiplies as they are (``Ops.exactly``)."""

    input_norm: Norm
    attention_out_norm: Norm | None
    post_attention_norm: Norm
    mlp_out_norm: Norm | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    sites: Mapping[str, Any]
    biases: Mapping[str, torch.Tensor]
    attention: AttentionShape
    exact: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class DecoderWeights:
    """All of a model, prepared for one implementation of the operations. Frozen: nothing writes into its tensors.

    ``embedding`` and ``head`` are prepared tables, one and the same object if they are tied; ``head_bias`` fp32
    ``[vocab]`` is added to the logits (no base has one); ``rope``: each layer's cos and sin, see ``rope_tables``; equal
    ones are in memory once. ``positions`` ``[positions, hidden]`` of the operations' type is added to embeddings, if
    there is one. ``exact_head``: the positions of hidden states that ``head`` multiplies as they are.
    """

    layers: tuple[LayerWeights, ...]
    final_norm: Norm
    embedding: Any
    head: Any
    head_bias: torch.Tensor | None
    rope: tuple[RopeTables, ...]
    positions: torch.Tensor | None
    exact_head: torch.Tensor | None = None

    @classmethod
    def prepare(cls, spec: ModelSpec, base: BaseWeights, ops: Ops, *, max_context: int) -> DecoderWeights:
        """Takes the base's tensors over: what the operations re-lay replaces them, so they should be let go of.
        ``max_context`` bounds the positions the rotary tables are made for."""
        embedding = ops.prepare_embedding(base.embed, head=base.lm_head is None)
        return cls(
            layers=tuple(_layer(spec, base, layer, ops) for layer in range(spec.n_layers)),
            final_norm=Norm(_norm(base.final_norm, spec, ops), _bias(base.final_norm_bias, ops)),
            embedding=embedding,
            head=embedding if base.lm_head is None else ops.prepare_embedding(base.lm_head, head=True),
            head_bias=None,
            rope=_ropes(spec, max_context, ops.device),
            positions=None if base.positions is None else base.positions.to(ops.device, ops.dtype),
        )

    @property
    def tied(self) -> bool:
        return self.head is self.embedding

    @property
    def matrices(self) -> Sequence[Any]:
        """The prepared layers and tables, each once."""
        tables = [self.embedding] if self.tied else [self.embedding, self.head]
        return [*(site for layer in self.layers for site in layer.sites.values()), *tables]

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices as they are held for computing."""
        return sum(matrix.nbytes for matrix in self.matrices)


def _norm(weight: torch.Tensor, spec: ModelSpec, ops: Ops) -> torch.Tensor:
    return (weight.to(ops.device, torch.float32) + spec.norm_offset).contiguous()


def _bias(bias: torch.Tensor | None, ops: Ops) -> torch.Tensor | None:
    return None if bias is None else bias.to(ops.device, torch.float32).contiguous()


def _layer(spec: ModelSpec, base: BaseWeights, layer: int, ops: Ops) -> LayerWeights:
    biases = {
        p: bias.to("cpu", torch.float32) for p in LAYER_PROJECTIONS if (bias := base.biases.get((p, layer))) is not None
    }
    shapes = spec.lora_shapes()

    def norm(weights: tuple[torch.Tensor, ...], norm_biases: tuple[torch.Tensor, ...] = ()) -> Norm:
        return Norm(_norm(weights[layer], spec, ops), _bias(norm_biases[layer], ops) if norm_biases else None)

    return LayerWeights(
        input_norm=norm(base.input_norms, base.input_norm_biases),
        attention_out_norm=norm(base.attention_out_norms) if spec.out_norms else None,
        post_attention_norm=norm(base.post_attention_norms, base.post_attention_norm_biases),
        mlp_out_norm=norm(base.mlp_out_norms) if spec.out_norms else None,
        q_norm=_norm(base.q_norms[layer], spec, ops) if spec.qk_norm else None,
        k_norm=_norm(base.k_norms[layer], spec, ops) if spec.qk_norm else None,
        sites={
            site: ops.prepare_linear(
                [base.projections[p, layer] for p in SITES[site] if shapes.out_features[p]],
                site_bias(site, biases, shapes),
            )
            for site in LAYER_SITES
        },
        biases=biases,
        attention=attention_shape(spec, layer),
    )


def attention_shape(spec: ModelSpec, layer: int) -> AttentionShape:
    """What a layer asks of ``Ops.attention``."""
    window = spec.window(layer) or 0
    return AttentionShape(
        spec.n_heads, spec.n_kv_heads, spec.head_dim, window, spec.attention_scale, spec.attention_softcap
    )


def site_bias(site: str, biases: Mapping[str, torch.Tensor], shapes: LoraShapes) -> torch.Tensor | None:
    """The biases of a site's projections side by side, fp32 on the CPU, zeros for those without; None if none has
    one."""
    if not any(p in biases for p in SITES[site]):
        return None
    return torch.cat([biases[p] if p in biases else torch.zeros(shapes.out_features[p]) for p in SITES[site]])


def _ropes(spec: ModelSpec, n_positions: int, device: torch.device) -> tuple[RopeTables, ...]:
    made = {rope: rope_tables(rope, spec.head_dim, n_positions, device) for rope in dict.fromkeys(spec.layer_ropes)}
    return tuple(made[rope] for rope in spec.layer_ropes)


def rope_tables(rope: RopeSpec | None, head_dim: int, n_positions: int, device: torch.device) -> RopeTables:
    """cos and sin of every position, fp32 ``[n_positions, head_dim / 2]``, computed in fp64 (RoPE, Su et al. 2021).

    None: a layer that is not rotated. Its cos is 1 and its sin 0, by which a rotation changes no bit.
    """
    if rope is None:
        shape = n_positions, head_dim // 2
        return torch.ones(shape, device=device), torch.zeros(shape, device=device)
    frequencies, attention_scaling = rope_inv_freq(rope, head_dim)
    angles = torch.outer(torch.arange(n_positions, dtype=torch.float64), torch.tensor(frequencies, dtype=torch.float64))
    cos, sin = angles.cos() * attention_scaling, angles.sin() * attention_scaling
    return cos.float().to(device).contiguous(), sin.float().to(device).contiguous()
