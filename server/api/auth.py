"""Who may do what, decided from the path alone, before anything of the body is read.

| route                   | no key configured | --api-key          | --admin-key             | both             |
| ----------------------- | ----------------- | ------------------ | ----------------------- | ---------------- |
| /health /ready /metrics | open              | open               | open                    | open             |
| managing adapters       | loopback only     | loopback + API key | admin key               | admin key        |
| everything else         | open              | API key            | open                    | either key       |

"Loopback only": without an admin key, adapters can be managed only if the server listens on this machine alone, and
only under a loopback host name, so that neither a reverse proxy nor a web page whose name was made to point here
(DNS rebinding) can reach it.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from manylora.server.api.errors import ApiError
from manylora.server.config import ApiConfig, is_loopback

OPEN_PATHS: Final = frozenset({"/health", "/ready", "/metrics"})

_ADMIN_ROOT: Final = "/v1/adapters"
_ADMIN_PATHS: Final = frozenset(
    {
        _ADMIN_ROOT,
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/load_lora_adapter",
        "/unload_lora_adapter",
    }
)


class AuthMiddleware:
    """Answers 401 or 403 itself; everything else it passes on."""

    def __init__(self, app: ASGIApp, config: ApiConfig) -> None:
        self._app = app
        self._config = config
        self._api_keys = tuple(key.encode() for key in config.api_keys)
        self._admin_keys = () if config.admin_key is None else (config.admin_key.encode(),)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._check(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error.response()(scope, receive, send)

    def _check(self, scope: Scope) -> ApiError | None:
        path: str = scope["path"]
        if path in OPEN_PATHS:
            return None
        headers = Headers(scope=scope)
        key = _bearer(headers)
        if path in _ADMIN_PATHS or path.startswith(_ADMIN_ROOT + "/"):
            return self._check_admin(headers, key)
        if not self._api_keys:
            return None
        return None if _matches(key, self._api_keys + self._admin_keys) else _unauthorized(key)

    def _check_admin(self, headers: Headers, key: bytes | None) -> ApiError | None:
        if self._admin_keys:
            if _matches(key, self._admin_keys):
                return None
            if _matches(key, self._api_keys):
                return ApiError(403, "This key may not manage adapters; it takes the admin key.")
            return _unauthorized(key)
        if self._config.is_public:
            return ApiError(
                403,
                f"Managing adapters is off: the server listens on {self._config.host}, where other machines may reach "
                "it, and has no admin key. Start it with --admin-key, or on 127.0.0.1.",
            )
        if not is_loopback(_host_name(headers.get("host", ""))):
            return ApiError(
                403,
                "Managing adapters without an admin key takes a loopback host name (localhost, 127.0.0.1 or [::1]), "
                f"not {headers.get('host')!r}. Start the server with --admin-key to manage it under other names.",
            )
        if self._api_keys and not _matches(key, self._api_keys):
            return _unauthorized(key)
        return None


def _bearer(headers: Headers) -> bytes | None:
    """The key that was sent, if one was."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    # Headers are Latin-1 to Starlette; keys are ASCII, so another character just never matches.
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else None


def _matches(key: bytes | None, keys: Iterable[bytes]) -> bool:
    # Every key is compared, each in constant time, so that timing tells neither a prefix nor which one it was.
    return key is not None and any([hmac.compare_digest(key, one) for one in keys])


def _unauthorized(key: bytes | None) -> ApiError:
    message = (
        "No API key was sent: add the header `Authorization: Bearer KEY`." if key is None else "The API key is wrong."
    )
    return ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})


def _host_name(host: str) -> str:
    """The Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
