"""The base model's tensors in memory: NF4 projections, and what stays in 16 or 32 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from manylora.kernels.nf4_tensor import Nf4Tensor


@dataclass(frozen=True)
class BaseWeights:
    """Everything the decoder reads. Frozen like the model: no code path writes into these tensors.

    ``projections`` maps ``(projection, layer)`` (`kernels.sites.LAYER_PROJECTIONS`; every pair is present) to the NF4
    weight ``[N, K]``. ``biases`` maps the pairs that have one (Qwen2: q, k, v) to ``[N]``. The norms are one
    ``[hidden]`` per layer; ``input_norms`` are those before attention, ``post_attention_norms`` those before the MLP.
    ``attention_out_norms`` and ``mlp_out_norms`` (Gemma 2: of what is added to the residual stream) may be empty, as
    may ``q_norms`` and ``k_norms``, one ``[head_dim]`` per layer (Qwen3). Biases and
    norms have the dtype of the source (`ModelSpec.dtype`). ``embed`` and ``lm_head`` are bf16 ``[vocab, hidden]``;
    ``lm_head`` is None when tied to ``embed``. GPT-2 alone has biases of norms, and ``positions`` ``[max_position,
    hidden]``.
    """

    projections: Mapping[tuple[str, int], Nf4Tensor]
    biases: Mapping[tuple[str, int], torch.Tensor]
    input_norms: tuple[torch.Tensor, ...]
    post_attention_norms: tuple[torch.Tensor, ...]
    q_norms: tuple[torch.Tensor, ...]
    k_norms: tuple[torch.Tensor, ...]
    final_norm: torch.Tensor
    embed: torch.Tensor
    lm_head: torch.Tensor | None
    attention_out_norms: tuple[torch.Tensor, ...] = ()
    mlp_out_norms: tuple[torch.Tensor, ...] = ()
    input_norm_biases: tuple[torch.Tensor, ...] = ()
    post_attention_norm_biases: tuple[torch.Tensor, ...] = ()
    final_norm_bias: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    @property
    def output_embedding(self) -> torch.Tensor:
        """The matrix ``[vocab, hidden]`` that makes logits: ``lm_head``, or ``embed`` when they are tied."""
        return self.embed if self.lm_head is None else self.lm_head

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        plain = (
            *self.biases.values(),
            *self.input_norms,
            *self.post_attention_norms,
            *self.attention_out_norms,
            *self.mlp_out_norms,
            *self.q_norms,
            *self.k_norms,
            *self.input_norm_biases,
            *self.post_attention_norm_biases,
            self.final_norm,
            self.embed,
            *(one for one in (self.lm_head, self.final_norm_bias, self.positions) if one is not None),
        )
        return sum(weight.nbytes for weight in self.projections.values()) + sum(int(tensor.nbytes) for tensor in plain)

    @property
    def device(self) -> torch.device:
        return self.embed.device
