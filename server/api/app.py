"""The HTTP application over a loaded base."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from fastapi import FastAPI
from starlette.routing import BaseRoute

from manylora.adapters.on_demand import OnDemand
from manylora.adapters.versions import AdapterRef
from manylora.server.api import chat, completions, health, models, playground, tokenization
from manylora.server.api.access.auth import AuthMiddleware
from manylora.server.api.access.keys import KeyRing
from manylora.server.api.context import ContextMiddleware
from manylora.server.api.errors import install_error_handlers
from manylora.server.api.managing import adapters, dialects
from manylora.server.api.managing.stored_uploads import StoredUploads
from manylora.server.api.observing.access_log import log_request
from manylora.server.api.observing.http_metrics import HttpMetrics
from manylora.server.api.observing.observation import Observation
from manylora.server.api.observing.tracing import Tracing
from manylora.server.api.on_demand import OnDemandLoads
from manylora.server.api.openapi.document import document
from manylora.server.api.state import AppState, Serving
from manylora.server.config import ApiConfig

_ROUTES = (completions, chat, models, tokenization, adapters, dialects, health, playground)

_ADMIN_THREADS = 2
"""Loads at once, and as many again that requests asked for; more wait, so that they leave the processor to those who
generate."""


def create_app(serving: Serving, config: ApiConfig, *, tracing: Tracing | None = None) -> FastAPI:
    """The ASGI application. It owns nothing of ``serving``: who made the engine closes it.

    ``tracing``: closed at the end; by default to ``config.otlp_endpoint``, if there is one.
    """
    if tracing is None and config.otlp_endpoint is not None:
        tracing = Tracing.to_collector(config.otlp_endpoint, _version())
    executor = ThreadPoolExecutor(_ADMIN_THREADS, thread_name_prefix="manylora-admin")
    requested = ThreadPoolExecutor(_ADMIN_THREADS, thread_name_prefix="manylora-on-demand")

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        # A download that nobody waits for any more does not hold up the end of the process.
        executor.shutdown(wait=False, cancel_futures=True)
        requested.shutdown(wait=False, cancel_futures=True)
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="manylora",
        version=_version(),
        lifespan=lifespan,
        docs_url=None,  # they fetch their scripts from a CDN; /openapi.json is there for any viewer
        redoc_url=None,
        # FastAPI's own spans would carry paths and queries; ``api.tracing`` has ours.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        redirect_slashes=False,  # a redirected POST is a surprise to most clients
    )
    on_demand = uploads = None
    if config.adapters_on_demand:
        source = OnDemand(serving.registry, config.adapter_roots, config.adapters_on_demand)
        on_demand = OnDemandLoads(source, requested)
    if config.upload_dir is not None:
        uploads = StoredUploads(config.upload_dir, serving.registry, config.max_upload_bytes)
        serving.registry.when_freed(partial(_sweep_later, executor, uploads))
    http_metrics = HttpMetrics(serving.metrics.tenant_label)
    keys = KeyRing(config)
    keys.when_changed(serving.metrics.retain_tenants)
    app.state.manylora = AppState(serving, config, executor, http_metrics, uploads, on_demand, keys)
    served = [module for module in _ROUTES if config.playground or module is not playground]
    for module in served:
        app.include_router(module.router)
    app.openapi = cache(partial(_document, config))  # type: ignore[method-assign]
    install_error_handlers(app, _routes_of(served))
    app.add_middleware(AuthMiddleware, config=config, keys=keys)
    # The trace's id is in the log.
    listeners = [] if tracing is None else [tracing.record]
    observation = Observation([*_routes_of(served), *app.routes], [*listeners, http_metrics.record, log_request])
    app.add_middleware(ContextMiddleware, observer=observation)  # added last, so it is the outermost
    return app


def routes() -> list[BaseRoute]:
    """Every route of the application but that of the document itself."""
    return _routes_of(_ROUTES)


def _routes_of(modules: Iterable[ModuleType]) -> list[BaseRoute]:
    return [route for module in modules for route in module.router.routes]


def _document(config: ApiConfig) -> dict[str, Any]:
    """``/openapi.json``."""
    return document(
        [route for route in routes() if config.playground or route not in playground.router.routes],
        version=_version(),
        takes_api_key=bool(config.api_keys) or config.keys_file is not None,
        takes_admin_key=config.admin_key is not None,
        protects_metrics=config.protect_metrics,
    )


def _sweep_later(executor: Executor, uploads: StoredUploads, _freed: AdapterRef) -> None:
    """A version was freed: not on this thread, which may be the step loop's, see what of the uploads can go."""
    with contextlib.suppress(RuntimeError):  # the executor is shut down; the next change does it
        executor.submit(uploads.sweep)


def _version() -> str:
    try:
        return version("manylora")
    except PackageNotFoundError:  # run from a tree that is not installed
        return "0"
