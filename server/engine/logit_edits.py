"""What a request's parameters change in its logits: bans until min_tokens, logit_bias, penalties."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from manylora.kernels.cuda.sampling_buffers import Edits
from manylora.server.engine.request import Request, SamplingParams

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]


class LogitEdits:
    """What a request's parameters change in its logits, kept up to date rather than counted anew at each step."""

    def __init__(self, request: Request, eos: Collection[int], vocab_size: int) -> None:
        params = request.params
        bias = [(token, value) for token, value in params.logit_bias.items() if 0 <= token < vocab_size]
        self._bias_tokens = np.array([token for token, _ in bias], np.int64)
        self._bias_values = np.array([value for _, value in bias], np.float32)
        banned = sorted(token for token in {*eos, *params.stop_token_ids} if 0 <= token < vocab_size)
        self._banned = np.array(banned, np.int64)
        self._penalises = has_penalties(params)
        # The distinct tokens that penalties act on: those of the output with their counts, and, for the repetition
        # penalty, those of the prompt, with count 0 until the output has them.
        prompt: dict[int, None] = {}
        if params.repetition_penalty != 1.0:
            prompt = dict.fromkeys(token for token in request.prompt_token_ids if 0 <= token < vocab_size)
        self._index = {token: index for index, token in enumerate(prompt)}
        capacity = max(256, 2 * len(self._index))
        self._tokens: _Ints = np.zeros(capacity, np.int64)
        self._counts: _Floats = np.zeros(capacity, np.float32)
        self._tokens[: len(prompt)] = list(prompt)
        self._n_counted = 0

    def apply(self, logits: _Floats, request: Request) -> None:
        """Change ``logits`` in place: bans, biases, then penalties (vLLM's order)."""
        if len(request.output_token_ids) < request.params.min_tokens:
            logits[self._banned] = -np.inf
        logits[self._bias_tokens] += self._bias_values
        if self._penalises:
            self._count(request.output_token_ids)
            self._penalise(logits, request.params)

    def entries(self, request: Request) -> Edits:
        """What ``apply`` would change, by token."""
        params, n = request.params, 0
        if self._penalises:
            self._count(request.output_token_ids)
            n = len(self._index)
        added: dict[int, np.float32] = {}
        if len(request.output_token_ids) < params.min_tokens:
            added = dict.fromkeys(self._banned.tolist(), np.float32(-np.inf))
        for token, value in zip(self._bias_tokens.tolist(), self._bias_values, strict=True):
            added[token] = added.get(token, np.float32(-0.0)) + value  # -0.0 + x is x, whatever x is
        others = [token for token in added if token not in self._index]
        size = n + len(others)
        tokens = np.concatenate((self._tokens[:n], np.array(others, np.int64))).astype(np.int32)
        edits = Edits(
            tokens,
            np.full(size, -0.0, np.float32),
            np.ones(size, np.float32),
            np.zeros(size, np.float32),
            np.zeros(size, np.float32),
        )
        for token, value in added.items():
            if token in self._index:
                edits.bias[self._index[token]] = value
        edits.bias[n:] = [added[token] for token in others]
        if n:
            counts = self._counts[:n]
            edits.repetition[:n] = params.repetition_penalty
            edits.frequency[:n] = np.float32(params.frequency_penalty) * counts
            edits.presence[:n] = np.float32(params.presence_penalty) * (counts > 0)
        return edits

    def _count(self, output: Sequence[int]) -> None:
        for token in output[self._n_counted :]:
            index = self._index.setdefault(token, len(self._index))
            if index == len(self._tokens):
                self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._tokens[index] = token
            self._counts[index] += 1
        self._n_counted = len(output)

    def _penalise(self, logits: _Floats, params: SamplingParams) -> None:
        """Repetition (Keskar et al. 2019, section 4.1) over prompt and output; OpenAI's two over the output."""
        tokens, counts = self._tokens[: len(self._index)], self._counts[: len(self._index)]
        values = logits[tokens]
        if params.repetition_penalty != 1.0:
            penalty = np.float32(params.repetition_penalty)
            values = np.where(values > 0, values / penalty, values * penalty)
        values -= np.float32(params.frequency_penalty) * counts
        values -= np.float32(params.presence_penalty) * (counts > 0)
        logits[tokens] = values


def has_edits(params: SamplingParams) -> bool:
    return bool(params.logit_bias) or params.min_tokens > 0 or has_penalties(params)


def has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
