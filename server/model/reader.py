"""Reading an NF4 checkpoint into `BaseWeights`: the one reader, of cached, given and just-made checkpoints alike."""

from __future__ import annotations

import torch

from manylora.kernels.nf4_tensor import Nf4Tensor
from manylora.server.model.bnb_format import decode
from manylora.server.model.checkpoint import FLOAT_TYPES, TensorSource
from manylora.server.model.errors import BadCheckpoint
from manylora.server.model.families import ModelSpec
from manylora.server.model.layout import (
    LM_HEAD,
    POSITIONS,
    check_quantized,
    embed_name,
    norm_names,
    norm_path,
    plain_shapes,
    stored_weights,
)
from manylora.server.model.progress import Progress
from manylora.server.model.weights import BaseWeights


def read_weights(
    source: TensorSource, spec: ModelSpec, *, device: torch.device | str = "cpu", progress: bool = True
) -> BaseWeights:
    """All tensors of ``source`` on ``device``. Raises BadCheckpoint (every fault) or UnsupportedModel."""
    infos = source.infos
    check_quantized(source.what, spec, {name: info.shape for name, info in infos.items()})
    faults = [
        f"{name} is of type {infos[name].dtype}, not one of {', '.join(FLOAT_TYPES)}"
        for name in plain_shapes(spec)
        if infos[name].dtype not in FLOAT_TYPES
    ]
    projections: dict[tuple[str, int], Nf4Tensor] = {}
    total = sum(torch.Size(info.shape).numel() * (1 if info.dtype == "U8" else 2) for info in infos.values())
    with Progress("Reading the NF4 base", total, show=progress) as bar:
        for stored in stored_weights(spec):
            try:
                weight = decode(stored.weight, stored.shape, infos, source.get)
            except ValueError as error:
                faults.append(f"{stored.weight}: {error}")
                continue
            for projection in stored.projections:
                rows = stored.rows(projection)
                part = weight if rows == slice(0, stored.shape[0]) else weight.rows(rows.start, rows.stop)
                projections[projection, stored.layer] = part.to(device)
            bar.advance(weight.nbytes)
        if faults:
            raise BadCheckpoint(source.what, faults)

        def plain(name: str) -> torch.Tensor:
            tensor = source.get(name)
            bar.advance(tensor.nbytes)
            return tensor.to(device)

        def norms(name: str | None, part: str = "weight") -> tuple[torch.Tensor, ...]:
            paths = () if name is None else tuple(norm_path(spec, name, layer) for layer in range(spec.n_layers))
            return tuple(plain(f"{path}.{part}") for path in paths)

        names = norm_names(spec)
        biases: dict[tuple[str, int], torch.Tensor] = {}
        for stored in stored_weights(spec):
            if stored.has_bias:
                whole = plain(stored.bias)
                biases |= {(p, stored.layer): whole[stored.rows(p)].contiguous() for p in stored.projections}
        embed = plain(embed_name(spec)).to(torch.bfloat16)
        lm_head = plain(LM_HEAD).to(torch.bfloat16) if LM_HEAD in infos else None
        if spec.tie_embeddings and lm_head is not None:
            if not torch.equal(embed, lm_head):
                raise BadCheckpoint(
                    source.what, "its config ties lm_head to the embedding, but it holds another lm_head"
                )
            lm_head = None
        return BaseWeights(
            projections=projections,
            biases=biases,
            input_norms=norms(names.attention),
            post_attention_norms=norms(names.mlp),
            attention_out_norms=norms(names.attention_out),
            mlp_out_norms=norms(names.mlp_out),
            q_norms=norms("self_attn.q_norm") if spec.qk_norm else (),
            k_norms=norms("self_attn.k_norm") if spec.qk_norm else (),
            final_norm=plain(f"{names.final}.weight"),
            embed=embed,
            lm_head=lm_head,
            input_norm_biases=norms(names.attention, "bias") if spec.norm == "layer" else (),
            post_attention_norm_biases=norms(names.mlp, "bias") if spec.norm == "layer" else (),
            final_norm_bias=plain(f"{names.final}.bias") if spec.norm == "layer" else None,
            positions=plain(POSITIONS) if spec.learned_positions else None,
        )
