"""What a request asks for, as far as whoever passes it on must know: never whether it may, or whether it is right. That
is for the replica to say, so nothing here refuses anything."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]

_CHANGES: Final = frozenset(
    {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter"}
)
_ADAPTERS: Final = "/v1/adapters/"
_READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_NAMED: Final = frozenset({"/v1/completions", "/v1/chat/completions"})
_MAX_NAMES: Final = 64
"""More than a request may name; what names more is refused by whichever replica gets it."""


class Kind(enum.Enum):
    ANSWER = "answer"
    """Any replica can answer it."""
    CHANGE = "change"
    """It changes which adapters there are, or how they are held: on every replica, or on none."""
    METRICS = "metrics"
    """Every replica has its own."""
    STATUS = "status"
    """Whether there is anybody to ask."""


def kind_of(method: str, path: str) -> Kind:
    """By the rules of the server's own router, and for what it does not know, ANSWER: some replica will say so."""
    if path == "/metrics":
        return Kind.METRICS
    if path in ("/health", "/ready") and method in _READING:
        return Kind.STATUS
    if path in _CHANGES and method == "POST":
        return Kind.CHANGE
    # The server's router takes a newline at the end for no part of the path; its auth refuses it. Either way not ours.
    if path.startswith(_ADAPTERS) and method not in _READING:
        return Kind.CHANGE
    return Kind.ANSWER


def adapters_named(method: str, path: str, body: bytes) -> tuple[str, ...]:
    """Names that the request's weights may have, in the order of the body; the base's own name among them. Nothing for
    a body that names none, or that is none."""
    if method != "POST" or path not in _NAMED:
        return ()
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(fields, dict):
        return ()
    listed = fields.get("adapters")
    if isinstance(listed, list):
        names = [one.get("name") for one in listed[:_MAX_NAMES] if isinstance(one, dict)]
    else:
        names = [fields.get("lora_path") or fields.get("model")]
    return tuple(dict.fromkeys(name for name in names if isinstance(name, str) and name))


@dataclass(frozen=True)
class Route:
    """What a router looks at."""

    adapters: tuple[str, ...] = ()
    """As the request names them: adapters, the base, or ``base:adapter``."""
    avoid: frozenset[str] = frozenset()
    """Ids of replicas that this request was at already."""


def of_adapters(named: tuple[str, ...], base: str) -> tuple[str, ...]:
    """Of the names in a request those of adapters, as the registry has them."""
    return tuple(name.removeprefix(f"{base}:") for name in named if name != base)


@dataclass(frozen=True)
class Body:
    """A request's body: in memory, or, if it is an upload, in a file that every replica can read."""

    data: bytes = b""
    path: str | None = None


_PLAIN: Final = frozenset(
    {
        *("type", "asgi", "http_version", "scheme", "method", "path", "raw_path", "query_string", "root_path"),
        *("server", "client"),
    }
)


def carried(scope: Scope) -> dict[str, Any]:
    """The part of an ASGI scope that can go to another process: what the request was."""
    kept = {key: value for key, value in scope.items() if key in _PLAIN}
    return {**kept, "headers": [(bytes(name), bytes(value)) for name, value in scope["headers"]]}


def header(headers: Mapping[str, Any] | Message, name: bytes) -> bytes | None:
    """The first header of that (lower-case) name in a scope or a response's start."""
    return next((bytes(value) for key, value in headers["headers"] if bytes(key).lower() == name), None)
