"""vLLM's and SGLang's routes to load and unload adapters, with their own answers, so that their clients work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from manylora.adapters.errors import AdapterError, AdapterExists, AdapterNotFound
from manylora.server.api.access.auth import admin_only
from manylora.server.api.body import parse
from manylora.server.api.errors import ApiError, not_found
from manylora.server.api.managing.management import load_adapter, unload_adapter
from manylora.server.api.openapi.document import LOADING, describes, json_of, text
from manylora.server.api.openapi.responses import SglangResult
from manylora.server.api.schemas import SglangLoad, SglangUnload, VllmLoad, VllmUnload
from manylora.server.api.state import AppState, state_of

router = APIRouter(tags=["adapters: vLLM and SGLang"], dependencies=[Depends(admin_only)])

_MAX_JSON = 1 << 16
_SGLANG: Final[Mapping[str, Any]] = {
    "answers": {200: [json_of(SglangResult)], 400: [json_of(SglangResult)]},
    "errors": {503},
    "access": "admin",
}


@router.post(
    "/v1/load_lora_adapter",
    openapi_extra=describes(
        VllmLoad,
        answers={200: [text("Success: LoRA adapter 'sql' added successfully.")]},
        errors=LOADING,
        access="admin",
    ),
)
async def vllm_load(request: Request) -> Response:
    """vLLM: load an adapter; ``load_inplace`` replaces one of the same name."""
    state = state_of(request)
    body = await parse(request, VllmLoad, _MAX_JSON)
    if not body.lora_name or not body.lora_path:
        raise ApiError(
            400,
            "Both 'lora_name' and 'lora_path' must be provided.",
            param="lora_path" if body.lora_name else "lora_name",
            type="InvalidUserInput",
        )
    try:
        await load_adapter(state, body.lora_name, body.lora_path, replace=body.load_inplace)
    except AdapterExists:
        raise ApiError(
            400,
            f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True.",
            param="lora_name",
            type="InvalidUserInput",
        ) from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post(
    "/v1/unload_lora_adapter",
    openapi_extra=describes(
        VllmUnload,
        answers={200: [text("Success: LoRA adapter 'sql' removed successfully.")]},
        errors={404},
        access="admin",
    ),
)
async def vllm_unload(request: Request) -> Response:
    """vLLM: unload an adapter."""
    state = state_of(request)
    body = await parse(request, VllmUnload, _MAX_JSON)
    if not body.lora_name:
        raise ApiError(
            400,
            "'lora_name' needs to be provided to unload a LoRA adapter.",
            param="lora_name",
            type="InvalidUserInput",
        )
    try:
        await unload_adapter(state, body.lora_name)
    except AdapterNotFound:
        raise not_found(f"The lora adapter '{body.lora_name}' cannot be found.", "lora_name") from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.post("/load_lora_adapter", openapi_extra=describes(SglangLoad, **_SGLANG))
async def sglang_load(request: Request) -> Response:
    """SGLang: load an adapter."""
    state = state_of(request)
    body = await parse(request, SglangLoad, _MAX_JSON)
    try:
        await load_adapter(state, body.lora_name, body.lora_path, pinned=body.pinned)
    except AdapterError as error:
        return _sglang_result(state, error)
    return _sglang_result(state)


@router.post("/unload_lora_adapter", openapi_extra=describes(SglangUnload, **_SGLANG))
async def sglang_unload(request: Request) -> Response:
    """SGLang: unload an adapter."""
    state = state_of(request)
    body = await parse(request, SglangUnload, _MAX_JSON)
    try:
        await unload_adapter(state, body.lora_name)
    except AdapterError as error:
        return _sglang_result(state, error)
    return _sglang_result(state)


def _sglang_result(state: AppState, error: AdapterError | None = None) -> Response:
    loaded = {info.name: info.source for info in state.serving.registry.list()}
    body = {
        "success": error is None,
        "error_message": "" if error is None else str(error),
        "loaded_adapters": loaded,
    }
    return JSONResponse(body, status_code=200 if error is None else 400)
