"""The schemas in ``/openapi.json``: endpoints read their bodies themselves, so FastAPI has to be told."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def describes(*models: type[BaseModel]) -> dict[str, Any]:
    """``openapi_extra`` for an endpoint that takes any one of ``models`` as its JSON body."""
    schemas = [model.model_json_schema() for model in models]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
