"""``GET /v1/models``: the base and its adapters, each a model that a request may name."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from manylora.adapters.errors import AdapterNotFound
from manylora.adapters.versions import AdapterInfo
from manylora.server.api.access.callers import Caller
from manylora.server.api.context import context_of
from manylora.server.api.errors import not_found
from manylora.server.api.openapi.document import describes, json_of
from manylora.server.api.openapi.responses import Model, ModelList
from manylora.server.api.schemas import ModelChoice
from manylora.server.api.state import Serving, state_of
from manylora.server.api.targets import target_of

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


def _adapter(serving: Serving, info: AdapterInfo, caller: Caller) -> dict[str, Any]:
    # Tenants have no business with the server's directories.
    root = info.source if caller.may_use_all else info.name
    return _model(serving, info.name, int(info.loaded_at), root, serving.base_name)


@router.get("/v1/models", openapi_extra=describes(answers={200: [json_of(ModelList)]}))
async def list_models(request: Request) -> dict[str, Any]:
    """The base, then the adapters by name: those that the key may use."""
    serving, caller = state_of(request).serving, context_of(request).caller
    base = [_base(serving)] if caller.may_use_base else []
    infos = [info for info in serving.registry.list() if caller.may_use((info.name,))]
    return {"object": "list", "data": base + [_adapter(serving, info, caller) for info in infos]}


@router.get("/v1/models/{model:path}", openapi_extra=describes(answers={200: [json_of(Model)]}, errors={403, 404}))
async def get_model(request: Request, model: str) -> dict[str, Any]:
    """One model: the base, an adapter, or an adapter as ``base:adapter``."""
    serving, caller = state_of(request).serving, context_of(request).caller
    target = target_of(serving, ModelChoice(model=model)).permitted(caller)
    if not target.adapters:
        return _base(serving)
    for name in target.adapters[0].names:
        try:
            return _adapter(serving, serving.registry.info(name), caller) | {"id": model}
        except AdapterNotFound:
            continue
    raise not_found(f"The model `{model}` does not exist.", "model")
