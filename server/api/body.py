"""A request's body: read within a limit, parsed as strict JSON, checked by a schema; each failure names what is wrong.

What is accepted is honoured. So a field is either in the schema, or it is listed here with the values that change
nothing, or it is refused by name: with "not served yet" if other servers know it, as unknown if not. ``null`` means
"not given" everywhere, as OpenAI's clients use it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, Final, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from manylora.server.api.errors import ApiError, bad_request
from manylora.server.api.schemas import FieldError, GenerationRequest

Model = TypeVar("Model", bound=BaseModel)

MAX_VALUES: Final = 1 << 19
MAX_FIELDS: Final = 1 << 17
"""In one body: more than any prompt of this size, and as many as are checked in a fraction of a second."""

_FEW: Final = 64
_MANY: Final = 1 << 14
"""Errors that are listed at once."""


@dataclass(frozen=True)
class Harmless:
    """The values under which a field changes nothing: how to tell one, and their JSON schema, for the document."""

    takes: Callable[[Any], bool]
    schema: Mapping[str, Any]

    def __call__(self, value: Any) -> bool:
        return self.takes(value)


def _is(*allowed: Any) -> Harmless:
    def takes(value: Any) -> bool:
        # 1 == True in Python, and neither may pass for the other here.
        return any(type(value) is type(one) and value == one for one in allowed)

    return Harmless(takes, {"enum": list(allowed)})


_is_text = Harmless(lambda value: isinstance(value, str), {"type": "string"})
_is_mapping = Harmless(lambda value: isinstance(value, dict), {"type": "object"})
_is_bool = Harmless(lambda value: isinstance(value, bool), {"type": "boolean"})
_never = Harmless(lambda _value: False, {"not": {}})


_NO_EFFECT: Final[Mapping[str, Harmless]] = {
    # Labels for a provider's own books: nothing in the response depends on them.
    "user": _is_text,
    "safety_identifier": _is_text,
    "metadata": _is_mapping,
    "prompt_cache_key": _is_text,
    # Asking for what happens anyway.
    "store": _is(False),
    "service_tier": _is("auto", "default"),
    "modalities": _is(["text"]),
    "parallel_tool_calls": _is_bool,  # no tool is ever called, one at a time or not
    "functions": _is([]),
    "function_call": _is("none"),
    "suffix": _is(""),
    "use_beam_search": _is(False),
    "length_penalty": _is(1, 1.0),
    "logits_processors": _is([]),
    "return_token_ids": _is(False),
    "return_hidden_states": _is(False),
    "no_stop_trim": _is(False),
    "documents": _is([]),
    # Known elsewhere, served nowhere here yet.
    "audio": _never,
    "prediction": _never,
    "reasoning_effort": _never,
    "verbosity": _never,
    "web_search_options": _never,
}
"""Fields outside the schemas, with the values under which they change nothing; any other value is "not served yet"."""


@cache  # a handful of models, asked for with each request
def harmless_fields(model: type[BaseModel]) -> Mapping[str, Harmless]:
    """What ``model``'s body may hold besides its own fields: clients send such fields to generate, and nowhere else."""
    if not issubclass(model, GenerationRequest):
        return {}
    return {name: values for name, values in _NO_EFFECT.items() if name not in model.model_fields}


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body; 413 as soon as it is known to exceed ``limit`` bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            _too_large(limit)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(limit: int) -> NoReturn:
    # The rest of the body is not read, so the connection cannot be used again.
    raise ApiError(413, f"The body is larger than the {limit} bytes accepted here.", headers={"Connection": "close"})


async def read_json(request: Request, limit: int) -> dict[str, Any]:
    """The body as a JSON object.

    The content type must say JSON: a web page may post anything else to this machine without asking its user.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"The content type must be application/json, not {kind or 'absent'}.")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        # Nothing is inflated here, so nothing small can become large.
        raise ApiError(415, f"The body must not be compressed, and this one's Content-Encoding is {encoding!r:.40}.")
    raw = await read_body(request, limit)
    _check_effort(raw)
    try:
        value = json.loads(raw, parse_constant=_no_constant)
        if b"\\u" in raw:
            # An escaped half of a surrogate pair is a str that no tokeniser can take.
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise bad_request("The body holds an unpaired surrogate (\\ud800 to \\udfff), which is no character.") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # malformed JSON, not UTF-8, a number of thousands of digits
        raise bad_request(f"The body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_request(f"The body must be a JSON object, not {_json_kind(value)}.")
    return value


def _too_deep() -> ApiError:
    return bad_request("The body is nested too deeply.")


def _check_effort(raw: bytes) -> None:
    """Raise ApiError for a body that would take seconds to be parsed and checked: nothing else in the process runs
    meanwhile, and a body of 16 MiB can hold eight million values. What is in strings counts as well, which does not
    matter: so much text is longer than any context."""
    for mark, most, what in ((b",", MAX_VALUES, "values"), (b":", MAX_FIELDS, "fields")):
        if raw.count(mark) > most:
            raise bad_request(f"The body holds too many {what}: at most {most} are taken.")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _json_kind(value: Any) -> str:
    kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def validate(model: type[Model], value: Mapping[str, Any]) -> Model:
    """Check a JSON object against a schema; ApiError 400 naming the first field that is wrong."""
    try:
        return _validate(model, value)
    except RecursionError:  # what was parsed just so may be too deep to be written again
        raise _too_deep() from None


def _validate(model: type[Model], value: Mapping[str, Any]) -> Model:
    given, harmless = {}, harmless_fields(model)
    for name, one in value.items():
        if one is None:
            continue
        if name in harmless:
            if not harmless[name](one):
                raise bad_request(f"`{name}` = {_shown(one)} is not served yet; leave the field out.", name)
            continue
        given[name] = one
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise _first_of(model, given, error) from None


def _first_of(model: type[BaseModel], given: dict[str, Any], error: ValidationError) -> ApiError:
    """Of hundreds of thousands of errors, to list all would take seconds, and there is no other way to the first: so
    it is looked for in the beginning of each list and object."""
    count, size = error.error_count(), _FEW
    while error.error_count() > size:
        if size > _MANY:
            return bad_request(f"{count} values are wrong in this body, the first of them far behind in a long list.")
        try:
            model.model_validate(_beginning(given, size))
        except ValidationError as found:
            error = found
        size *= 2
    return _from_pydantic(error.errors(include_url=False)[0])


def _beginning(value: Any, size: int, depth: int = 4) -> Any:
    """``value`` with the first ``size`` entries of what it holds; below ``depth``, as it is."""
    if depth == 0:
        return value
    if isinstance(value, dict):
        return {key: _beginning(one, size, depth - 1) for key, one in islice(value.items(), size)}
    return [_beginning(one, size, depth - 1) for one in value[:size]] if isinstance(value, list) else value


async def parse(request: Request, model: type[Model], limit: int) -> Model:
    """Read and check a request's JSON body."""
    return validate(model, await read_json(request, limit))


def _from_pydantic(detail: ErrorDetails) -> ApiError:
    param = ".".join(str(part) for part in detail["loc"]) or None
    match detail["type"]:
        case "extra_forbidden":
            return bad_request(
                f"`{param}` is not a field of this request; nothing is accepted and ignored here.", param
            )
        case "missing":
            return bad_request(f"`{param}` is required.", param)
        case "value_error":
            cause = detail["ctx"]["error"]  # of our own validators, without the prefix that pydantic's message has
            if isinstance(cause, FieldError):
                return bad_request(str(cause), cause.param)
            return bad_request(f"`{param}`: {cause}", param)
        case _:
            return bad_request(f"`{param}`: {detail['msg']}, got {_shown(detail['input'])}.", param)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."
