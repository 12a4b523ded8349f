"""Changing the set of adapters, for every dialect: on threads of their own, one change of the uploads at a time."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from manylora.adapters.errors import AdapterError, AdapterNotFound
from manylora.adapters.source import resolve_source, store_upload
from manylora.adapters.versions import AdapterInfo
from manylora.server.api.errors import ApiError
from manylora.server.api.state import AppState
from manylora.server.api.uploads import Upload

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

    return await _blocking(state, partial(_and_clean_up, state, name, load))


async def load_upload(state: AppState, name: str, upload: Upload) -> AdapterInfo:
    """Store the uploaded files and load them from there. Raises AdapterError, ApiError where uploads are off."""
    _check_draining(state)
    if state.config.upload_dir is None:
        raise ApiError(403, "Uploads are off: the server keeps no state (--state-dir).")
    return await _blocking(state, partial(_load_upload, state, name, upload, state.config.upload_dir))


def _load_upload(state: AppState, name: str, upload: Upload, root: Path) -> AdapterInfo:
    with state.upload_lock:
        before = {path.name for path in root.iterdir()} if root.is_dir() else set()
        directory = store_upload(name, upload.files, root, state.config.max_upload_bytes)

        def load() -> AdapterInfo:
            return state.serving.registry.load(name, str(directory), replace=upload.replace, pinned=upload.pinned)

        try:
            return _and_clean_up(state, name, load)
        except (AdapterError, OSError):
            if directory.name not in before:  # refused, so of no use; content stored before belongs to another name
                shutil.rmtree(directory, ignore_errors=True)
            raise


async def unload_adapter(state: AppState, name: str) -> None:
    """Take the name away. Raises AdapterNotFound."""

    def unload() -> None:
        _and_clean_up(state, name, partial(state.serving.registry.unload, name))

    await _blocking(state, unload)


async def pin_adapter(state: AppState, name: str, *, pinned: bool) -> AdapterInfo:
    """Raises AdapterNotFound."""
    return await _blocking(state, partial(state.serving.registry.pin, name, pinned))


def _and_clean_up(state: AppState, name: str, change: Callable[[], _T]) -> _T:
    """Make a change to ``name``, then delete the upload that it had before if no adapter has it any more.

    The files are only needed to load again after a restart: what is loaded is in memory.
    """
    registry, root = state.serving.registry, state.config.upload_dir
    try:
        before = registry.info(name).source
    except AdapterNotFound:
        before = ""
    result = change()
    if root is not None and before and Path(before).parent == root:
        with state.upload_lock:
            if all(info.source != before for info in registry.list()):
                shutil.rmtree(before, ignore_errors=True)
    return result


def _check_draining(state: AppState) -> None:
    if state.serving.engine.is_draining:
        raise ApiError(503, "The server is shutting down and loads no more adapters.")
