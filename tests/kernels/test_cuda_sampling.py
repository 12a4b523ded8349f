"""Tokens drawn by the device kernels against the host's sampler: the same tokens, not just the same distribution."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

pytest.importorskip("triton")

from manylora.kernels.cuda.sampling import NO_TOKEN, NOT_FINITE, launch, shipped_configurations
from manylora.kernels.cuda.sampling_buffers import Edits, Row, SamplingBuffers
from manylora.server.engine import sampler as host_sampler
from manylora.server.engine.logit_edits import LogitEdits
from manylora.server.engine.request import Request, SampledToken, SampleFailed
from manylora.server.engine.sampler import Sampler
from tests.fakes import request

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB, BLOCK, CAP = 200, 256, 32
ROUNDING = 1e-6
"""Of the total weight: the host sums an unrestricted row in fp32, the device has fp32 weights."""
ALMOST_ONE = math.nextafter(1.0, 0.0)

_Doubles = npt.NDArray[np.float64]


def made(output: tuple[int, ...] = (), prompt: tuple[int, ...] = (1, 2, 3), **params: Any) -> Request:
    one = request(prompt=prompt, **params)
    one.output_token_ids = list(output)
    return one


def drawn(
    logits: torch.Tensor, rows: list[Row | None], *, cap: int = CAP, block: int = BLOCK
) -> tuple[list[int], list[int], list[float]]:
    """Tokens, statuses and largest logits of one launch, with everything it might wrongly read poisoned."""
    n, vocab = logits.shape
    wide = torch.full((n + 1, vocab + 5), math.nan, device=DEVICE)  # a gap between rows, and a row for padding
    wide[:n, :vocab] = logits
    buffers = SamplingBuffers(n + 1, vocab, DEVICE, max_edits=1000, cap=cap)
    for floats in (buffers.kept_x, buffers.replaced, buffers.highest):
        floats.fill_(math.nan)
    for ints in (buffers.kept_i, buffers.token, buffers.status):
        ints.fill_(-77)
    buffers.fill(rows)
    before = wide.clone()
    launch(wide[:, :vocab], buffers, n + 1, block=block)
    assert torch.equal(wide.nan_to_num(nan=-9e9), before.nan_to_num(nan=-9e9)), "the logits were not put back"
    assert int(buffers.kept_i.max()) < vocab, "what is past the end of the row was gathered"
    token, status, highest = (a.tolist() for a in buffers.read(n + 1))
    assert (token.pop(), status.pop(), highest.pop()) == (-1, 0, 0.0)
    return token, status, highest


def hosts(monkeypatch: pytest.MonkeyPatch, logits: torch.Tensor, row: Row) -> int:
    monkeypatch.setattr(host_sampler, "uniform", lambda *_: row.point)
    one = made(temperature=row.temperature, top_k=row.top_k, top_p=row.top_p, min_p=row.min_p)
    (result,) = Sampler(logits.shape[0]).sample(logits[None], [one])
    assert isinstance(result, SampledToken)
    return result.token_id


def ranks(logits: torch.Tensor, row: Row, slack: float) -> tuple[int, int, npt.NDArray[np.int64]]:
    """In fp64: the ranks between which the draw lies if everything that is compared is off by at most ``slack`` (of the
    total weight), and the tokens by rank."""
    x = logits.double().numpy()
    order = np.argsort(-x, kind="stable")
    weights = np.exp((x[order] - x.max()) / row.temperature)
    found = []
    for top_p, min_p, off in itertools.product((-slack, slack), repeat=3):
        kept = weights[weights >= row.min_p + min_p]
        if 0 < row.top_k < len(x):
            kept = kept[: np.count_nonzero(x >= x[order[row.top_k - 1]])]
        cumulated = np.cumsum(kept)
        if row.top_p < 1:
            cumulated = cumulated[: int(np.searchsorted(cumulated, (row.top_p + top_p) * cumulated[-1])) + 1]
        place = np.searchsorted(cumulated, (row.point + off) * cumulated[-1], side="right")
        found.append(min(int(place), len(cumulated) - 1))
    return min(found), max(found), order


def kinds(vocab: int = VOCAB) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)

    def normal(spread: float) -> torch.Tensor:
        return torch.randn(vocab, generator=random) * spread

    masked = normal(3.0)
    masked[torch.randperm(vocab, generator=random)[: vocab // 2]] = -math.inf
    outlier = normal(1.0)
    outlier[vocab // 3] = 40.0
    zeros = torch.zeros(vocab)
    zeros[::3] = -0.0  # equal to 0.0, so not apart from it
    return {
        "normal": normal(3.0),
        "flat": normal(0.3),
        "ties": (normal(2.0) * 2).round() / 2,
        "all tied": zeros,
        "masked": masked,
        "outlier": outlier,
        "far below zero": normal(2.0) - 500,
        "masked by -1e30": torch.where(masked.isinf(), torch.tensor(-1e30), masked),
        "tiny": normal(1e-30),
    }


MATRIX = [
    Row(t, k, p, m)
    for t, k, p, m in itertools.product((0.0, 0.3, 1.0, 2.0), (0, 1, 5, 50), (1.0, 0.9, 0.1), (0.0, 0.05))
]


@pytest.mark.parametrize("start", range(2))
def test_tokens_are_the_hosts(monkeypatch: pytest.MonkeyPatch, start: int) -> None:
    """Every combination of parameters; logits and points in turn. The two may differ only where the point, the nucleus
    or min_p is within rounding of a boundary, which fp64 confirms."""
    points = [0.0, ALMOST_ONE, *np.random.default_rng(start).random(9).tolist()]
    logits = list(kinds().values())
    sampled = [row for row in MATRIX if start == 0 or (row.temperature > 0 and row.top_k != 1)][:: 2 * start + 1]
    of_row = [logits[(i + start * 4) % len(logits)] for i in range(len(sampled))]
    rows = [row._replace(point=points[i % len(points)]) for i, row in enumerate(sampled)]
    tokens, statuses, highest = drawn(torch.stack(of_row), list(rows))
    assert statuses == [0] * len(rows)
    assert highest == [float(x.max()) for x in of_row]
    exceptions = 0
    for x, row, token in zip(of_row, rows, tokens, strict=True):
        expected = hosts(monkeypatch, x, row)
        if token != expected:
            exceptions += 1
            assert row.temperature > 0, row
            first, last, order = ranks(x, row, ROUNDING)
            assert token in order[first : last + 1], (row, token, expected)
            assert first < last
    assert exceptions <= 3  # the points just below 1 of rows with a tail of no weight


@pytest.mark.parametrize("kind", ["normal", "ties", "tiny", "masked by -1e30"])
def test_the_general_search_gives_the_same(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """With room for one token only, every search passes over the row, here in blocks of half of it."""
    logits = kinds()[kind]
    some = [Row(1.0, point=0.61), Row(2.0, 0, 0.9, 0.0, 0.8), Row(1.0, 50, 0.7, 0.0, 0.4)]
    batch = logits.expand(len(some), VOCAB)
    tokens, _, _ = drawn(batch, list(some), cap=1, block=128)
    assert tokens == [hosts(monkeypatch, logits, row) for row in some]


def test_boundaries_that_are_exact() -> None:
    """Equal weights add up exactly, so there is no rounding to hide behind: searchsorted's left and right."""
    tied = torch.zeros(8)
    deep = torch.tensor([0.0, -20.0, -9.0, -25.0, -200.0, -math.inf, -20.0, -3.0])
    two = torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0, 1.0, 0.0, 0.0])
    cases = [
        (tied, Row(point=0.5), 4),  # the first whose cumulated weight exceeds the point
        (tied, Row(point=math.nextafter(0.5, 0)), 3),
        (tied, Row(top_p=0.5, point=ALMOST_ONE), 3),  # at least half: four, not five
        (tied, Row(top_p=math.nextafter(0.5, 1), point=ALMOST_ONE), 4),
        (tied, Row(top_p=0.5, point=0.5), 2),
        (tied, Row(top_p=1e-9, point=ALMOST_ONE), 0),  # never fewer than one
        (tied, Row(top_k=3, point=ALMOST_ONE), 7),  # what equals the third
        (tied, Row(min_p=1.0, point=ALMOST_ONE), 7),
        (two, Row(top_k=1, point=ALMOST_ONE), 3),
        (two, Row(top_k=2, point=ALMOST_ONE), 3),
        (two, Row(top_k=3, point=ALMOST_ONE), 5),
        (two, Row(top_k=3, point=0.0), 1),
        (two, Row(min_p=1.0, point=ALMOST_ONE), 3),
        (two, Row(temperature=0.0), 1),
        (two, Row(temperature=9e-6, point=ALMOST_ONE), 1),
        (two, Row(top_k=8, point=ALMOST_ONE), 7),
        (deep, Row(point=ALMOST_ONE), 3),  # the last that weighs anything
        (deep, Row(temperature=0.2, point=ALMOST_ONE), 7),
    ]
    tokens, _, _ = drawn(torch.stack([x for x, _, _ in cases]), [row for _, row, _ in cases])
    assert tokens == [expected for _, _, expected in cases]


def test_min_p_cuts_between_neighbouring_logits() -> None:
    """Halving a weight takes ln 2: the fp32 number under it is kept, the one above it is not."""
    x = torch.full((3, 6), -50.0)
    x[:, 1] = 0.0
    near = np.float32(-math.log(2.0))
    above, below = (near, np.nextafter(near, np.float32(-1)))
    if float(above) < -math.log(2.0):
        above, below = np.nextafter(near, np.float32(0)), near
    x[0, 4], x[1, 4], x[2, 4] = float(above), float(below), -0.0
    tokens, _, _ = drawn(x, [Row(min_p=0.5, point=ALMOST_ONE)] * 3)
    assert tokens == [4, 1, 4]


def test_a_row_is_the_same_alone_and_in_any_company() -> None:
    logits = torch.stack(list(kinds().values())[:6])
    rows = [Row((1.0, 2.0)[i % 2], (0, 20)[i % 2], (0.9, 1.0)[i // 2 % 2], 0.0, 0.77) for i in range(len(logits))]
    together = drawn(logits, list(rows))
    backwards = drawn(logits.flip(0), rows[::-1])
    assert [part[::-1] for part in backwards] == list(together)
    for i, row in list(enumerate(rows))[::3]:
        assert drawn(logits[i : i + 1], [row]) == tuple(part[i : i + 1] for part in together)


@pytest.mark.parametrize("row", [Row(1.3, min_p=0.05), Row(0.8, 7, 0.95)][: 2 if DEVICE == "cuda" else 1], ids=str)
def test_frequencies_are_the_probabilities(row: Row) -> None:
    """Chi-squared; the bound is about its 1 - 1e-6 quantile. The interpreter is slow: it gets fewer draws."""
    n = 20_000 if DEVICE == "cuda" else 60
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    points = np.random.default_rng(0).random(n)
    tokens, _, _ = drawn(logits.expand(n, 12), [row._replace(point=p) for p in points], block=16, cap=16)
    seen = Counter(tokens)
    x = logits.double().numpy() / row.temperature
    p = np.exp(x - x.max())
    p[p < row.min_p] = 0
    if row.top_k:
        p[p < np.sort(p)[-row.top_k]] = 0
    p /= p.sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= row.top_p]] = 0
    p /= p.sum()
    kept = np.flatnonzero(p)
    assert set(seen) <= set(kept.tolist())
    chi_squared = sum((seen[int(t)] - n * p[t]) ** 2 / (n * p[t]) for t in kept)
    degrees = len(kept) - 1
    assert degrees >= 4
    assert chi_squared < degrees + 5 * math.sqrt(2 * degrees) + 15


def test_rows_that_are_broken_say_so_and_touch_no_others() -> None:
    x = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1))
    x[1, 7] = math.nan
    x[2, 7], x[2, 9] = math.inf, -math.inf
    x[3] = -math.inf
    x[4, 0] = -torch.tensor(math.nan)  # its sign bit must not hide it
    for temperature in (0.0, 1.0):
        rows: list[Row | None] = [Row(temperature, point=0.4)] * 6
        tokens, statuses, highest = drawn(x, rows)
        assert statuses == [0, NOT_FINITE, NOT_FINITE, NOT_FINITE, NOT_FINITE, 0]
        assert tokens[1:5] == [-1] * 4
        assert [str(h) for h in highest[1:5]] == ["nan", "inf", "-inf", "nan"]
        assert (tokens[0], tokens[5]) == (drawn(x[:1], rows[:1])[0][0], drawn(x[5:], rows[:1])[0][0])


def entries(rng: np.random.Generator, n: int, vocab: int) -> Edits:
    f = np.float32
    bias = rng.normal(size=n).astype(f)
    bias[::5] = -np.inf
    counts = rng.integers(0, 4, n).astype(f)
    return Edits(rng.permutation(vocab)[:n].astype(np.int32), bias, np.full(n, 1.3, f), f(0.37) * counts, counts > 0)


def test_edits_are_the_hosts_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back between the edits and their undoing."""
    from manylora.kernels.cuda import sampling

    rows = [
        made((4, 5, 5, 9), (1, 2, 5, 40, 40), repetition_penalty=1.3, frequency_penalty=0.37, presence_penalty=-0.21,
             logit_bias={5: 1.7, 60: -3.3, 61: 1e3}, min_tokens=9, stop_token_ids=(9, 61, 77)),
        made(logit_bias={0: 0.1, 199: -math.inf}),
        made((3,), frequency_penalty=0.1),
        made((3,), repetition_penalty=0.7),
        made(min_tokens=1),
    ]  # fmt: skip
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(2)) * 7
    expected, given = logits.numpy().copy(), []
    for x, row in zip(expected, rows, strict=True):
        edits = LogitEdits(row, [2, 11], VOCAB)
        given.append(Row(temperature=0.0, edits=edits.entries(row)))
        edits.apply(x, row)
    seen = []

    class Spy:
        def __getitem__(self, _: object) -> Any:
            return lambda x, *args, **kwargs: seen.append(x.clone())

    buffers = SamplingBuffers(len(rows), VOCAB, DEVICE, max_edits=1000, cap=CAP)
    buffers.fill(given)
    monkeypatch.setattr(sampling, "restore_kernel", Spy())
    launch(logits.to(DEVICE), buffers, len(rows), block=BLOCK)
    assert seen[0].cpu().numpy().tobytes() == expected.tobytes()
    assert buffers.read(len(rows))[0].tolist() == expected.argmax(1).tolist()


def test_edits_that_leave_nothing_and_edits_across_blocks() -> None:
    rng = np.random.default_rng(5)
    x = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(4))
    everything = Edits(
        np.arange(VOCAB, dtype=np.int32), np.full(VOCAB, -np.inf, np.float32), np.ones(VOCAB, np.float32),
        np.zeros(VOCAB, np.float32), np.zeros(VOCAB, np.float32),
    )  # fmt: skip
    some = entries(rng, 150, VOCAB)
    for temperature in (0.0, 1.0):
        given: list[Row | None] = [
            Row(temperature, edits=everything), Row(temperature, point=0.3), None,
            Row(temperature, point=0.3, edits=some),
        ]  # fmt: skip
        tokens, statuses, highest = drawn(x, given, block=64)
        assert statuses == [NO_TOKEN, 0, 0, 0]
        assert (tokens[0], tokens[2], highest[0]) == (-1, -1, float(x[0].max()))
        edited = x[3].clone()
        at = torch.from_numpy(some.token).long()
        v = edited[at] + torch.from_numpy(some.bias)
        v = torch.where(v > 0, v / torch.tensor(1.3), v * torch.tensor(1.3))
        edited[at] = v - torch.from_numpy(some.frequency) - torch.from_numpy(some.presence.astype(np.float32))
        assert tokens[3] == drawn(edited[None], [Row(temperature, point=0.3)])[0][0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab must be"):
        SamplingBuffers(1, 2**19 + 1, DEVICE)
    buffers = SamplingBuffers(2, VOCAB, DEVICE, max_edits=3, cap=4)
    with pytest.raises(ValueError, match="2 rows with 3 edits fit, got 3 with 0"):
        buffers.fill([None] * 3)
    with pytest.raises(ValueError, match="got 1 with 4"):
        buffers.fill([Row(edits=entries(np.random.default_rng(0), 4, VOCAB))])
    for wrong in (torch.zeros(2, 5), torch.zeros(1, VOCAB), torch.zeros(2, VOCAB, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"must be float32 \[>= 2, 200\], got"):
            launch(wrong.to(DEVICE), buffers, 2)
    with pytest.raises(ValueError, match="contiguous and apart"):
        launch(torch.zeros(1, VOCAB, device=DEVICE).expand(2, VOCAB), buffers, 2)
    with pytest.raises(ValueError, match=r"1\.\.2, got 3"):
        launch(torch.zeros(3, VOCAB, device=DEVICE), buffers, 3)


def test_shipped_configurations_name_every_argument() -> None:
    for kernel, types, constants, _, _, label in shipped_configurations():
        assert sorted([*types, *constants]) == sorted(kernel.arg_names), label


# --- within the sampler ----------------------------------------------------------------------------------------------

MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": 2, "top_p": 0.9},
    {"seed": 3, "top_k": 20, "logprobs": 3},
    {"seed": 4, "min_p": 0.1, "repetition_penalty": 1.2},
    {"seed": 5, "temperature": 2.0, "presence_penalty": 1.0, "frequency_penalty": 0.2},
    {"temperature": 0.0, "logprobs": 0, "frequency_penalty": 0.5},
    {"seed": 6, "min_tokens": 5, "logit_bias": {9: 3.0, 2: 4.0}, "stop_token_ids": (9, 12)},
    {"seed": 7, "logit_bias": {i: -math.inf for i in range(VOCAB)}},
    {"seed": 8, "top_p": 0.5, "top_k": 50, "temperature": 0.4, "repetition_penalty": 0.8, "logit_bias": {1: 2.0}},
]


def test_the_sampler_gives_the_same_on_either_path() -> None:
    """A mixed batch over steps, outputs growing; one row's logits broken; log-probabilities by the host."""
    broken = len(MIXED)
    rows = [made((4, 5, 5), **params) for params in [*MIXED, {"seed": 9}]]
    host, device = (Sampler(VOCAB, eos_token_ids=[2]) for _ in range(2))
    for step in range(2):
        logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(step)) * 2
        logits[broken, 3] = math.inf
        before = logits.clone()
        expected = host.sample(logits, rows)
        assert device._sample_on_device(logits, rows) == expected
        assert torch.equal(logits, before)
        assert isinstance(expected[broken], SampleFailed)
        for row, result in zip(rows, expected, strict=True):
            row.output_token_ids.append(result.token_id if isinstance(result, SampledToken) else 7)


def test_rows_whose_edits_do_not_fit_are_drawn_by_the_host() -> None:
    rows = [made((4, 5, 5), **params) for params in MIXED]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(9))
    sampler = Sampler(VOCAB, eos_token_ids=[2])
    sampler._device_sampler(constrained=False).max_edits = 4
    assert sampler._sample_on_device(logits, rows) == Sampler(VOCAB, eos_token_ids=[2]).sample(logits, rows)


def test_more_rows_than_there_were_buffers_for() -> None:
    rows = [made(seed=i, temperature=0.0) for i in range(20)]
    logits = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(9))
    sampler = Sampler(VOCAB)
    for n in (3, 20, 1):
        assert sampler._sample_on_device(logits[:n], rows[:n]) == Sampler(VOCAB).sample(logits[:n], rows[:n])
