from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.server.engine.request import Request, SampledToken, SampleFailed, SamplingParams
from manylora.server.engine.sampler import Sampler, uniform
from tests.fakes import request

_Array = npt.NDArray[np.float64]
VOCAB = 300
EOS = 2


def made(output: Sequence[int] = (), prompt: Sequence[int] = (1, 2, 3), **params: Any) -> Request:
    one = request(prompt=prompt, **params)
    one.output_token_ids = list(output)
    return one


def sample(logits: torch.Tensor, rows: Sequence[Request]) -> list[SampledToken | SampleFailed]:
    return Sampler(logits.shape[1], eos_token_ids=[EOS]).sample(logits, rows)


def token(logits: torch.Tensor, row: Request) -> int:
    (result,) = sample(logits.reshape(1, -1), [row])
    assert isinstance(result, SampledToken)
    return result.token_id


def random_logits(n: int, *, seed: int = 0, vocab: int = VOCAB, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * spread


# --- the reference: fp64, every token, no shortcuts -------------------------------------------------------------------


def edited(logits: _Array, row: Request) -> _Array:
    """vLLM's order: min_tokens, logit_bias, repetition penalty (prompt and output), the other two (output)."""
    params = row.params
    x: _Array = logits.astype(np.float64).copy()
    if len(row.output_token_ids) < params.min_tokens:
        x[[EOS, *params.stop_token_ids]] = -np.inf
    for biased, value in params.logit_bias.items():
        x[biased] += value
    for seen in set(row.prompt_token_ids) | set(row.output_token_ids):
        x[seen] = x[seen] / params.repetition_penalty if x[seen] > 0 else x[seen] * params.repetition_penalty
    for seen, count in Counter(row.output_token_ids).items():
        x[seen] -= params.frequency_penalty * count + params.presence_penalty
    return x


def distribution(logits: _Array, row: Request) -> _Array:
    """The probability of every token."""
    params, x = row.params, edited(logits, row) / row.params.temperature

    def softmax(values: _Array) -> _Array:
        weights: _Array = np.exp(values - values.max())
        weights /= weights.sum()
        return weights

    p = softmax(x)
    x[p < params.min_p * p.max()] = -np.inf
    if params.top_k:
        x[x < np.sort(x)[-min(params.top_k, len(x))]] = -np.inf
    p = softmax(x)
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= params.top_p]] = 0.0
    p /= p.sum()
    return p


def reference_token(logits: _Array, row: Request) -> tuple[int, float]:
    """The token at the row's point, from the most likely down; and how near the point is to another token's."""
    p = distribution(logits, row)
    order = np.argsort(-p, kind="stable")
    cumulated = np.cumsum(p[order])
    point = uniform(row.sampling_seed, len(row.output_token_ids))
    index = int(np.searchsorted(cumulated, point, side="right"))
    return int(order[index]), float(np.abs(cumulated - point).min())


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.2, 0.7, 1.0, 1.5, 30.0]),
        "top_k": st.sampled_from([0, 0, 1, 5, 50, VOCAB, 10 * VOCAB]),
        "top_p": st.sampled_from([1.0, 1.0, 0.01, 0.5, 0.9, 0.999]),
        "min_p": st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "presence_penalty": st.sampled_from([0.0, 1.0, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "min_tokens": st.sampled_from([0, 4]),
        "logit_bias": st.sampled_from([{}, {7: 5.0, 8: -100.0}]),
        "stop_token_ids": st.sampled_from([(), (5, 6)]),
        "seed": st.integers(0, 2**63),
    }
)


@given(
    PARAMS, st.integers(0, 10**6), st.sampled_from([0.5, 3.0, 10.0]), st.lists(st.integers(0, VOCAB - 1), max_size=8)
)
@settings(max_examples=300, deadline=None, derandomize=True)  # a cut within fp32's error must not fail CI one day
def test_the_token_is_the_references(params: dict[str, Any], seed: int, spread: float, output: list[int]) -> None:
    logits = random_logits(1, seed=seed, spread=spread)
    row = made(output, **params)
    expected, margin = reference_token(logits[0].numpy(), row)
    if margin > 1e-5:  # nearer, fp32 may fall on the other side
        assert token(logits, row) == expected


@pytest.mark.parametrize("vocab", [49_152, 151_643])
def test_large_vocabularies(vocab: int) -> None:
    cases: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.1}, {"temperature": 3.0}]
    for seed, params in enumerate(cases):
        logits = random_logits(1, seed=seed, vocab=vocab)
        row = made(seed=seed, **params)
        expected, margin = reference_token(logits[0].numpy(), row)
        assert margin < 1e-7 or token(logits, row) == expected


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7, "top_p": 0.8},
        {"top_k": 6},
        {"min_p": 0.05},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.7},
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(params: dict[str, Any]) -> None:
    """Chi-squared over 8000 draws with consecutive seeds and positions; the bound is about its 1 - 1e-6 quantile."""
    n = 8_000
    logits = random_logits(1, vocab=12, spread=1.5)
    expected = distribution(logits[0].numpy(), made(**params))
    sampler = Sampler(12)
    rows = [made([0] * (i % 10), seed=i // 10, **params) for i in range(n)]
    drawn = Counter(r.token_id for r in sampler.sample(logits.expand(n, 12).contiguous(), rows))  # type: ignore[union-attr]
    assert all(expected[t] > 0 for t in drawn), "a token that was cut off was drawn"
    kept = np.flatnonzero(expected)
    assert len(kept) > 1
    chi_squared = sum((drawn[int(t)] - n * expected[t]) ** 2 / (n * expected[t]) for t in kept)
    degrees = len(kept) - 1
    assert chi_squared < degrees + 5 * math.sqrt(2 * degrees) + 15


# --- randomness -------------------------------------------------------------------------------------------------------


def test_uniform_is_uniform_and_differs_by_seed_and_position() -> None:
    values = np.array([uniform(seed, position) for seed in range(100) for position in range(100)])
    assert len(np.unique(values)) == len(values)
    assert (values >= 0).all()
    assert (values < 1).all()
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    assert np.abs(counts - 500).max() < 110  # 5 standard deviations
    grid = values.reshape(100, 100)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.05


def test_uniform_never_changes() -> None:
    """Stored seeds must go on giving what they gave: a changed hash is a breaking change."""
    assert [uniform(0, 0), uniform(1, 0), uniform(2**64 - 1, 1000)] == [
        0.6524484863740322,
        0.36818951565166946,
        0.033884161635479915,
    ]


def test_a_seed_decides_and_no_seed_is_a_random_one() -> None:
    assert made(seed=7).sampling_seed == made(seed=7).sampling_seed
    assert made().sampling_seed != made().sampling_seed
    assert 0 <= made(seed=-1).sampling_seed < 2**64


# --- no neighbour effects ---------------------------------------------------------------------------------------------

MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": 2, "top_p": 0.9},
    {"seed": 3, "top_k": 20, "logprobs": 3},
    {"seed": 4, "min_p": 0.1, "repetition_penalty": 1.2},
    {"seed": 5, "temperature": 2.0, "presence_penalty": 1.0},
    {"temperature": 0.0, "logprobs": 0, "frequency_penalty": 0.5},
    {"seed": 6, "min_tokens": 5, "logit_bias": {9: 3.0}},
]


@pytest.mark.parametrize("vocab", [VOCAB, 1001, 49_152])
def test_a_row_is_the_same_alone_and_in_any_company(vocab: int) -> None:
    """Bit for bit, log-probabilities too; odd widths put rows at every alignment."""
    logits = random_logits(len(MIXED), vocab=vocab, spread=2.0)
    together = sample(logits, [made([4, 5, 5], **params) for params in MIXED])
    order = list(range(len(MIXED)))[::-1]
    for i, params in enumerate(MIXED):
        assert sample(logits[i : i + 1].clone(), [made([4, 5, 5], **params)]) == [together[i]]
    reordered = sample(logits[order].contiguous(), [made([4, 5, 5], **MIXED[i]) for i in order])
    assert [reordered[order.index(i)] for i in range(len(MIXED))] == together


def test_logits_are_not_changed() -> None:
    logits = random_logits(len(MIXED))
    before = logits.clone()
    sample(logits, [made([4, 5], **params) for params in MIXED])
    assert torch.equal(logits, before)


def test_one_broken_row_does_not_touch_the_others() -> None:
    logits = random_logits(5)
    logits[1, 7] = math.nan
    logits[2, 7] = math.inf
    logits[3] = -math.inf
    for temperature in (0.0, 1.0):
        rows = [made(seed=i, temperature=temperature) for i in range(5)]
        results = sample(logits, rows)
        assert [isinstance(r, SampleFailed) for r in results] == [False, True, True, True, False]
        assert results[0] == sample(logits[:1], rows[:1])[0]
        failed = results[1]
        assert isinstance(failed, SampleFailed)
        assert "not finite" in failed.message


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, [3, 9]] = torch.tensor([1.0, 1.0])
    drawn = {token(logits, made(seed=i, temperature=t)) for i in range(50) for t in (0.5, 1e3)}
    assert drawn == {3, 9}


def test_forbidding_every_token_is_an_error() -> None:
    (result,) = sample(torch.zeros(1, 3), [made(logit_bias={i: -math.inf for i in range(3)})])
    assert isinstance(result, SampleFailed)
    assert "leave no token" in result.message


# --- greedy, ties, penalties ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"logprobs": 1}, {"repetition_penalty": 1.1}, {"min_tokens": 3}], ids=str)
def test_greedy_takes_the_first_of_equals(extra: dict[str, Any]) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [40, 41, 200]] = 2.0
    assert token(logits, made(temperature=0.0, **extra)) == 40


def test_equal_logits_are_ordered_by_id() -> None:
    """All tokens alike: the draw at u is token floor(u * vocab), whichever way they are sorted or cut."""
    for seed in range(20):
        row = made(seed=seed)
        expected = int(uniform(row.sampling_seed, 0) * VOCAB)
        assert token(torch.zeros(1, VOCAB), row) == expected


def test_top_k_keeps_what_equals_the_last() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0, 4.0, 4.0, 1.0]])
    assert {token(logits, made(seed=i, top_k=2, temperature=5.0)) for i in range(200)} == {1, 2, 3, 4}


def test_tiny_temperatures_are_greedy() -> None:
    logits = random_logits(1)
    assert token(logits, made(temperature=1e-9)) == int(logits.argmax())
    assert token(logits, made(temperature=2e-5)) == int(logits.argmax())


def test_min_tokens_bans_eos_and_stop_ids_until_then() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [EOS, 5, 9]] = torch.tensor([9.0, 8.0, 1.0])
    greedy: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (5,)}
    assert [token(logits, made([0] * n, **greedy)) for n in range(3)] == [9, 9, EOS]


def test_penalties_keep_up_with_a_growing_output() -> None:
    """The counts are kept from step to step; at each they must be what counting anew would give."""
    sampler = Sampler(VOCAB, eos_token_ids=[EOS])
    row = made(
        prompt=range(50, 400), temperature=0.0, frequency_penalty=0.7, presence_penalty=0.3, repetition_penalty=1.2
    )
    rng = np.random.default_rng(0)
    for step in range(600):
        logits = random_logits(1, seed=step, spread=1.0)
        (result,) = sampler.sample(logits, [row])
        assert isinstance(result, SampledToken)
        clean = made(row.output_token_ids, [t for t in row.prompt_token_ids if t < VOCAB], **vars(row.params))
        assert result.token_id == int(edited(logits[0].numpy(), clean).argmax())
        row.output_token_ids.append(int(rng.integers(VOCAB)))


def test_what_is_kept_of_a_request_goes_with_it() -> None:
    sampler = Sampler(VOCAB)
    row = made(frequency_penalty=1.0)
    sampler.sample(random_logits(1), [row])
    assert len(sampler._edits) == 1
    del row
    gc.collect()
    assert len(sampler._edits) == 0


# --- log-probabilities ------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_unmodified_logits() -> None:
    logits = random_logits(1, vocab=5000)
    row = made([4], seed=1, temperature=0.3, logit_bias={8: 50.0}, logprobs=5, presence_penalty=1.0)
    (result,) = sample(logits, [row])
    assert isinstance(result, SampledToken)
    assert result.token_id == 8
    assert result.logprobs is not None
    expected = torch.log_softmax(logits[0].double(), dim=0)
    values, ids = expected.topk(5)
    assert [one.token_id for one in result.logprobs.top] == ids.tolist()
    assert [one.rank for one in result.logprobs.top] == [0, 1, 2, 3, 4]
    np.testing.assert_allclose([one.logprob for one in result.logprobs.top], values.tolist(), atol=1e-5)
    sampled = result.logprobs.sampled
    assert sampled.rank == int((logits[0] > logits[0, 8]).sum())
    assert sampled.logprob == pytest.approx(float(expected[8]), abs=1e-5)


def test_logprobs_of_ties_are_ranked_by_id() -> None:
    logits = torch.zeros(1, 10)
    (result,) = sample(logits, [made(logit_bias={6: 9.0}, temperature=0.0, logprobs=3)])
    assert isinstance(result, SampledToken)
    assert result.logprobs is not None
    assert [(one.token_id, one.rank) for one in result.logprobs.top] == [(0, 0), (1, 1), (2, 2)]
    assert (result.logprobs.sampled.token_id, result.logprobs.sampled.rank) == (6, 6)


def test_logprobs_reach_as_deep_as_was_asked() -> None:
    (result,) = sample(torch.linspace(0, -300, 100).reshape(1, -1), [made(temperature=0.0, logprobs=20)])
    assert isinstance(result, SampledToken)
    assert result.logprobs is not None
    assert [one.token_id for one in result.logprobs.top] == list(range(20))


def test_logprobs_zero_gives_only_the_sampled_token() -> None:
    (result,) = sample(random_logits(1), [made(logprobs=0, temperature=0.0)])
    assert isinstance(result, SampledToken)
    assert result.logprobs is not None
    assert result.logprobs.top == ()
    assert result.logprobs.sampled.rank == 0


# --- what is passed in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "logits", [torch.zeros(2, VOCAB), torch.zeros(1, 5), torch.zeros(1, VOCAB, dtype=torch.float64)]
)
def test_another_shape_or_dtype_is_refused(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be float32 \[1, 300\], got torch"):
        Sampler(VOCAB).sample(logits, [made()])


def test_no_rows() -> None:
    assert Sampler(VOCAB).sample(torch.zeros(0, VOCAB), []) == []


def test_ids_outside_the_vocabulary_change_nothing() -> None:
    params = SamplingParams(
        temperature=0.0, logit_bias={10**6: 5.0}, stop_token_ids=(10**6,), min_tokens=1, repetition_penalty=1.1
    )
    logits = random_logits(1)
    row = Request("r", [10**6], params)
    assert token(logits, row) == int(logits.argmax())


def test_the_path_for_other_devices_gives_the_same() -> None:
    """Its tensors only come to the host in another way; a fake device name takes it without having one."""
    logits = random_logits(len(MIXED))
    rows = [made([4, 5, 5], **params) for params in MIXED]
    assert Sampler(VOCAB, eos_token_ids=[EOS])._sample_on_device(logits, rows) == sample(logits, rows)
