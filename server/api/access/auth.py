"""Who may do what, decided from the path alone, before anything of the body is read.

| route                   | no key configured | --api-key, --keys | --admin-key | both       |
| ----------------------- | ----------------- | ----------------- | ----------- | ---------- |
| /health /ready /metrics | open              | open              | open        | open       |
| / (the playground)      | open              | open              | open        | open       |
| managing adapters       | loopback only     | see below         | admin key   | admin key  |
| everything else         | open              | key               | open        | either key |

With --protect-metrics, /metrics takes the admin key.

"Loopback only": without an admin key, adapters can be managed only if the server listens on this machine alone, and
only under a loopback host name, so that neither a reverse proxy nor a web page whose name was made to point here
(DNS rebinding) can reach it. With --api-key it then takes that key. With --keys it is off: no tenant is the operator,
nor is everybody on this machine.

What a tenant may use is looked at where the body is known (``api.targets``). The routes that manage adapters also ask
for the admin themselves (``admin_only``), so none of them is open because of how its path is written.
"""

from __future__ import annotations

from typing import Final

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from manylora.server.api.access.callers import ADMIN, ANYBODY, Caller
from manylora.server.api.access.deadlines import within_deadline
from manylora.server.api.access.keys import KeyRing
from manylora.server.api.access.rate_limits import RateLimited
from manylora.server.api.context import RequestContext, context_in, context_of
from manylora.server.api.errors import ApiError, bad_request, too_many_requests
from manylora.server.api.playground import ASSET_PATHS, PAGE_PATH
from manylora.server.config import ApiConfig, is_loopback

METRICS_PATH: Final = "/metrics"
OPEN_PATHS: Final = frozenset({"/health", "/ready", METRICS_PATH, PAGE_PATH}) | ASSET_PATHS

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
_READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
"""What computes nothing, and so costs a tenant nothing."""


class AuthMiddleware:
    """Says who the caller is, or answers 400, 401, 403 or 429 itself. What is for anybody with a key must be over by
    its deadline."""

    def __init__(self, app: ASGIApp, config: ApiConfig, keys: KeyRing) -> None:
        self._app = app
        self._config = config
        self._keys = keys
        self._open = OPEN_PATHS - {METRICS_PATH} if config.protect_metrics else OPEN_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        is_admin = _is_admin(scope["path"])
        try:
            caller = self._admin(scope) if is_admin else self._caller(scope)
            _check_path(scope["path"])
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        context = context_in(scope)
        context.caller = caller
        if is_admin:  # loading an adapter may take minutes
            await self._app(scope, receive, send)
            return
        try:
            await within_deadline(self._app, self._config.request_timeout, scope, receive, send)
        finally:
            if caller.limits is not None:
                caller.limits.spend_tokens(_tokens(context))

    def _is_open(self, scope: Scope) -> bool:
        # The page is there to be read: no other request is answered at a path that many a proxy makes of others.
        return scope["path"] in self._open and (scope["path"] != PAGE_PATH or scope["method"] in _READING)

    def _caller(self, scope: Scope) -> Caller:
        """Who may use the server. Raises ApiError."""
        caller = _known(scope, self._keys)
        if caller is None:
            if self._keys.needs_key:
                raise _unauthorized(_bearer(Headers(scope=scope)))
            return ANYBODY
        if caller.limits is not None and scope["method"] not in _READING:
            try:
                caller.limits.take_requests(1)
            except RateLimited as error:
                context_in(scope).caller = caller  # whom the refusal is counted for
                raise too_many_requests(str(error), error.retry_after) from None
        return caller

    def _admin(self, scope: Scope) -> Caller:
        """Who may manage adapters. Raises ApiError."""
        config = self._config
        if config.admin_key is None and config.keys_file is not None:
            raise ApiError(403, "Managing adapters is off: the server has tenants and no admin key (--admin-key).")
        headers = Headers(scope=scope)
        caller = _known(scope, self._keys)
        if config.admin_key is not None:
            if caller is None:
                raise _unauthorized(_bearer(headers))
            if not caller.is_admin:
                context_in(scope).caller = caller
                what = "see metrics" if scope["path"] == METRICS_PATH else "manage adapters"
                raise ApiError(403, f"This key may not {what}; it takes the admin key.")
            return caller
        if config.is_public:
            raise ApiError(
                403,
                f"Managing adapters is off: the server listens on {config.host}, where other machines may reach "
                "it, and has no admin key. Start it with --admin-key, or on 127.0.0.1.",
            )
        if not is_loopback(_host_name(headers.get("host", ""))):
            raise ApiError(
                403,
                "Managing adapters without an admin key takes a loopback host name (localhost, 127.0.0.1 or [::1]), "
                f"not {headers.get('host')!r:.100}. Start the server with --admin-key to manage it under other names.",
            )
        if config.api_keys and caller is None:
            raise _unauthorized(_bearer(headers))
        return ADMIN


async def admin_only(request: Request) -> None:
    """A dependency of every route that manages adapters. Raises ApiError 403."""
    if not context_of(request).caller.is_admin:
        raise ApiError(403, "Only the bearer of the admin key may manage adapters.")


def _tokens(context: RequestContext) -> int:
    """What a request has cost. If an end is not known, as its answer was cut off, the most that it may have cost: or to
    be cut off would be a way not to pay."""
    if len(context.finished) < len(context.submitted):
        return sum(context.submitted)
    return sum(finish.prompt_tokens + finish.completion_tokens for finish in context.finished)


def _is_admin(path: str) -> bool:
    return path in _ADMIN_PATHS or path.startswith(_ADMIN_ROOT + "/") or path == METRICS_PATH


def _check_path(path: str) -> None:
    """Raise ApiError 404 for a path that others may take for another one: to the router, which works with regular
    expressions, a path with a newline at its end is the path without it."""
    if not path.isprintable():
        raise ApiError(404, "There is no path here that holds characters that cannot be printed.")


def _known(scope: Scope, keys: KeyRing) -> Caller | None:
    """The bearer of the key that was sent; None without a key, and for a key that nobody has. Raises ApiError."""
    key = _bearer(Headers(scope=scope))
    return None if key is None else keys.find(key)


def _bearer(headers: Headers) -> str | None:
    """The key that was sent, if one was. Raises ApiError 400 if there are several: a proxy before this server may have
    looked at another one."""
    sent = headers.getlist("authorization")
    if len(sent) > 1:
        raise bad_request("There are several Authorization headers; send one.")
    scheme, _, key = (sent[0] if sent else "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def _unauthorized(key: str | None) -> ApiError:
    message = (
        "No API key was sent: add the header `Authorization: Bearer KEY`." if key is None else "The API key is wrong."
    )
    return ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})


def _host_name(host: str) -> str:
    """The Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
