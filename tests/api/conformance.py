"""Holds requests and responses against the OpenAPI document: every one that the tests of this folder make."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

import jsonschema_rs
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manylora.server.api.app import routes
from manylora.server.api.openapi.document import document

Json = dict[str, Any]

HINT = (
    "Is it documented? What answers hold is in server/api/openapi/responses.py, their statuses where the route is "
    "described."
)

_EVENTS = re.compile(r"(data: [^\n]*\n\n)*")
_CLIENT_GONE = 499


class NotDocumented(AssertionError):
    """The server did what its document does not say."""


@functools.cache
def the_document() -> Json:
    return document(routes(), version="0")


def resolve(part: Json) -> Json:
    """What a reference into the document points at; anything else as it is."""
    ref = part.get("$ref")
    if ref is None:
        return part
    found: Any = the_document()
    for key in ref.removeprefix("#/").split("/"):
        found = found[key]
    return resolve(found)


@functools.cache
def _validator(schema: str) -> jsonschema_rs.Draft202012Validator:
    components = {"schemas": the_document()["components"]["schemas"]}
    return jsonschema_rs.Draft202012Validator({**json.loads(schema), "components": components})


def check_schema(schema: Json, value: Any, what: str) -> None:
    """Raises NotDocumented naming every place where ``value`` is not as ``schema`` says."""
    wrong = [
        f"{'/'.join(map(str, error.instance_path)) or 'all of it'}: {error.message:.300}"
        for error in _validator(json.dumps(schema)).iter_errors(value)
    ]
    if wrong:
        raise NotDocumented(f"{what} is not as documented: {'; '.join(wrong)}. {HINT}")


def _json(text: bytes | str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise NotDocumented(f"{what}: not JSON: {text[:300]!r}") from None


def operation_at(method: str, path: str) -> Json | None:
    """The operation that answers ``method path``: of those that match, the one whose path says most literally."""
    found: dict[str, Json] = {}
    for template, methods in the_document()["paths"].items():
        pattern = re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(template))
        if method.lower() in methods and re.fullmatch(pattern, path, re.DOTALL):
            found[template] = methods[method.lower()]
    return max(found.items(), key=lambda one: len(re.sub(r"\{\w+\}", "", one[0])))[1] if found else None


def check(method: str, path: str, sent: bytes, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Raises NotDocumented if the answer, or a request that was taken, is not as the document says."""
    what = f"{method} {path} -> {status}"
    operation = operation_at(method, path)
    if operation is None:
        if path == "/openapi.json" and status == 200:
            return
        if status not in (401, 403, 404, 405):
            raise NotDocumented(f"{what}: no such operation is documented. {HINT}")
        check_schema({"$ref": "#/components/schemas/ErrorResponse"}, _json(body, what), what)
        return
    if str(status) not in operation["responses"]:
        raise NotDocumented(f"{what}: the status is not documented; it said {body[:300]!r}. {HINT}")
    response = operation["responses"][str(status)]
    _check_headers(response, headers, what)
    _check_content(response["content"], headers.get("content-type", ""), body, what)
    if status < 300:
        _check_request(operation, sent, what)


def _check_headers(response: Json, headers: Mapping[str, str], what: str) -> None:
    for name, reference in response["headers"].items():
        header = resolve(reference)
        if name.lower() in headers:
            check_schema(header["schema"], headers[name.lower()], f"{what}: the header {name}")
        elif header["required"]:
            raise NotDocumented(f"{what}: the header {name} is missing. {HINT}")


def _check_content(content: Json, kind: str, body: bytes, what: str) -> None:
    media = content.get(kind.partition(";")[0])
    if media is None:
        raise NotDocumented(f"{what}: the content type {kind!r} is not documented. {HINT}")
    if kind.startswith("application/json"):
        check_schema(media["schema"], _json(body, what), what)
    elif kind.startswith("text/event-stream"):
        _check_events(media["x-event-schema"], body.decode(), what)


def _check_events(schema: Json, text: str, what: str) -> None:
    """The frames of a whole stream: events, then [DONE], or an error as the last one."""
    if not _EVENTS.fullmatch(text):
        raise NotDocumented(f"{what}: not framed as `data: ...` and an empty line: {text[-300:]!r}")
    events = [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]
    for event in events[:-1]:
        found = _json(event, what)
        check_schema(schema, found, what)
        if "error" in found:
            raise NotDocumented(f"{what}: something follows the error {event}")
    if events[-1] != "[DONE]" and "error" not in _json(events[-1], what):
        raise NotDocumented(f"{what}: the stream ends with {events[-1]!r}")


def _check_request(operation: Json, sent: bytes, what: str) -> None:
    """A request that was taken must be one that the document describes, or it does not say all that is taken."""
    media = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if media is None or not sent.lstrip().startswith(b"{"):
        return
    # Where a field of any name may be null, the document does not say so for names that it does not know.
    given = {name: value for name, value in json.loads(sent).items() if value is not None}
    check_schema(media["schema"], given, f"{what}: the body {sent[:300]!r}")


class Checked:
    """An application that notes in ``problems`` what it does otherwise than documented."""

    def __init__(self, app: ASGIApp, problems: list[str]) -> None:
        self._app = app
        self._problems = problems

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent, answered = bytearray(), bytearray()
        start: Message = {}

        async def receive_and_note() -> Message:
            message = await receive()
            sent.extend(message.get("body", b""))
            return message

        async def note_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                answered.extend(message.get("body", b""))
            # Noted before it is sent: a client may leave with the last byte.
            if message["type"] == "http.response.body" and not message.get("more_body") and scope["method"] != "HEAD":
                self._note(scope, bytes(sent), start, bytes(answered))
            await send(message)

        await self._app(scope, receive_and_note, note_and_send)

    def _note(self, scope: Scope, sent: bytes, start: Message, answered: bytes) -> None:
        if start["status"] == _CLIENT_GONE:
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in start["headers"]}
        try:
            check(scope["method"], scope["path"], sent, start["status"], headers, answered)
        except NotDocumented as problem:
            self._problems.append(str(problem))
