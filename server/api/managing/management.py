"""Changing the set of adapters, for every dialect: on threads of their own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from manylora.adapters.source import resolve_source
from manylora.adapters.versions import AdapterInfo
from manylora.server.api.errors import ApiError
from manylora.server.api.managing.uploads import Upload
from manylora.server.api.state import AppState

_T = TypeVar("_T")


async def _blocking(state: AppState, function: Callable[[], _T]) -> _T:
    return await asyncio.get_running_loop().run_in_executor(state.admin_executor, function)


async def load_adapter(
    state: AppState, name: str, source: str, *, replace: bool = False, pinned: bool = False
) -> AdapterInfo:
    """Load from a path inside the allowed roots, or a hub id. Raises AdapterError."""
    _check_draining(state)

    def load() -> AdapterInfo:
        # Only the check: the registry's own loader, which also serves the command line, reads (or downloads) it.
        resolve_source(source, allowed_roots=state.config.adapter_roots, download=lambda hub_id: hub_id)
        return state.serving.registry.load(name, source, replace=replace, pinned=pinned)

    return await _blocking(state, partial(_and_sweep, state, load))


async def load_upload(state: AppState, name: str, upload: Upload) -> AdapterInfo:
    """Store the uploaded files and load them from there. Raises AdapterError, ApiError where uploads are off."""
    _check_draining(state)
    if state.uploads is None:
        raise ApiError(403, "Uploads are off: the server keeps no state (--state-dir).")
    return await _blocking(state, partial(state.uploads.load, name, upload))


async def alias_adapter(state: AppState, name: str, other: str, replace: bool, pinned: bool) -> AdapterInfo:
    """Let ``name`` mean the version that ``other`` means now. Raises AdapterError."""
    alias = partial(state.serving.registry.alias, name, other, replace=replace, pinned=pinned)
    return await _blocking(state, partial(_and_sweep, state, alias))


async def unload_adapter(state: AppState, name: str) -> None:
    """Take the name away. Raises AdapterNotFound."""
    await _blocking(state, partial(_and_sweep, state, partial(state.serving.registry.unload, name)))


async def pin_adapter(state: AppState, name: str, *, pinned: bool) -> AdapterInfo:
    """Raises AdapterNotFound."""
    return await _blocking(state, partial(state.serving.registry.pin, name, pinned))


def _and_sweep(state: AppState, change: Callable[[], _T]) -> _T:
    """Make a change, then delete the uploads that nobody needs any more."""
    with contextlib.nullcontext() if state.uploads is None else state.uploads.sweeping():
        return change()


def _check_draining(state: AppState) -> None:
    if state.serving.engine.is_draining:
        raise ApiError(503, "The server is shutting down and loads no more adapters.")
