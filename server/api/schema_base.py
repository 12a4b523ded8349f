"""What every body's schema is made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict


class FieldError(ValueError):
    """A rule between fields is broken; ``param`` is the one to change, and the message says everything."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def _boolean(value: Any) -> Any:
    if type(value) is not bool:  # 0 == False, so Literal takes it
        raise ValueError("expected false.")
    return value


Off = Annotated[Literal[False], BeforeValidator(_boolean)]
"""A field that can be given, but not turned on."""


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
