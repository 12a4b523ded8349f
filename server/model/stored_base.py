"""A base model's weights in fp32, read from its files one at a time: what offline commands compute with.

It is an `adapters.base.BaseModel`, as the running server's decoder is one.
"""

from __future__ import annotations

import torch

from manylora.server.model.bnb_format import decode
from manylora.server.model.checkpoint import FLOAT_TYPES
from manylora.server.model.errors import BadCheckpoint
from manylora.server.model.layout import (
    LM_HEAD,
    StoredWeight,
    check_quantized,
    embed_name,
    plain_shapes,
    stored_weight,
)
from manylora.server.model.opened import OpenedModel
from manylora.server.model.quantize import check_unquantized


class StoredBase:
    """The tensors of ``opened``, each in fp32 and in memory of its own; NF4 is dequantised, 16 bits are widened.

    So what a 16-bit checkpoint gives are its own values, not the NF4 that a server would make of them. Raises
    BadCheckpoint or UnsupportedModel with everything that is wrong with the files' names, shapes and types.
    """

    def __init__(self, opened: OpenedModel) -> None:
        self._opened = opened
        if opened.quantized:
            self._check_nf4()
        else:
            check_unquantized(opened)

    def weight(self, projection: str, layer: int) -> torch.Tensor:
        """fp32 ``[out_features, in_features]`` of one of the layers' projections."""
        stored = stored_weight(self._opened.spec, projection, layer)
        return self.stored(stored)[stored.rows(projection)]

    def stored(self, stored: StoredWeight) -> torch.Tensor:
        """fp32 ``[out_features, in_features]`` of a linear layer with all of its projections."""
        name, source = stored.weight, self._opened.source
        if not self._opened.quantized:
            return self.plain(name).T.contiguous() if stored.transposed else self.plain(name)
        try:
            return self._finite(name, decode(name, stored.shape, source.infos, source.get).dequantize())
        except ValueError as error:
            raise BadCheckpoint(self._opened.what, f"{name}: {error}") from error

    def bias(self, projection: str, layer: int) -> torch.Tensor | None:
        """fp32 ``[out_features]``; None if the module has none."""
        stored = stored_weight(self._opened.spec, projection, layer)
        return self.plain(stored.bias)[stored.rows(projection)] if stored.has_bias else None

    def table(self, projection: str) -> torch.Tensor:
        """fp32 ``[vocab, hidden]`` of ``"embed"`` or ``"lm_head"``."""
        return self.plain(LM_HEAD if projection == "lm_head" and not self.tied else embed_name(self._opened.spec))

    @property
    def tied(self) -> bool:
        """Whether ``lm_head`` is the embedding's own weight."""
        return self._opened.spec.tie_embeddings

    def plain(self, name: str) -> torch.Tensor:
        """fp32 of a tensor that is stored in 16 or 32 bits, by its name in the checkpoint."""
        return self._finite(name, self._opened.source.get(name).float())

    def _finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not bool(torch.isfinite(tensor).all()):
            raise BadCheckpoint(self._opened.what, f"{name} holds values that are not finite")
        return tensor

    def _check_nf4(self) -> None:
        opened, infos = self._opened, self._opened.source.infos
        check_quantized(opened.what, opened.spec, {name: info.shape for name, info in infos.items()})
        faults = [
            f"{name} is of type {infos[name].dtype}, not one of {', '.join(FLOAT_TYPES)}"
            for name in plain_shapes(opened.spec)
            if infos[name].dtype not in FLOAT_TYPES
        ]
        if faults:
            raise BadCheckpoint(opened.what, faults)
        tied_twice = opened.spec.tie_embeddings and LM_HEAD in infos
        if tied_twice and not torch.equal(opened.source.get(embed_name(opened.spec)), opened.source.get(LM_HEAD)):
            raise BadCheckpoint(opened.what, "its config ties lm_head to the embedding, but it holds another lm_head")
