"""The HTTP application over a loaded base."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI

from manylora.adapters.on_demand import OnDemand
from manylora.adapters.versions import AdapterRef
from manylora.server.api import adapters, chat, completions, dialects, health, models, tokenization
from manylora.server.api.auth import AuthMiddleware
from manylora.server.api.context import ContextMiddleware
from manylora.server.api.errors import install_error_handlers
from manylora.server.api.on_demand import OnDemandLoads
from manylora.server.api.state import AppState, Serving
from manylora.server.api.stored_uploads import StoredUploads
from manylora.server.config import ApiConfig

_ADMIN_THREADS = 2
"""Loads at once, and as many again that requests asked for; more wait, so that they leave the processor to those who
generate."""


def create_app(serving: Serving, config: ApiConfig) -> FastAPI:
    """The ASGI application. It owns nothing of ``serving``: who made the engine closes it."""
    executor = ThreadPoolExecutor(_ADMIN_THREADS, thread_name_prefix="manylora-admin")
    requested = ThreadPoolExecutor(_ADMIN_THREADS, thread_name_prefix="manylora-on-demand")

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        # A download that nobody waits for any more does not hold up the end of the process.
        executor.shutdown(wait=False, cancel_futures=True)
        requested.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="manylora",
        version=_version(),
        lifespan=lifespan,
        docs_url=None,  # they fetch their scripts from a CDN; /openapi.json is there for any viewer
        redoc_url=None,
        redirect_slashes=False,  # a redirected POST is a surprise to most clients
    )
    on_demand = uploads = None
    if config.adapters_on_demand:
        source = OnDemand(serving.registry, config.adapter_roots, config.adapters_on_demand)
        on_demand = OnDemandLoads(source, requested)
    if config.upload_dir is not None:
        uploads = StoredUploads(config.upload_dir, serving.registry, config.max_upload_bytes)
        serving.registry.when_freed(partial(_sweep_later, executor, uploads))
    app.state.manylora = AppState(serving, config, executor, uploads, on_demand)
    for module in (completions, chat, models, tokenization, adapters, dialects, health):
        app.include_router(module.router)
    install_error_handlers(app)
    app.add_middleware(AuthMiddleware, config=config)
    app.add_middleware(ContextMiddleware)  # added last, so it is the outermost
    return app


def _sweep_later(executor: Executor, uploads: StoredUploads, _freed: AdapterRef) -> None:
    """A version was freed: not on this thread, which may be the step loop's, see what of the uploads can go."""
    with contextlib.suppress(RuntimeError):  # the executor is shut down; the next change does it
        executor.submit(uploads.sweep)


def _version() -> str:
    try:
        return version("manylora")
    except PackageNotFoundError:  # run from a tree that is not installed
        return "0"
