"""``docs/api.md``: the HTTP interface, written from the OpenAPI document of the server's routes.

``python -P -m manylora.server.api.openapi.page`` prints the page; a test keeps the file in step with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from manylora.server.api.app import routes
from manylora.server.api.openapi.document import document
from manylora.server.api.openapi.page_texts import HEAD, TAG_TEXTS
from manylora.server.api.openapi.parts import STATUSES

Json = Mapping[str, Any]

_KEYS: Final = {"apiKey": "a key", "adminKey": "the admin key"}
_SIGNS: Final = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_INT64: Final = {"minimum": -(1 << 63), "exclusiveMaximum": 1 << 63}


def page(api: Json) -> str:
    """The page for an OpenAPI document that ``api.openapi`` made."""
    lines = [HEAD.format(statuses="\n".join(_status_rows()))]
    for tag in api["tags"]:
        lines += [f"## {tag['name'][0].upper()}{tag['name'][1:]}", "", tag["description"], ""]
        if tag["name"] in TAG_TEXTS:
            lines += [TAG_TEXTS[tag["name"]], ""]
        for path, methods in api["paths"].items():
            for method, operation in methods.items():
                if tag["name"] in operation["tags"]:
                    lines += _operation(api, method.upper(), path, operation)
    lines += ["## Objects", "", "Of bodies and answers, by name.", ""]
    bodies = {name for name, _ in _bodies(api)}
    for name, schema in sorted(api["components"]["schemas"].items()):
        if name not in bodies:
            lines += [f"### {name}", "", *_described(schema), *_fields(schema)]
    return "\n".join(lines).rstrip() + "\n"


def _status_rows() -> Iterator[str]:
    for status, meaning in STATUSES.items():
        headers = ", ".join(f"`{name}`" for name in meaning.headers if name != "X-Request-Id")
        yield f"| {status} | {meaning.description} | {headers} |"


def _bodies(api: Json) -> Iterator[tuple[str, Json]]:
    for methods in api["paths"].values():
        for operation in methods.values():
            content = operation.get("requestBody", {}).get("content", {})
            for one in _alternatives(content.get("application/json", {}).get("schema", {})):
                if "$ref" in one:
                    yield _name(one), operation


def _operation(api: Json, method: str, path: str, operation: Json) -> list[str]:
    lines = [f"### {method} {path}", "", operation["summary"].replace("``", "`"), ""]
    if "description" in operation:
        lines += [operation["description"].replace("``", "`"), ""]
    keys = " or ".join(_KEYS[next(iter(one))] for one in operation["security"])
    lines += [f"Takes {keys}, where the server has keys." if keys else "Takes no key.", ""]
    for one in operation["parameters"]:
        if "$ref" not in one:
            lines += [f"`{one['name']}` in the path: {one['description']}", ""]
    content = operation.get("requestBody", {}).get("content", {})
    for schema in _alternatives(content.get("application/json", {}).get("schema", {})):
        found = api["components"]["schemas"][_name(schema)]
        lines += [f"**Body** `{_name(schema)}`", "", *_fields(found, is_body=True)]
    if "multipart/form-data" in content:
        form = content["multipart/form-data"]["schema"]
        lines += ["**Or an upload**, `multipart/form-data`", "", form["description"], "", *_fields(form, is_body=True)]
    return [*lines, *_answers(operation)]


def _answers(operation: Json) -> list[str]:
    rows, errors = [], []
    for status, response in operation["responses"].items():
        kinds = [
            kind for content, media in response["content"].items() if (kind := _answer(content, media)) is not None
        ]
        if kinds:
            rows.append(f"| {status} | {'; '.join(kinds)} |")
        if any(_is_error(media.get("schema", {})) for media in response["content"].values()):
            errors.append(status)
    return ["| Status | Answer |", "| --- | --- |", *rows, f"| {', '.join(errors)} | {_link('ErrorResponse')} |", ""]


def _answer(content: str, media: Json) -> str | None:
    """How one content type of an answer is told; None for the errors, which are told together."""
    if content == "text/event-stream":
        names = [_type(one) for one in _alternatives(media["x-event-schema"]) if not _is_error(one)]
        return f"with `stream`: events of {', '.join(names)}"
    if content == "application/json":
        names = [_type(one) for one in _alternatives(media["schema"]) if not _is_error(one)]
        return " or ".join(names) or None
    return f"`{content}`, such as `{media['example'].splitlines()[0]}`"


def _is_error(schema: Json) -> bool:
    return any(one.get("$ref", "").endswith("/ErrorResponse") for one in _alternatives(schema))


def _described(schema: Json) -> list[str]:
    return [schema["description"].replace("``", "`"), ""] if "description" in schema else []


def _fields(schema: Json, *, is_body: bool = False) -> list[str]:
    """The table of an object's fields; of a body, with those that change nothing told in one line."""
    properties = schema.get("properties", {})
    required = schema.get("required", ())
    if "enum" in schema or not properties:
        return [_type(schema), ""]
    neutral = {
        name: one for name, one in properties.items() if one.get("description", "").startswith("Changes nothing")
    }
    rows = []
    for name, one in sorted(properties.items(), key=lambda field: is_body and field[0] not in required):
        if name in neutral:
            continue
        notes = [one["description"]] if "description" in one else []
        if name in required and is_body:
            notes.insert(0, "Required.")
        elif name not in required and not is_body:
            notes.insert(0, "May be absent.")
        if "default" in one:
            notes.append(f"Default `{json.dumps(one['default'])}`.")
        rows.append(f"| `{name}` | {_cell(_type(one, hides_null=is_body))} | {_cell(' '.join(notes))} |")
    lines = ["| Field | Type | |", "| --- | --- | --- |", *rows, ""]
    if neutral:
        told = ", ".join(f"`{name}` ({_type(one, hides_null=True)})" for name, one in sorted(neutral.items()))
        lines += [f"Taken because they change nothing, with these values only: {told}.", ""]
    return lines


def _type(schema: Json, *, hides_null: bool = False) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return _link(_name(schema))
    if "anyOf" in schema or "oneOf" in schema:
        kinds = [one for one in _alternatives(schema) if not (hides_null and one == {"type": "null"})]
        return " or ".join(dict.fromkeys(_type(one) for one in kinds))
    if "enum" in schema:
        values = [value for value in schema["enum"] if not (hides_null and value is None)]
        return " or ".join(f"`{json.dumps(value)}`" for value in values)
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    return _sized(schema, schema.get("type", "anything"))


def _sized(schema: Json, kind: str) -> str:
    """A schema of one type, with its bounds."""
    if kind == "array":
        of = _type(schema.get("items", {}))
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        if high == 0:
            return "empty list"
        number = "" if high is None else f"{low} to {high} " if low > 1 else f"at most {high} "
        return f"{'non-empty ' if low == 1 else ''}list of {number}{f'({of})' if ' or ' in of else of}"
    if kind == "string":
        low, high = schema.get("minLength", 0), schema.get("maxLength")
        matching = f", `{schema['pattern']}`" if "pattern" in schema else ""
        number = "" if high is None else f" of at most {high} characters"
        return f"{'non-empty ' if low == 1 else ''}string{number}{matching}"
    if kind == "object":
        values = schema.get("additionalProperties", True)
        values = next(iter(schema.get("patternProperties", {}).values()), values)
        return "object" if isinstance(values, bool) else f"object of {_type(values)}"
    if schema.items() >= _INT64.items():
        return "integer of 64 bits"
    if "minimum" in schema and "maximum" in schema:
        return f"{kind} from {schema['minimum']} to {schema['maximum']}"
    bounds = ", ".join(f"{sign} {schema[key]}" for key, sign in _SIGNS.items() if key in schema)
    return f"{kind} {bounds}".strip()


def _alternatives(schema: Json) -> Sequence[Json]:
    return list(schema.get("anyOf") or schema.get("oneOf") or ([schema] if schema else []))


def _name(schema: Json) -> str:
    return str(schema["$ref"]).rpartition("/")[2]


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def _cell(text: str) -> str:
    """``text`` in one cell of a table."""
    return " ".join(text.replace("|", "\\|").replace("``", "`").split())


def main(_arguments: Iterable[str] = ()) -> None:
    # The version is the installed package's, which a page in the repository is not about.
    sys.stdout.write(page(document(routes(), version="")))


if __name__ == "__main__":
    main(sys.argv[1:])
