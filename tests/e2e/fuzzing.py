"""Bodies that no client should send, made from a seed by way of the OpenAPI document."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any, Final

from manylora.server.api.app import routes
from manylora.server.api.openapi.document import document

Json = dict[str, Any]

DOCUMENT: Final[Json] = document(routes(), version="0")

ODD: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, 1e-320, "", "x", "\x00"),
    *(
        "\udcff",
        "y" * 5000,
        "ǆ" * 300,
        "\u202e",
        "-1",
        "[DONE]",
        "[DONE]\n\n",
        [],
        {},
        [None],
        [[]],
        {"": 0},
        {"a": {"b": [1]}},
    ),
)
"""Values that something somewhere does not expect."""

RAW: Final = (
    *(b"", b" ", b"null", b"[]", b'"text"', b"0", b"{", b"}", b"{}", b'{"a"', b'{"a":}', b"{'a': 1}", b"{1: 2}"),
    *(b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"{}\x00", b"{}{}", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}'),
    *(b'{"a": "\\ud800"}', b'{"a": "\x80"}', b'{"a": "\n"}', b'{"a": 01}', b'{"model": 1' + b"0" * 9000 + b"}"),
    *(b"[" * 50_000, b'{"a":' * 50_000, b'{"a":' * 900 + b"1" + b"}" * 900, b"[" * 900 + b"]" * 900),
)
"""Bodies that are no JSON object, or only just."""


def paths_with_bodies() -> list[tuple[str, str, Json]]:
    """Method, path and schema of every operation that takes JSON."""
    return [
        (method.upper(), path, operation["requestBody"]["content"]["application/json"]["schema"])
        for path, methods in DOCUMENT["paths"].items()
        for method, operation in methods.items()
        if "requestBody" in operation
    ]


class Bodies:
    """Makes bodies by the document. ``fixed`` has values for fields of some names, so that most requests get far."""

    def __init__(self, rng: random.Random, fixed: Mapping[str, tuple[Any, ...]]) -> None:
        self._rng = rng
        self._fixed = fixed

    def valid(self, schema: Json) -> Any:
        """As the schema says, more or less: an object with what it needs and a few fields more."""
        rng = self._rng
        if "$ref" in schema:
            return self.valid(DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self.valid(rng.choice([one for one in schema[key] if one != {"type": "null"}] or [{}]))
        if "enum" in schema:
            return copy.deepcopy(rng.choice(schema["enum"]))  # what is returned may be changed
        if "const" in schema:
            return copy.deepcopy(schema["const"])
        kind = schema.get("type")
        if kind == "object":
            return self._object(schema)
        if kind == "array":
            return [self.valid(schema.get("items", {})) for _ in range(rng.randint(schema.get("minItems", 0), 2))]
        if kind in ("integer", "number"):
            low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
            number = rng.choice([low, low + 1, rng.randint(0, 4), schema.get("maximum", low)])
            return number if kind == "integer" else number + rng.choice([0.0, 0.25])
        if kind == "boolean":
            return rng.random() < 0.5
        return "".join(rng.choice("abc xyz\n{}é") for _ in range(rng.randint(1, 12)))

    def _object(self, schema: Json) -> Json:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        optional = [name for name in properties if name not in required]
        chosen = [*required, *self._rng.sample(optional, min(len(optional), self._rng.choice([0, 1, 1, 2, 3, 8])))]
        return {
            name: copy.deepcopy(self._rng.choice(self._fixed[name]))
            if name in self._fixed
            else self.valid(properties[name])
            for name in chosen
        }

    def mutated(self, body: Any) -> Any:
        """``body`` with something in it that is odd: a value, a field too many, one too few, one twice as deep."""
        rng = self._rng
        places = list(_places(body))
        if not places:
            return self._odd()
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            holder, key = rng.choice(places)
            match rng.randrange(6):
                case 0 if isinstance(holder, dict):
                    holder.pop(key, None)
                case 1 if isinstance(holder, dict):
                    holder[rng.choice(["", "unknown", "model ", "__proto__", "x" * 2000, "\x00"])] = self._odd()
                case 2:
                    self._put(holder, key, [self._get(holder, key)] * rng.choice([1, 2, 40]))
                case 3:
                    self._put(holder, key, {"a": self._get(holder, key)})
                case _:
                    self._put(holder, key, self._odd())
        return body

    def raw(self, body: Any) -> bytes:
        """``body`` as bytes, one time in four damaged on the way."""
        rng = self._rng
        text = bytearray(json.dumps(body).encode())
        match rng.randrange(16):
            case 0:
                del text[rng.randrange(len(text)) :]
            case 1:
                for _ in range(rng.choice([1, 3])):
                    text[rng.randrange(len(text))] = rng.randrange(256)
            case 2:
                at = rng.randrange(len(text))
                text[at:at] = text[at : at + rng.randrange(1, 40)]
            case 3:
                text += rng.choice([b"\x00", b"}", b"{}", b"\n\n", b"garbage"])
        return bytes(text)

    def _odd(self) -> Any:
        return copy.deepcopy(self._rng.choice(ODD))

    @staticmethod
    def _get(holder: Any, key: Any) -> Any:
        return holder.get(key) if isinstance(holder, dict) else holder[key] if key < len(holder) else None

    @staticmethod
    def _put(holder: Any, key: Any, value: Any) -> None:
        if isinstance(holder, dict) or key < len(holder):
            holder[key] = value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Everywhere in ``value`` that something can be put."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in entries:
        yield value, key
        yield from _places(one)
