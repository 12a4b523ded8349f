"""``usage.prompt_tokens_details``: each prompt's cached tokens once, as its first choice found them."""

from __future__ import annotations

import json

from manylora.server.api.chunks import CompletionChunks
from manylora.server.api.generation import Envelope, usage_of
from manylora.server.engine.request import FinishEvent


def ended(prompt: int, cached: int) -> FinishEvent:
    return FinishEvent("length", None, prompt, 2, cached_tokens=cached)


CHOICES = [ended(40, 16), ended(40, 32), ended(50, 48), ended(50, 48)]
EXPECTED = {
    "prompt_tokens": 90,
    "completion_tokens": 8,
    "total_tokens": 98,
    "prompt_tokens_details": {"cached_tokens": 64},
}


def test_a_whole_answer() -> None:
    assert usage_of([40, 50], CHOICES) == EXPECTED
    assert "prompt_tokens_details" not in usage_of([40], [ended(40, 0)])


def test_a_streamed_answer_whatever_choice_ends_first() -> None:
    chunks = CompletionChunks(Envelope.new("cmpl", "m", "fp"), [40, 50], 2, include_usage=True)
    for index in (3, 1, 0, 2):
        chunks.finish(index, CHOICES[index])
    assert json.loads(chunks.end().split("\n")[0].removeprefix("data: "))["usage"] == EXPECTED
