"""The playground: one page at ``/``, with its style and its modules beside it; nothing comes from anywhere else.

It asks the API as any other client does, with the keys that its user types in. The page itself holds nothing that needs
one, so it is open; ``--no-playground`` takes it away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fastapi import APIRouter
from fastapi.responses import Response

from manylora.server.api.openapi.document import Content, describes

router = APIRouter(tags=["playground"])

PAGE_PATH: Final = "/"
_ASSETS_ROOT: Final = "/playground/"
_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_FILES: Final = {
    file.name: file.read_bytes() for file in sorted(Path(__file__).parent.iterdir()) if file.suffix in _TYPES
}
"""What is served, all of it: no path of a request is ever looked up on the disk."""

ASSET_PATHS: Final = frozenset(_ASSETS_ROOT + name for name in _FILES if not name.endswith(".html"))

_HEADERS: Final = {
    # Scripts and styles from here, requests to here; no markup that a name smuggled in could run, send or frame.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # The page of one version with the modules of another would be neither.
    "Cache-Control": "no-cache",
}


_ABSENT: Final = {404}
"""With ``--no-playground``."""


def _file(name: str) -> Response:
    return Response(_FILES[name], media_type=_TYPES[Path(name).suffix], headers=_HEADERS)


@router.get(
    PAGE_PATH,
    openapi_extra=describes(
        answers={200: [Content("text/html", None, "<!doctype html>\n")]}, errors=_ABSENT, access="open"
    ),
)
async def playground() -> Response:
    """The playground: a page for people. Not there with `--no-playground`."""
    return _file("page.html")


@router.get(
    "/playground/style.css",
    openapi_extra=describes(answers={200: [Content("text/css", None, ":root {}\n")]}, errors=_ABSENT, access="open"),
)
async def style() -> Response:
    """Its style."""
    return _file("style.css")


def _serve_module(name: str) -> None:
    async def module() -> Response:
        return _file(name)

    module.__name__, module.__doc__ = f"module_{Path(name).stem}", "One of its modules."
    answers = {200: [Content("text/javascript", None, "export {};\n")]}
    router.get(_ASSETS_ROOT + name, openapi_extra=describes(answers=answers, errors=_ABSENT, access="open"))(module)


for _name in _FILES:
    if _name.endswith(".js"):
        _serve_module(_name)
