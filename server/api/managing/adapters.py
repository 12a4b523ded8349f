"""``/v1/adapters``: the server's own way to manage adapters."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from manylora.adapters.errors import AdapterNotFound
from manylora.adapters.versions import AdapterInfo
from manylora.server.api.access.auth import admin_only
from manylora.server.api.body import parse
from manylora.server.api.errors import ApiError
from manylora.server.api.managing.management import (
    alias_adapter,
    load_adapter,
    load_upload,
    pin_adapter,
    unload_adapter,
)
from manylora.server.api.managing.merging import merge_adapter, merged_fields, unmerge_adapter
from manylora.server.api.managing.uploads import read_upload
from manylora.server.api.openapi.document import LOADING, describes, json_of
from manylora.server.api.openapi.responses import Adapter, AdapterDeleted, AdapterList, AdapterMerged, AdapterUnmerged
from manylora.server.api.schemas import AdapterMerge, AdapterPatch, AdapterPut
from manylora.server.api.state import Serving, state_of

router = APIRouter(tags=["adapters"], dependencies=[Depends(admin_only)])

_MAX_JSON = 1 << 16
_ARCHIVES = frozenset(f"application/{kind}" for kind in ("zip", "gzip", "x-tar", "x-zip-compressed", "x-gzip", "zstd"))


def describe(serving: Serving, info: AdapterInfo, resident: frozenset[str]) -> dict[str, Any]:
    """An adapter as JSON: its registry entry, where it is, and what its load found.

    ``tier`` is "device" if its version (``resident`` are those that do) holds a slot there, else "host" if its weights
    are in memory, else "disk"; tokens are of the requests that have ended.
    """
    report = info.report
    tier = "device" if info.version in resident else "host" if info.version in serving.host else "disk"
    served = serving.metrics.adapter_tokens(info.name)
    return {
        "object": "adapter",
        "name": info.name,
        "version": info.version,
        "state": info.state,
        "tier": tier,
        "pinned": info.pinned,
        "source": info.source,
        "alias_of": info.alias_of,
        "base_model": report.base_model,
        "ranks": list(report.ranks),
        "scales": list(report.scales),
        "modules": list(report.modules),
        "n_modules": report.n_modules,
        "dtype": report.dtype,
        "bytes": info.nbytes,
        "warnings": list(report.warnings),
        "requests_in_flight": info.requests_in_flight,
        "prompt_tokens": served[0],
        "generation_tokens": served[1],
        "loaded_at": info.loaded_at,
        "last_used": info.last_used,
        **merged_fields(serving, info),
    }


def _described(request: Request, info: AdapterInfo) -> dict[str, Any]:
    serving = state_of(request).serving
    return describe(serving, info, serving.engine.stats().resident_versions)


@router.get("/v1/adapters", openapi_extra=describes(answers={200: [json_of(AdapterList)]}, access="admin"))
async def list_adapters(request: Request) -> dict[str, Any]:
    """Every adapter, and the old versions that only finish their requests (``state``: "draining")."""
    serving = state_of(request).serving
    resident = serving.engine.stats().resident_versions
    infos = serving.registry.list(draining=True)
    return {"object": "list", "data": [describe(serving, info, resident) for info in infos]}


@router.get(
    "/v1/adapters/{name:path}",
    openapi_extra=describes(answers={200: [json_of(Adapter)]}, errors={404}, access="admin"),
)
async def get_adapter(request: Request, name: str) -> dict[str, Any]:
    """One adapter."""
    return _described(request, state_of(request).serving.registry.info(name))


@router.put(
    "/v1/adapters/{name:path}",
    openapi_extra=describes(
        AdapterPut,
        answers={200: [json_of(Adapter)], 201: [json_of(Adapter)]},
        errors=LOADING,
        access="admin",
        upload=True,
    ),
)
async def put_adapter(request: Request, name: str) -> Response:
    """Load an adapter, or replace it: from JSON ``{source}`` or ``{alias_of}``, or a multipart upload of its files.

    201 if the name is new, 200 if it was replaced; running requests finish on the version they began with.
    """
    state = state_of(request)
    try:
        existed = bool(state.serving.registry.info(name))
    except AdapterNotFound:
        existed = False
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with read_upload(request, state.config.max_upload_bytes) as upload:
            info = await load_upload(state, name, upload)
    elif kind in _ARCHIVES:
        raise ApiError(415, f"{kind} is not unpacked here: send the adapter's files themselves as multipart/form-data.")
    else:
        body = await parse(request, AdapterPut, _MAX_JSON)
        if body.source is not None:
            info = await load_adapter(state, name, body.source, replace=body.replace, pinned=bool(body.pinned))
        else:
            info = await alias_adapter(state, name, body.alias_of or "", body.replace, bool(body.pinned))
        if body.pinned is False and info.pinned:  # a pin survives being replaced, unless it is taken off
            info = await pin_adapter(state, name, pinned=False)
    return JSONResponse(_described(request, info), status_code=200 if existed else 201)


@router.patch(
    "/v1/adapters/{name:path}",
    openapi_extra=describes(AdapterPatch, answers={200: [json_of(Adapter)]}, errors={404}, access="admin"),
)
async def patch_adapter(request: Request, name: str) -> dict[str, Any]:
    """Pin an adapter to the device, or unpin it."""
    state = state_of(request)
    body = await parse(request, AdapterPatch, _MAX_JSON)
    return _described(request, await pin_adapter(state, name, pinned=body.pinned))


@router.delete(
    "/v1/adapters/{name:path}",
    openapi_extra=describes(answers={200: [json_of(AdapterDeleted)]}, errors={404}, access="admin"),
)
async def delete_adapter(request: Request, name: str) -> dict[str, Any]:
    """Unload an adapter: its name is gone at once, running requests finish."""
    await unload_adapter(state_of(request), name)
    return {"object": "adapter.deleted", "name": name, "deleted": True}


@router.post(
    "/v1/adapters/unmerge",
    openapi_extra=describes(answers={200: [json_of(AdapterUnmerged)]}, errors={400, 409}, access="admin"),
)
async def unmerge(request: Request) -> dict[str, Any]:
    """End the merge: new requests for the adapter are computed beside the base again, running ones finish."""
    return await unmerge_adapter(state_of(request))


@router.post(
    "/v1/adapters/{name:path}/merge",
    openapi_extra=describes(
        AdapterMerge, answers={200: [json_of(AdapterMerged)]}, errors={404, 409, 503}, access="admin"
    ),
)
async def merge(request: Request, name: str) -> dict[str, Any]:
    """Compute the adapter's requests by merged weights; answers when they serve.

    Other adapters and the base are served as before, in the same steps. One adapter is merged at a time: another one
    takes its place.
    """
    body = await parse(request, AdapterMerge, _MAX_JSON)
    return await merge_adapter(state_of(request), name, body.mode)
