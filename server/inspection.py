"""``manylora inspect``: what an adapter is, what it would do, and why it would be refused, without a server."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch

from manylora.adapters.errors import AdapterRefused
from manylora.adapters.peft_loader import Inspection, inspect_peft_adapter, load_peft_adapter
from manylora.adapters.source import resolve_source
from manylora.adapters.weights import AdapterWeights
from manylora.kernels.lora_weights import LoraWeights
from manylora.kernels.sites import GLOBAL_PROJECTIONS, PROJECTIONS, RANK_PAGE, LoraShapes
from manylora.server.model.resolve import open_model, resolve
from manylora.server.model.stored_base import StoredBase

_FACTOR: Final = re.compile(
    r"base_model\.model\.(?:(?:model\.layers|transformer\.h)\.(?P<layer>\d{1,6})\.)?(?:\w+\.)*?(?P<module>\w+)\.lora_(?:embedding_)?A(?:\.weight)?"
)
"""PEFT's name of the factor whose first dimension is the rank."""

_ALONE: Final = "not checked against a base: give --model to check every module and shape"


def inspect(adapter: str, model: str | None, max_rank: int) -> dict[str, Any]:
    """The report, by field. With ``model`` all checks of a load are made, without it those that need no base.

    Raises AdapterError (AdapterRefused with every reason), and ModelError for ``model``.
    """
    return _against(adapter, model, max_rank) if model is not None else _alone(adapter)


def readable(report: Mapping[str, Any]) -> str:
    """A report of `inspect` as text for people."""
    lines = []
    for key, value in report.items():
        if key in ("placement", "warnings"):
            continue
        shown = value
        if isinstance(value, bool):
            shown = "yes" if value else "no"
        elif isinstance(value, list):
            shown = ", ".join(map(str, value)) or "none"
        elif isinstance(value, dict):
            shown = ", ".join(f"{name} {amount}" for name, amount in value.items()) or "none"
        elif key == "bytes":
            shown = _size(value)
        lines.append(f"{key + ':':16}{'not said' if shown is None else shown}")
    for projection, placed in report.get("placement", {}).items():
        lines.append(f"  {projection:8}{_placed(placed)}")
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    return "\n".join(lines)


def _placed(placed: Mapping[str, Any]) -> str:
    parts = []
    if placed["layers"] is not None:
        parts.append(f"layers {placed['layers']}")
    if placed["ranks"]:
        parts.append(f"rank {', '.join(map(str, placed['ranks']))}")
        parts.append(f"scale {', '.join(f'{scale:.6g}' for scale in placed['scales'])}")
    parts += [what for what in ("gain", "bias") if placed[what]]
    if placed["replaced_rows"]:
        parts.append(f"{placed['replaced_rows']} rows replaced")
    return "; ".join(parts)


def _alone(adapter: str) -> dict[str, Any]:
    source = resolve_source(adapter)
    found = inspect_peft_adapter(source)
    if found.reasons:
        raise AdapterRefused(f"in {adapter}", found.reasons)
    return {
        "version": found.version,
        "kind": found.kind,
        "type": found.peft_type,
        "base model": found.base_model,
        "dtypes": sorted({entry.dtype for entry in found.tensors}),
        "tensors": len(found.tensors),
        "bytes": found.nbytes,
        **_named(found),
        "warnings": [_ALONE],
    }


def _named(found: Inspection) -> dict[str, Any]:
    """What the names and shapes of the file's tensors say: ranks, modules by their last name, layers."""
    ranks, modules, layers = set(), set(), set()
    for entry in found.tensors:
        if (match := _FACTOR.fullmatch(entry.name)) is None or not entry.shape:
            continue
        ranks.add(entry.shape[0])
        modules.add(match["module"])
        if match["layer"] is not None:
            layers.add(int(match["layer"]))
    return {"ranks": sorted(ranks), "modules": sorted(modules), "layers": _ranges(layers) or None}


def _against(adapter: str, model: str, max_rank: int) -> dict[str, Any]:
    resolved = resolve(model)
    opened = open_model(resolved)
    shapes = opened.spec.lora_shapes()
    weights = load_peft_adapter(
        resolve_source(adapter), shapes, base=_AsServed(StoredBase(opened)), base_name=resolved.name
    )
    if weights.max_rank > max_rank:
        raise AdapterRefused(f"in {adapter}", [f"its rank {weights.max_rank} is above --max-rank {max_rank}"])
    report = weights.report
    return {
        "version": weights.version,
        "kind": report.kind,
        "base model": report.base_model,
        "dtype": report.dtype,
        "bytes": report.nbytes,
        "ranks": list(report.ranks),
        "scales": list(report.scales),
        "modules": report.n_modules,
        "projections": list(report.modules),
        "replaced rows": dict(report.replaced_rows),
        **_on_the_device(weights.lora, shapes),
        "composable": "yes" if weights.not_composable is None else f"no: {weights.not_composable}",
        "chat template": weights.chat_template is not None,
        "placement": _placement(weights, shapes),
        "warnings": list(report.warnings),
    }


class _AsServed:
    """The base as far as a server holds it otherwise than its files do: tables are in bf16 there.

    Not so the projections: a 16-bit base's are taken as they are, although a server quantises them. Whether an adapter
    is refused does not depend on that, only the gains of a DoRA do, which are not shown.
    """

    def __init__(self, stored: StoredBase) -> None:
        self.weight, self.bias, self.tied = stored.weight, stored.bias, stored.tied
        self._table = stored.table

    def table(self, projection: str) -> torch.Tensor:
        return self._table(projection).to(torch.bfloat16).float()


def _on_the_device(lora: LoraWeights, shapes: LoraShapes) -> dict[str, Any]:
    """What a slot of it takes: pages of ranks by projection, and bytes where adapters are held in 16 bits (GPU)."""
    ranks: dict[str, int] = {}
    for (projection, _), pair in lora.pairs.items():
        ranks[projection] = max(ranks.get(projection, 0), pair.rank)
    pages = {p: -(-ranks[p] // RANK_PAGE) for p in PROJECTIONS if p in ranks}
    widths = {p: (shapes.in_features[p] + shapes.out_features[p]) * shapes.layers_of(p) for p in pages}
    elements = sum(count * RANK_PAGE * widths[p] for p, count in pages.items())
    elements += sum(table.rows.numel() for table in lora.tables.values())
    vectors = sum(vector.nbytes for vector in lora.vectors.values())
    return {
        "device pages": pages,
        "device bytes": f"{_size(2 * elements + vectors)} a slot in 16 bits (GPU), "
        f"{_size(4 * elements + vectors)} in 32 bits (CPU)",
    }


def _placement(weights: AdapterWeights, shapes: LoraShapes) -> dict[str, Any]:
    """What the adapter does, by projection."""
    lora, placement = weights.lora, {}
    for projection in PROJECTIONS:
        pairs = {layer: pair for (p, layer), pair in lora.pairs.items() if p == projection}
        vectors = {layer: vector for (p, layer), vector in lora.vectors.items() if p == projection}
        table = lora.tables.get(projection)
        if not pairs and not vectors and table is None:
            continue
        layers = {*pairs, *vectors}
        placement[projection] = {
            "layers": None if projection in GLOBAL_PROJECTIONS else f"{_ranges(layers)} of {shapes.n_layers}",
            "ranks": sorted({pair.rank for pair in pairs.values()}),
            "scales": sorted({pair.scale for pair in pairs.values()}),
            "gain": any(vector.gain is not None for vector in vectors.values()),
            "bias": any(vector.bias is not None for vector in vectors.values()),
            "replaced_rows": 0 if table is None else len(table.ids),
        }
    return placement


def _ranges(numbers: Iterable[int]) -> str:
    """``0-3, 7``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _size(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.1f} MiB" if nbytes >= 1 << 20 else f"{nbytes} bytes"


def refusal(error: AdapterRefused) -> dict[str, Sequence[str]]:
    """The reasons of a refusal, for ``--json``."""
    return {"refused": list(error.reasons)}
