"""``manylora inspect``: what loading an adapter would report, without a server."""

from __future__ import annotations

from typing import Any

import torch

from manylora.adapters.errors import AdapterRefused
from manylora.adapters.peft_loader import BaseTensor, inspect_peft_adapter, load_peft_adapter
from manylora.adapters.source import resolve_source
from manylora.server.model.layout import EMBED, LM_HEAD
from manylora.server.model.opened import OpenedModel
from manylora.server.model.resolve import open_model, resolve


def inspect(adapter: str, model: str | None, max_rank: int) -> dict[str, Any]:
    """The report, by field. With ``model`` all checks of a load are made, without it those that need no base.

    Raises AdapterError (AdapterRefused with every reason), and ModelError for ``model``.
    """
    return _against(adapter, model, max_rank) if model is not None else _alone(adapter)


def _alone(adapter: str) -> dict[str, Any]:
    found = inspect_peft_adapter(resolve_source(adapter))
    if found.reasons:
        raise AdapterRefused(f"in {adapter}", found.reasons)
    return {
        "version": found.version,
        "type": found.peft_type,
        "base model": found.base_model,
        "tensors": len(found.tensors),
        "dtypes": sorted({entry.dtype for entry in found.tensors}),
        "bytes": found.nbytes,
        "warnings": ["not checked against a base: give --model to check every module and shape"],
    }


def _against(adapter: str, model: str, max_rank: int) -> dict[str, Any]:
    resolved = resolve(model)
    opened = open_model(resolved)
    weights = load_peft_adapter(
        resolve_source(adapter), opened.spec.lora_shapes(), base_name=resolved.name, base_tensor=_base_tensor(opened)
    )
    if weights.max_rank > max_rank:
        raise AdapterRefused(f"in {adapter}", [f"its rank {weights.max_rank} is above --max-rank {max_rank}"])
    report = weights.report
    return {
        "version": weights.version,
        "ranks": list(report.ranks),
        "scales": list(report.scales),
        "projections": list(report.modules),
        "modules": report.n_modules,
        "base model": report.base_model,
        "dtype": report.dtype,
        "bytes": report.nbytes,
        "chat template": weights.chat_template is not None,
        "warnings": list(report.warnings),
    }


def _base_tensor(opened: OpenedModel) -> BaseTensor:
    def base_tensor(projection: str) -> torch.Tensor | None:
        source = opened.source
        name = LM_HEAD if projection == "lm_head" and not opened.spec.tie_embeddings else EMBED
        # As a server holds it, so that a copy that it would take is taken here.
        return source.get(name).to(torch.bfloat16).float() if name in source.infos else None

    return base_tensor
