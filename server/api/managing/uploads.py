"""An adapter's files as ``multipart/form-data``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.types import Message

from manylora.server.api.errors import ApiError, bad_request

_FLAGS: Final = {"true": True, "1": True, "false": False, "0": False}

_MAX_FILES: Final = 8
_FRAMING: Final = 1 << 16
"""Bytes that multipart's own headers may take besides the files."""


@dataclass(frozen=True)
class Upload:
    """The files by name, open and spooled to disk, and the fields beside them."""

    files: Mapping[str, BinaryIO]
    replace: bool
    pinned: bool


@asynccontextmanager
async def read_upload(request: Request, limit: int) -> AsyncIterator[Upload]:
    """Read an upload of at most ``limit`` bytes: files named as in an adapter's directory (whatever the fields that
    hold them are called), and optionally the fields ``replace`` and ``pinned``. Raises ApiError.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        # Nothing is inflated here, so nothing small can become large.
        raise ApiError(415, f"An upload must not be compressed, and this one's Content-Encoding is {encoding!r:.40}.")
    limited = Request(request.scope, _limited(request, limit))
    async with limited.form(max_files=_MAX_FILES, max_fields=2, max_part_size=64) as form:
        yield _upload(form)


def _limited(request: Request, limit: int) -> Any:
    """``receive`` that fails with 413 once more than ``limit`` bytes (and the multipart framing) have come."""
    declared = request.headers.get("content-length", "")
    too_large = ApiError(
        413, f"The upload is larger than the {limit} bytes accepted here.", headers={"Connection": "close"}
    )
    if declared.isdecimal() and int(declared) > limit + _FRAMING:
        raise too_large
    size = 0

    async def receive() -> Message:
        nonlocal size
        message = await request.receive()
        size += len(message.get("body", b""))
        if size > limit + _FRAMING:
            raise too_large
        return message

    return receive


def _upload(form: FormData) -> Upload:
    files: dict[str, BinaryIO] = {}
    flags = {"replace": True, "pinned": False}
    for field, value in form.multi_items():
        if isinstance(value, UploadFile):
            # Some clients send the path; only its last part can be the name of an adapter's file.
            name = (value.filename or field).replace("\\", "/").rsplit("/", 1)[-1]
            if name in files:
                raise bad_request(f"The upload holds two files named {name!r:.100}.", field)
            files[name] = value.file
        elif field not in flags:
            raise bad_request(f"`{field}` is not a field of an upload; only replace and pinned are.", field)
        elif value.lower() not in _FLAGS:
            raise bad_request(f"`{field}` must be true or false, got {value!r:.40}.", field)
        else:
            flags[field] = _FLAGS[value.lower()]
    return Upload(files, flags["replace"], flags["pinned"])
