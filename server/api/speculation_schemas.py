"""The field by which a request asks for speculation, named as vLLM's server-wide configuration of it is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from manylora.server.api.schema_base import Body, FieldError
from manylora.server.engine.drafter import Drafter
from manylora.server.engine.ngram_drafter import NgramDrafter

MAX_DRAFT = 64
MAX_LOOKUP = 64


class SpeculativeConfig(Body):
    """Guesses at the next tokens, computed together and checked: what followed the last tokens when they were there
    before. The answer is the same token for token; it comes sooner if it repeats its prompt or itself, and perhaps
    later if it does not."""

    method: Literal["ngram"] = "ngram"
    num_speculative_tokens: int = Field(
        default=4, ge=1, le=MAX_DRAFT, description="The most that is guessed at once; less after wrong guesses."
    )
    prompt_lookup_min: int = Field(
        default=2,
        ge=1,
        le=MAX_LOOKUP,
        description="So many tokens must have been there; more after wrong guesses.",
    )
    prompt_lookup_max: int = Field(
        default=8,
        ge=1,
        le=MAX_LOOKUP,
        description="Of several places, the one where the most tokens match.",
    )

    @model_validator(mode="after")
    def _rules(self) -> SpeculativeConfig:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise FieldError(
                "speculative_config.prompt_lookup_min",
                f"`speculative_config.prompt_lookup_min` ({self.prompt_lookup_min}) must not be above "
                f"`prompt_lookup_max` ({self.prompt_lookup_max}).",
            )
        return self

    def drafter(self) -> Drafter:
        """For one choice."""
        return NgramDrafter(
            self.num_speculative_tokens, shortest=self.prompt_lookup_min, longest=self.prompt_lookup_max
        )
