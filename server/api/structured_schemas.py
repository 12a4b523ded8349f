"""The fields by which a request says what its output must match: OpenAI's, vLLM's (both generations) and SGLang's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from manylora.server.api.schema_base import Body, FieldError
from manylora.server.engine.grammar.sources import GrammarKind, GrammarSpec

MAX_CHOICES = 4096

JsonSchema = dict[str, Any] | str


def _json_schema(value: Any) -> Any:
    if not isinstance(value, dict | str):
        raise ValueError("expected a JSON schema, as an object or as its JSON text.")
    return value


def _format_type(value: Any) -> Any:
    if value not in ("text", "json_object", "json_schema"):
        raise ValueError(f'"text", "json_object" and "json_schema" are served, not {json.dumps(value):.80}.')
    return value


SchemaField = Annotated[JsonSchema | None, BeforeValidator(_json_schema)]
ChoiceField = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]


class NamedSchema(Body):
    """A schema with OpenAI's labels, which change nothing; the output is always kept to it, ``strict`` or not."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", description="JSON schema of the output.")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Annotated[Literal["text", "json_object", "json_schema"], BeforeValidator(_format_type)]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _rules(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise FieldError(
                "response_format.json_schema",
                '`response_format.json_schema` goes with `type` "json_schema", and with no other.',
            )
        return self


class StructuredOutputs(Body):
    """vLLM's ``structured_outputs``: one of these."""

    json_: SchemaField = Field(default=None, alias="json", description="JSON schema, or its JSON text.")
    regex: str | None = None
    choice: ChoiceField | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StructuredFields(Body):
    """At most one of them may say something."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaField = None
    guided_regex: str | None = None
    guided_choice: ChoiceField | None = None
    guided_grammar: str | None = Field(default=None, description="In llguidance's dialect of Lark, or in GBNF.")
    json_schema: SchemaField = None
    regex: str | None = Field(
        default=None, description="In the syntax of Rust's regex crate; the whole output matches."
    )
    ebnf: str | None = Field(default=None, description="In GBNF, or in llguidance's dialect of Lark.")

    @model_validator(mode="after")
    def _one_grammar(self) -> StructuredFields:
        asked = [param for param, _ in self._grammars()]
        if len(asked) > 1:
            raise FieldError(
                asked[1], f"`{asked[0]}` and `{asked[1]}` both say what the output must match; give one of them."
            )
        outputs = self.structured_outputs
        if outputs is not None and not any(param.startswith("structured_outputs") for param in asked):
            raise FieldError(
                "structured_outputs",
                "`structured_outputs` needs one of `json`, `regex`, `choice`, `grammar` and `json_object`: true.",
            )
        return self

    @property
    def grammar(self) -> tuple[str, GrammarSpec] | None:
        """What the output must match, and the field that says so."""
        return next(self._grammars(), None)

    def _grammars(self) -> Iterator[tuple[str, GrammarSpec]]:
        format_, outputs = self.response_format, self.structured_outputs
        if format_ is not None and format_.type == "json_object":
            yield "response_format", GrammarSpec("json_object")
        if format_ is not None and format_.json_schema is not None:
            yield "response_format.json_schema.schema", _spec("json_schema", format_.json_schema.schema_)
        fields: list[tuple[str, GrammarKind, Any]] = [
            ("guided_json", "json_schema", self.guided_json),
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
            ("guided_grammar", "ebnf", self.guided_grammar),
            ("json_schema", "json_schema", self.json_schema),
            ("regex", "regex", self.regex),
            ("ebnf", "ebnf", self.ebnf),
        ]
        if outputs is not None:
            fields += [
                ("structured_outputs.json", "json_schema", outputs.json_),
                ("structured_outputs.regex", "regex", outputs.regex),
                ("structured_outputs.choice", "choice", outputs.choice),
                ("structured_outputs.grammar", "ebnf", outputs.grammar),
            ]
            if outputs.json_object:
                yield "structured_outputs.json_object", GrammarSpec("json_object")
        for param, kind, value in fields:
            if value is not None:
                yield param, _spec(kind, value)


def _spec(kind: GrammarKind, value: Any) -> GrammarSpec:
    # The order of keys is kept: properties are written in the order in which the schema names them.
    return GrammarSpec(kind, value if isinstance(value, str) else json.dumps(value))
