"""``GET /v1/models``: the base and its adapters, each a model that a request may name."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from manylora.adapters.errors import AdapterNotFound
from manylora.adapters.versions import AdapterInfo
from manylora.server.api.errors import not_found
from manylora.server.api.state import Serving, state_of

router = APIRouter(tags=["models"])


def _model(serving: Serving, id: str, created: int, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": id,
        "object": "model",
        "created": created,
        "owned_by": "manylora",
        "root": root,
        "parent": parent,
        "max_model_len": serving.max_context,
    }


def _base(serving: Serving) -> dict[str, Any]:
    return _model(serving, serving.base_name, serving.created, serving.base_root or serving.base_name, None)


def _adapter(serving: Serving, info: AdapterInfo) -> dict[str, Any]:
    return _model(serving, info.name, int(info.loaded_at), info.source, serving.base_name)


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The base, then the adapters by name."""
    serving = state_of(request).serving
    adapters = [_adapter(serving, info) for info in serving.registry.list()]
    return {"object": "list", "data": [_base(serving), *adapters]}


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> dict[str, Any]:
    """One model: the base, an adapter, or an adapter as ``base:adapter``."""
    serving = state_of(request).serving
    if model == serving.base_name:
        return _base(serving)
    for name in dict.fromkeys((model, model.removeprefix(serving.base_name + ":"))):
        try:
            return _adapter(serving, serving.registry.info(name)) | {"id": model}
        except AdapterNotFound:
            continue
    raise not_found(f"The model `{model}` does not exist.", "model")
