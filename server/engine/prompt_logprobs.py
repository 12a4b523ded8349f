"""The log-probabilities of a step's prompt tokens: each from the logits of the token before it.

A prompt is computed many tokens at a time, and a row of logits is as long as the vocabulary. So they are made and
looked at in pieces of ``PIECE`` rows: memory does not grow with the chunk. They are made beside the logits of the rows
that sample, from the same hidden states, so nobody's tokens depend on who asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch

from manylora.server.engine.logprobs import Floats, score_on_device, score_on_host
from manylora.server.engine.request import Request, SampleFailed, ScheduledRow
from manylora.server.model.decoder import Decoder
from manylora.server.model.step_arrays import StepArrays

PIECE: Final = 64
"""Rows of logits at a time: 33 MB for a vocabulary of 128 thousand."""


class _Scored(NamedTuple):
    """A prompt token, and the place in the step of the token before it."""

    place: int
    request: Request
    token: int


class PromptScorer:
    """Adds to ``Request.prompt_logprobs``. For one thread (the step loop's)."""

    def __init__(self, vocab_size: int) -> None:
        self._scratch: Floats = np.empty(vocab_size, np.float32)

    def score(
        self, decoder: Decoder, hidden: torch.Tensor, step: StepArrays, rows: Sequence[ScheduledRow]
    ) -> dict[str, SampleFailed]:
        """``hidden``: what ``decoder`` made of ``step``, which is made of ``rows``. Returns, by id, the requests that
        cannot go on because the model's output for their prompt is not finite."""
        wanted = _wanted(rows)
        failed: dict[str, SampleFailed] = {}
        if not wanted:
            return failed
        batch = step.on(hidden.device)
        for first in range(0, len(wanted), PIECE):
            piece = wanted[first : first + PIECE]
            places = torch.tensor([one.place for one in piece], device=hidden.device)
            logits = decoder.logits(hidden, batch, places)
            tokens = [one.token for one in piece]
            counts = [one.request.params.prompt_logprobs or 0 for one in piece]
            if logits.device.type == "cpu":
                found = score_on_host(logits, tokens, counts, self._scratch)
            else:
                found = score_on_device(logits, tokens, counts, PIECE)
            for (_, request, _), logprobs in zip(piece, found, strict=True):
                if isinstance(logprobs, SampleFailed):
                    failed[request.request_id] = logprobs
                else:
                    request.prompt_logprobs.append(logprobs)
        return failed


def _wanted(rows: Sequence[ScheduledRow]) -> list[_Scored]:
    """The prompt tokens, of those who ask, that the step tells and that are not known yet."""
    wanted: list[_Scored] = []
    at = 0
    for row in rows:
        request = row.request
        if request.params.prompt_logprobs is not None:
            prompt, n_known = request.prompt_token_ids, len(request.prompt_logprobs)
            # Position p tells token p + 1. What is computed anew after a preemption is known already.
            if n_known < len(prompt) and n_known - 1 < row.start:
                raise RuntimeError(
                    f"request {request.request_id} knows the log-probabilities of {n_known} prompt tokens, but is "
                    f"computed from position {row.start} on: those of the tokens between would be missing"
                )
            for position in range(n_known - 1, min(row.start + row.count, len(prompt) - 1)):
                wanted.append(_Scored(at + position - row.start, request, prompt[position + 1]))
        at += row.count
    return wanted
