"""Log-probabilities of rows of logits, on the host and where the logits are, against fp64."""

from __future__ import annotations

import math
import random
from typing import Final

import numpy as np
import pytest
import torch

from manylora.server.engine.logprobs import score_on_device, score_on_host
from manylora.server.engine.request import Request, SampledToken, SampleFailed, SamplingParams, TokenLogprobs
from manylora.server.engine.sampler import Sampler

GPU: Final = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""What is for a device is tested there, if there is one."""


def logits_of(rows: int, vocab: int, seed: int) -> torch.Tensor:
    """With many equal values, both zeros, and tokens that are impossible."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)).mul(4).round().div(2)
    logits[::3, ::5] = -0.0
    logits[1::3, 1::7] = -math.inf
    logits[2::3] = -logits[2::3].abs()  # where the likeliest are zeros of either sign
    logits[2::3, ::4] = 0.0
    return logits


@pytest.mark.parametrize(("rows", "vocab"), [(1, 50), (13, 1000), (64, 333)])
def test_the_device_says_what_the_host_says(rows: int, vocab: int) -> None:
    logits = logits_of(rows, vocab, rows)
    rng = random.Random(rows)
    tokens = [rng.randrange(vocab) for _ in range(rows)]
    counts = [rng.choice([0, 1, 5, 20]) for _ in range(rows)]
    host = score_on_host(logits, tokens, counts, np.empty(vocab, np.float32))
    device = score_on_device(logits.to(GPU), tokens, counts, 64)
    exact = logits.double().log_softmax(-1)
    for i, (one, other) in enumerate(zip(host, device, strict=True)):
        assert isinstance(one, TokenLogprobs)
        assert isinstance(other, TokenLogprobs)
        assert [(t.token_id, t.rank) for t in (one.sampled, *one.top)] == [
            (t.token_id, t.rank) for t in (other.sampled, *other.top)
        ]
        assert len(one.top) == counts[i]
        order = sorted(range(vocab), key=lambda t: (-float(logits[i, t]), t))
        assert [t.token_id for t in one.top] == order[: counts[i]]
        assert order[one.sampled.rank] == tokens[i]
        for mine in (one, other):
            for t in (mine.sampled, *mine.top):
                assert t.logprob == pytest.approx(float(exact[i, t.token_id]), abs=2e-6)


def test_a_rows_answer_on_the_device_does_not_depend_on_its_piece() -> None:
    logits = logits_of(64, 1000, 0).to(GPU)
    together = score_on_device(logits, [5] * 64, [3] * 64, 64)
    for i in (0, 1, 17, 63):
        assert score_on_device(logits[i : i + 1], [5], [3], 64) == [together[i]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_no_numbers(value: float) -> None:
    logits = logits_of(3, 100, 1)
    logits[1, 50] = value
    for found in (
        score_on_host(logits, [1, 2, 3], [1] * 3, np.empty(100, np.float32)),
        score_on_device(logits.to(GPU), [1, 2, 3], [1] * 3, 64),
    ):
        assert [isinstance(one, SampleFailed) for one in found] == [False, True, False]


def test_the_sampler_says_the_same() -> None:
    """The bits of what is read are those of what is drawn: both from the same row of logits."""
    logits = logits_of(8, 300, 5)
    rows = [Request(f"r{i}", [1], SamplingParams(logprobs=i, seed=i)) for i in range(8)]
    drawn = Sampler(300).sample(logits, rows)
    tokens = [one.token_id for one in drawn if isinstance(one, SampledToken)]
    read = score_on_host(logits, tokens, list(range(8)), np.empty(300, np.float32))
    assert read == [one.logprobs for one in drawn if isinstance(one, SampledToken)]
