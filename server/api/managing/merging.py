"""Merging an adapter into a copy of the weights, and ending that: what the admin routes do."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from manylora.adapters.versions import AdapterInfo
from manylora.server.api.errors import bad_request
from manylora.server.api.state import AppState, MergesLike, Serving
from manylora.server.engine.errors import EngineDraining
from manylora.server.engine.merges import Difference, MergeInfo


async def merge_adapter(state: AppState, name: str, mode: str) -> dict[str, Any]:
    """Blocks until the merged weights serve. Raises AdapterNotFound, MergeRefused, MergeBusy, EngineDraining."""
    merges = _merges(state)
    if state.serving.engine.is_draining:
        raise EngineDraining
    loop = asyncio.get_running_loop()
    info = await loop.run_in_executor(state.admin_executor, partial(merges.merge, name, mode))
    return {"object": "adapter.merge", **_described(info)}


async def unmerge_adapter(state: AppState) -> dict[str, Any]:
    """Raises MergeRefused if nothing is merged, MergeBusy."""
    loop = asyncio.get_running_loop()
    info = await loop.run_in_executor(state.admin_executor, _merges(state).unmerge)
    return {"object": "adapter.unmerge", **_described(info)}


def merged_fields(serving: Serving, adapter: AdapterInfo) -> dict[str, Any]:
    """The fields of an adapter's JSON: the mode if requests for this version are computed by merged weights, and what
    was measured when they were made."""
    info = serving.merges.current if serving.merges is not None else None
    if info is None or info.version != adapter.version:
        return {"merged": None, "merge": None}
    return {"merged": info.mode, "merge": _described(info)}


def _described(info: MergeInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "version": info.version,
        "mode": info.mode,
        "bytes": info.nbytes,
        "drift": _difference(info.measured.drift),
        "adapter_effect": _difference(info.measured.effect),
        "warnings": list(info.warnings),
        "seconds": info.seconds,
        "automatic": info.automatic,
    }


def _difference(found: Difference) -> dict[str, float]:
    return {"max": found.max, "mean": found.mean}


def _merges(state: AppState) -> MergesLike:
    if state.serving.merges is None:
        raise bad_request("This server does not merge adapters.")
    return state.serving.merges
