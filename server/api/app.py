"""The HTTP application over a loaded base."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI

from manylora.server.api import adapters, chat, completions, dialects, health, models, tokenization
from manylora.server.api.auth import AuthMiddleware
from manylora.server.api.errors import install_error_handlers
from manylora.server.api.state import AppState, Serving
from manylora.server.config import ApiConfig

_ADMIN_THREADS = 2
"""Loads at once; more wait, so that they leave the processor to those who generate."""


def create_app(serving: Serving, config: ApiConfig) -> FastAPI:
    """The ASGI application. It owns nothing of ``serving``: who made the engine closes it."""
    executor = ThreadPoolExecutor(_ADMIN_THREADS, thread_name_prefix="manylora-admin")

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        # A download that nobody waits for any more does not hold up the end of the process.
        executor.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="manylora",
        version=_version(),
        lifespan=lifespan,
        docs_url=None,  # they fetch their scripts from a CDN; /openapi.json is there for any viewer
        redoc_url=None,
        redirect_slashes=False,  # a redirected POST is a surprise to most clients
    )
    app.state.manylora = AppState(serving, config, executor, threading.RLock())
    for module in (completions, chat, models, tokenization, adapters, dialects, health):
        app.include_router(module.router)
    install_error_handlers(app)
    app.add_middleware(AuthMiddleware, config=config)
    return app


def _version() -> str:
    try:
        return version("manylora")
    except PackageNotFoundError:  # run from a tree that is not installed
        return "0"
