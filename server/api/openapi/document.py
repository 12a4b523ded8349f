"""The OpenAPI document: ``/openapi.json``, docs/api.md and the tests that hold every response against it.

Endpoints read their bodies and build their answers themselves, so each says by ``describes`` what it takes and gives,
and ``document`` puts that together with what the models say. FastAPI's own document would know neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema
from starlette.routing import BaseRoute

from manylora.server.api.body import harmless_fields
from manylora.server.api.openapi.field_texts import FIELD_TEXTS
from manylora.server.api.openapi.parts import (
    HEADERS,
    PARAMETERS,
    REQUEST_ID_PARAMETER,
    SECURITY_SCHEMES,
    STATUSES,
    TAGS,
    UPLOAD,
)
from manylora.server.api.openapi.responses import ErrorResponse

Access = Literal["open", "metrics", "caller", "admin"]
"""Who may call: anybody, who may see metrics, who has a key, who may manage adapters (see ``api.access.auth``)."""
Json = dict[str, Any]

_EXTRA: Final = "operation"
_REF: Final = "#/components/schemas/{model}"

READING: Final = frozenset({400, 408, 413, 415})
"""What reading a body can end in."""
GENERATING: Final = frozenset({403, 404, 503})
"""What asking the engine can end in, besides."""
LOADING: Final = frozenset({404, 503})
"""What loading an adapter can end in, besides."""


@dataclass(frozen=True)
class Content:
    """One form of an answer: a model's JSON, a stream of a model's JSON, or text."""

    media_type: str
    model: type[BaseModel] | None = None
    example: str | None = None


def json_of(model: type[BaseModel]) -> Content:
    return Content("application/json", model)


def events_of(model: type[BaseModel]) -> Content:
    """Server-sent events whose data are ``model`` as JSON, the last but one perhaps an error, and ``[DONE]``."""
    return Content("text/event-stream", model)


def text(example: str) -> Content:
    return Content("text/plain", None, example)


@dataclass(frozen=True)
class Operation:
    """What one endpoint takes and gives."""

    bodies: tuple[type[BaseModel], ...]
    answers: Mapping[int, Sequence[Content]]
    errors: frozenset[int]
    access: Access
    upload: bool


def describes(
    *bodies: type[BaseModel],
    answers: Mapping[int, Sequence[Content]],
    errors: Iterable[int] = (),
    access: Access = "caller",
    upload: bool = False,
) -> Json:
    """``openapi_extra`` for an endpoint that takes any one of ``bodies`` as JSON (or an ``upload``), and answers so.

    ``errors`` are the statuses besides those that follow from having a body, and from ``access``: who may call it.
    """
    implied = {500}
    if bodies:
        implied |= READING
    if access == "caller":
        implied |= {400, 401, 504, *({429} if bodies else ())}
    elif access in ("admin", "metrics"):
        implied |= {400, 401, 403}
    return {_EXTRA: Operation(bodies, answers, frozenset({*errors, *implied}), access, upload)}


def operation_of(route: BaseRoute) -> Operation | None:
    """What ``describes`` said of a route; None if it said nothing."""
    found = (route.openapi_extra or {}).get(_EXTRA) if isinstance(route, APIRoute) else None
    return found if isinstance(found, Operation) else None


def document(
    routes: Iterable[BaseRoute],
    *,
    version: str,
    takes_api_key: bool = True,
    takes_admin_key: bool = True,
    protects_metrics: bool = False,
) -> Json:
    """The OpenAPI 3.1 document of ``routes``, for a server that has keys or has none."""
    described = [(route, operation_of(route)) for route in routes if isinstance(route, APIRoute)]
    known = [(route, operation) for route, operation in described if operation is not None]
    schemas = _Schemas([operation for _, operation in known])
    security = _security(takes_api_key, takes_admin_key, protects_metrics)
    paths: dict[str, Json] = {}
    for route, operation in known:
        for method in sorted(route.methods or ()):
            paths.setdefault(route.path_format, {})[method.lower()] = {
                **_texts(route),
                "security": security[operation.access],
                "parameters": _parameters(route),
                **_request_body(schemas, operation),
                "responses": _responses(schemas, operation),
            }
    return {
        "openapi": "3.1.0",
        "info": {"title": "manylora", "version": version, "description": _DESCRIPTION},
        "tags": [{"name": name, "description": said} for name, said in TAGS.items()],
        "paths": dict(paths),
        "components": {
            "schemas": schemas.components,
            "securitySchemes": SECURITY_SCHEMES,
            "parameters": {"RequestId": REQUEST_ID_PARAMETER},
            "headers": HEADERS,
        },
    }


_DESCRIPTION: Final = (
    "One frozen base model, a different LoRA adapter on every row of the batch. Requests written for OpenAI's, vLLM's "
    "and SGLang's servers work unchanged. What is accepted is honoured; what is not is a 400 that names the field. "
    "`null` for a field means that it is not given."
)


class _Plain(GenerateJsonSchema):
    """Pydantic's schemas without a title for each field, which repeats its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


class _Schemas:
    """The components, and references to them."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        bodies = dict.fromkeys(model for one in operations for model in one.bodies)
        answers = dict.fromkeys(
            content.model
            for one in operations
            for contents in one.answers.values()
            for content in contents
            if content.model is not None
        )
        wanted = [
            *((model, "validation") for model in bodies),
            *((model, "serialization") for model in (*answers, ErrorResponse)),
        ]
        found, definitions = models_json_schema(wanted, ref_template=_REF, schema_generator=_Plain)  # type: ignore[arg-type]
        self._refs = {model: schema for (model, _), schema in found.items()}
        self.components: Json = definitions["$defs"]
        for model in bodies:
            _as_body(model, self.components[self._refs[model]["$ref"].rpartition("/")[2]])
        for component in self.components.values():
            _without_null_defaults(component)

    def ref(self, model: type[BaseModel]) -> Json:
        return dict(self._refs[model])

    def any_of(self, models: Sequence[type[BaseModel]]) -> Json:
        return self.ref(models[0]) if len(models) == 1 else {"anyOf": [self.ref(model) for model in models]}


def _as_body(model: type[BaseModel], schema: Json) -> None:
    """Add what ``body.validate`` takes besides the model: null for what may be left out, and the harmless fields."""
    required = schema.get("required", [])
    properties = schema.setdefault("properties", {})
    for name, one in properties.items():
        if "description" not in one and name in FIELD_TEXTS:
            one["description"] = FIELD_TEXTS[name]
        if name not in required:
            properties[name] = _or_null(one)
    for name, values in sorted(harmless_fields(model).items()):
        if values.schema == {"not": {}}:
            continue  # refused whatever its value
        said = "Changes nothing; any other value is refused." if "enum" in values.schema else "Changes nothing."
        properties[name] = _or_null({**values.schema, "description": said})


def _or_null(schema: Json) -> Json:
    if schema.get("type") == "null" or {"type": "null"} in schema.get("anyOf", ()):
        return schema
    if "enum" in schema and "type" not in schema:
        return {**schema, "enum": [*_distinct(schema["enum"]), None]}
    outer: Json = {key: schema[key] for key in ("description", "default") if key in schema}
    inner = {key: value for key, value in schema.items() if key not in outer}
    return {"anyOf": [*(inner["anyOf"] if inner.keys() == {"anyOf"} else [inner]), {"type": "null"}], **outer}


def _distinct(values: Sequence[Any]) -> list[Any]:
    """JSON knows one 1, not an integer and a float."""
    return [one for i, one in enumerate(values) if one not in values[:i]]


def _without_null_defaults(schema: Json) -> None:
    for one in schema.get("properties", {}).values():
        if "default" in one and one["default"] is None:
            del one["default"]


def _texts(route: APIRoute) -> Json:
    summary, _, rest = (route.description or "").strip().partition("\n")
    texts: Json = {"operationId": route.operation_id or route.name, "tags": route.tags, "summary": summary.strip()}
    if rest.strip():
        texts["description"] = rest.strip()
    return texts


def _parameters(route: APIRoute) -> list[Json]:
    names = [name for name in PARAMETERS if f"{{{name}}}" in route.path_format]
    return [
        {"name": name, "in": "path", "required": True, **PARAMETERS[name]} for name in names
    ] + [{"$ref": "#/components/parameters/RequestId"}]  # fmt: skip


def _request_body(schemas: _Schemas, operation: Operation) -> Json:
    content: Json = {}
    if operation.bodies:
        content["application/json"] = {"schema": schemas.any_of(operation.bodies)}
    if operation.upload:
        content["multipart/form-data"] = {"schema": UPLOAD}
    return {"requestBody": {"required": True, "content": content}} if content else {}


def _responses(schemas: _Schemas, operation: Operation) -> Json:
    responses: Json = {}
    for status in sorted({*operation.answers, *operation.errors}):
        contents = list(operation.answers.get(status, ()))
        if status in operation.errors:
            contents.append(json_of(ErrorResponse))
        media: dict[str, list[Content]] = {}
        for content in contents:
            media.setdefault(content.media_type, []).append(content)
        responses[str(status)] = {
            "description": STATUSES[status].description,
            "headers": {
                name: {"$ref": f"#/components/headers/{component}"}
                for name, component in STATUSES[status].headers.items()
            },
            "content": {kind: _media(schemas, ones) for kind, ones in media.items()},
        }
    return responses


def _media(schemas: _Schemas, contents: Sequence[Content]) -> Json:
    models = [content.model for content in contents if content.model is not None]
    if contents[0].media_type == "application/json":
        return {"schema": schemas.any_of(models)}
    if contents[0].media_type == "text/event-stream":
        # OpenAPI 3.1 has no schema for the events of a stream.
        return {
            "schema": {"type": "string"},
            "x-event-schema": {"anyOf": [*map(schemas.ref, models), schemas.ref(ErrorResponse)]},
        }
    return {"schema": {"type": "string"}, "example": contents[0].example}


def _security(takes_api_key: bool, takes_admin_key: bool, protects_metrics: bool) -> Mapping[Access, list[Json]]:
    """By access, the keys any one of which will do; none where no key is asked for (see ``api.access.auth``)."""
    api: list[Json] = [{"apiKey": []}] if takes_api_key else []
    admin: list[Json] = [{"adminKey": []}] if takes_admin_key else []
    return {
        "open": [],
        "metrics": admin if protects_metrics else [],
        "caller": api + admin if api else [],
        "admin": admin or api,
    }
