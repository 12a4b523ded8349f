"""Random JSON schemas and regular expressions, and whether an output is what they ask for."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema_rs

from manylora.server.engine.grammar.sources import GrammarSpec

Schema = dict[str, Any]
_WORDS = ("id", "name", "größe", "a b", 'q"uote', "back\\slash", "日本", "n_1", "", "line\nbreak")
_PATTERNS = ("^[a-z]{2,6}$", r"^\d{3}-\d{4}$", "^(red|green)( light)?$", "[A-Z]{2}", r"^.{1,5}$")
_FORMATS = ("uuid", "ipv4", "ipv6")
"""Those that a grammar can tell wholly: 29 February is a date in llguidance's eyes whatever the year."""


def random_schema(rng: random.Random) -> Schema:
    """One of which every output ends soon, whatever the model: strings and lists are bounded."""
    if rng.random() < 0.15:
        item = {"type": "object", "properties": {"v": _scalar(rng), "next": {"$ref": "#/$defs/node"}},
                "required": ["v"], "additionalProperties": False}  # fmt: skip
        return {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1, "$defs": {"node": item}}
    return _any(rng, rng.choice([1, 2, 2, 3]))


def _any(rng: random.Random, depth: int) -> Schema:
    if depth == 0 or rng.random() < 0.35:
        return _scalar(rng)
    kind = rng.choice(["object", "object", "array", "anyOf", "tuple"])
    if kind == "object":
        names = rng.sample(_WORDS, rng.randint(0, 4))
        return {
            "type": "object",
            "properties": {name: _any(rng, depth - 1) for name in names},
            "required": [name for name in names if rng.random() < 0.7],
            "additionalProperties": False,
        }
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": _any(rng, depth - 1), "minItems": low, "maxItems": low + rng.randint(0, 2)}
    if kind == "tuple":
        items = [_any(rng, depth - 1) for _ in range(rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    return {"anyOf": [_any(rng, depth - 1) for _ in range(rng.randint(1, 3))]}


def _scalar(rng: random.Random) -> Schema:
    low = rng.randint(-1000, 1000)
    return rng.choice(
        [
            {"type": "integer"},
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)},
            {"type": "integer", "exclusiveMinimum": low, "multipleOf": rng.randint(1, 12)},
            # Without bounds there is an exponent, and 1e65449176 is valid but nothing that Python can hold.
            {"type": "number", "minimum": -1e6, "maximum": 1e6},
            {"type": "number", "minimum": low / 8, "exclusiveMaximum": low / 8 + 1.5},
            {"type": "boolean"},
            {"type": "null"},
            {"type": ["integer", "null"]},
            {"type": "string", "minLength": rng.randint(0, 3), "maxLength": rng.randint(3, 12)},
            {"type": "string", "pattern": rng.choice(_PATTERNS), "maxLength": 30},
            {"type": "string", "format": rng.choice(_FORMATS)},
            {"enum": rng.sample([*_WORDS, 1, 2.5, None, True, [1, "x"], {"k": [None]}], rng.randint(1, 5))},
            {"const": rng.choice(_WORDS)},
        ]
    )


def random_regex(rng: random.Random, depth: int = 3) -> str:
    """In the part of the syntax that Python's ``re`` reads in the same way: its Unicode is older, so no ``\\d``."""
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(
            [
                "a",
                "xyz",
                "[a-f]",
                "[^a-z\\n]",
                "[0-9]",
                "[A-Za-z0-9_.-]",
                ".",
                "é",
                "日本",
                r"\.",
                "(?:foo|bar)",
                " ",
                "[A-Z][a-z]",
            ]
        )
    kind = rng.choice(["sequence", "sequence", "either", "repeat", "optional", "many"])
    if kind == "sequence":
        return "".join(random_regex(rng, depth - 1) for _ in range(rng.randint(2, 4)))
    if kind == "either":
        return "(?:" + "|".join(random_regex(rng, depth - 1) for _ in range(rng.randint(2, 3))) + ")"
    inner = f"(?:{random_regex(rng, depth - 1)})"
    if kind == "repeat":
        low = rng.randint(0, 3)
        return f"{inner}{{{low},{low + rng.randint(0, 3)}}}"
    # What may go on for ever does, under a model that knows nothing, unless few characters may follow.
    return inner + "?" if kind == "optional" else f"(?:{rng.choice('xyz')}-)+" + inner


def random_spec(rng: random.Random) -> GrammarSpec:
    if rng.random() < 0.6:
        return GrammarSpec("json_schema", json.dumps(random_schema(rng)))
    return GrammarSpec("regex", random_regex(rng))


def is_valid(spec: GrammarSpec, text: str) -> bool:
    if spec.kind == "regex":
        return re.fullmatch(spec.text, text) is not None
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return jsonschema_rs.validator_for(json.loads(spec.text), validate_formats=True).is_valid(value)
