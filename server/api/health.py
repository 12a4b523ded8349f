"""``/health`` (alive?), ``/ready`` (send requests here?), ``/metrics`` (Prometheus)."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from manylora.server.api.errors import DRAIN_RETRY_AFTER, ApiError
from manylora.server.api.openapi.document import describes, json_of, text
from manylora.server.api.openapi.responses import Status
from manylora.server.api.state import state_of

router = APIRouter(tags=["operations"])


@router.get("/health", openapi_extra=describes(answers={200: [json_of(Status)]}, errors={503}, access="open"))
async def health(request: Request) -> Response:
    """200 while the engine runs, draining included; 503 if it died and the process should be replaced."""
    engine = state_of(request).serving.engine
    # A drained engine has ended as it was told to, which is no reason to kill the process before it is done.
    if not engine.is_healthy and not engine.is_draining:
        raise ApiError(503, "The engine has stopped; see the server's log.")
    return JSONResponse({"status": "ok"})


@router.get("/ready", openapi_extra=describes(answers={200: [json_of(Status)]}, errors={503}, access="open"))
async def ready(request: Request) -> Response:
    """200 when requests are taken, else 503."""
    engine = state_of(request).serving.engine
    if engine.is_draining:
        raise ApiError(503, "The server is shutting down.", headers={"Retry-After": DRAIN_RETRY_AFTER})
    if not engine.is_healthy:
        raise ApiError(503, "The engine is not running.")
    return JSONResponse({"status": "ready"})


@router.get(
    "/metrics",
    openapi_extra=describes(answers={200: [text("# TYPE up gauge\nup 1.0\n")]}, access="metrics"),
)
async def metrics(request: Request) -> Response:
    """The Prometheus text format."""
    state = state_of(request)

    def render() -> bytes:
        return state.serving.metrics.render() + state.http_metrics.render()

    return Response(await asyncio.to_thread(render), media_type=CONTENT_TYPE_LATEST)
