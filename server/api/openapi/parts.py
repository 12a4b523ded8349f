"""The fixed parts of the OpenAPI document: what statuses and headers mean, keys, path parameters, uploads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final


@dataclass(frozen=True)
class Status:
    """``headers``: by name, the component that describes it."""

    description: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "headers", {"X-Request-Id": "RequestId", **self.headers})


STATUSES: Final[Mapping[int, Status]] = {
    200: Status("Done."),
    201: Status("Done, and the name is new."),
    400: Status("The request is wrong: `param` names the field, and the message says what it takes."),
    401: Status("No key was sent, or a wrong one.", {"WWW-Authenticate": "WWWAuthenticate"}),
    403: Status("The key, or the configuration, does not allow this."),
    404: Status("There is no such model, adapter or path."),
    408: Status("The request took too long to arrive."),
    409: Status("Another such operation is under way."),
    413: Status("The body is larger than the server takes."),
    415: Status("The body is not of a content type that this takes, or is compressed."),
    429: Status(
        "Too many requests wait, or come from this key: try again after `Retry-After`.", {"Retry-After": "RetryAfter"}
    ),
    500: Status("The server failed; its log has the details."),
    503: Status("The server, or the adapter, is not available now.", {"Retry-After": "RetryAfterIfKnown"}),
    504: Status("The request ran out of time, and was ended."),
}

HEADERS: Final[dict[str, Any]] = {
    "RequestId": {
        "description": "The request's id: the one it was sent with, or a new one.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[!-~]{1,128}$"},
    },
    "WWWAuthenticate": {
        "description": "The scheme that keys are sent by.",
        "required": True,
        "schema": {"type": "string", "const": "Bearer"},
    },
    "RetryAfter": {
        "description": "Seconds after which to try again.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[0-9]+$"},
    },
    "RetryAfterIfKnown": {
        "description": "Seconds after which to try again; absent if that is not known.",
        "required": False,
        "schema": {"type": "string", "pattern": "^[0-9]+$"},
    },
}

SECURITY_SCHEMES: Final[dict[str, Any]] = {
    "apiKey": {
        "type": "http",
        "scheme": "bearer",
        "description": "A key to use models with: of --api-key, or of a tenant in the key file.",
    },
    "adminKey": {
        "type": "http",
        "scheme": "bearer",
        "description": "The key to manage adapters with: of --admin-key. Without one, adapters can be managed only on "
        "a server that listens on a loopback address.",
    },
}

TAGS: Final[Mapping[str, str]] = {
    "inference": "Completions and chats, whole or streamed.",
    "models": "What `model` may name.",
    "tokens": "Texts to token ids and back.",
    "adapters": "The server's own way to manage adapters.",
    "adapters: vLLM and SGLang": "The same, as their clients do it.",
    "operations": "Probes and metrics.",
    "playground": "A page for people, at `/`.",
}

_SLASHES: Final = "Slashes in it are sent as they are, or as %2F."
PARAMETERS: Final[Mapping[str, dict[str, Any]]] = {
    "name": {"description": f"An adapter's name. {_SLASHES}", "schema": {"type": "string", "minLength": 1}},
    "model": {
        "description": f"The base's name, an adapter's, or `base:adapter`. {_SLASHES}",
        "schema": {"type": "string", "minLength": 1},
    },
}

REQUEST_ID_PARAMETER: Final[dict[str, Any]] = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "An id of 1 to 128 visible ASCII characters to call the request by, in the answer and in the log; "
    "anything else is replaced by a new one.",
    "schema": {"type": "string"},
}

_FLAG: Final = {"type": "string", "enum": ["true", "false", "1", "0"]}
UPLOAD: Final[dict[str, Any]] = {
    "type": "object",
    "description": "The files of an adapter's directory, by their file names, whatever the fields are called.",
    "properties": {"replace": {**_FLAG, "default": "true"}, "pinned": {**_FLAG, "default": "false"}},
    "additionalProperties": {"type": "string", "contentMediaType": "application/octet-stream"},
}
