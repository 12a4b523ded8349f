"""``manylora adapters``: manage the adapters of a running server, over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

_TIMEOUT = httpx.Timeout(30, read=600)
"""Seconds; a load may download first."""

_UPLOADED = ("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer_config.json")


class ServerRefused(Exception):
    """The server answered 4xx; the message is its own. Exit code 2."""


class ServerFailed(Exception):
    """The server cannot be reached, or answered 5xx or nonsense. Exit code 1."""


class AdminClient:
    """A server's ``/v1/adapters``. Every method raises ServerRefused or ServerFailed."""

    def __init__(self, url: str, key: str | None, *, transport: httpx.BaseTransport | None = None) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._url = url.rstrip("/")
        self._client = httpx.Client(headers=headers, timeout=_TIMEOUT, transport=transport)

    def list(self) -> dict[str, Any]:
        return self._request("GET", "")

    def load(self, name: str, source: str, *, replace: bool, pinned: bool | None) -> dict[str, Any]:
        """Load from a path *on the server*, or a hub id."""
        body = {"source": source, "replace": replace, "pinned": pinned}
        return self._request("PUT", name, json=body)

    def alias(self, name: str, other: str, *, replace: bool, pinned: bool | None) -> dict[str, Any]:
        """Make ``name`` mean the version that ``other`` means now."""
        return self._request("PUT", name, json={"alias_of": other, "replace": replace, "pinned": pinned})

    def upload(self, name: str, directory: Path, *, replace: bool, pinned: bool) -> dict[str, Any]:
        """Send the adapter in a local directory."""
        with ExitStack() as stack:
            paths = [directory / file for file in _UPLOADED if (directory / file).is_file()]
            files = [("files", (path.name, stack.enter_context(path.open("rb")))) for path in paths]
            if not files:
                raise ServerRefused(
                    f"{directory} holds no adapter: {_UPLOADED[0]} and {_UPLOADED[1]} are expected there."
                )
            data = {"replace": str(replace).lower(), "pinned": str(pinned).lower()}
            return self._request("PUT", name, files=files, data=data)

    def unload(self, name: str) -> dict[str, Any]:
        return self._request("DELETE", name)

    def pin(self, name: str, pinned: bool) -> dict[str, Any]:
        return self._request("PATCH", name, json={"pinned": pinned})

    def merge(self, name: str, mode: str) -> dict[str, Any]:
        """Compute the adapter's requests with merged weights; ``mode`` is "exact" or "compact"."""
        return self._request("POST", f"{name}/merge", json={"mode": mode})

    def unmerge(self) -> dict[str, Any]:
        return self._request("POST", "unmerge")

    def _request(self, method: str, name: str, **options: Any) -> dict[str, Any]:
        path = "/v1/adapters" + (f"/{quote(name)}" if name else "")
        try:
            response = self._client.request(method, self._url + path, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerFailed(f"{self._url} cannot be reached: {error}") from error
        try:
            body = response.json()
        except ValueError:
            body = None
        if response.is_success and isinstance(body, dict):
            return body
        message = _message(body) or f"{method} {path} answered {response.status_code}"
        raise (ServerRefused if response.is_client_error else ServerFailed)(message)


def _message(body: Any) -> str | None:
    error = body.get("error") if isinstance(body, Mapping) else None
    message = error.get("message") if isinstance(error, Mapping) else None
    return message if isinstance(message, str) else None
