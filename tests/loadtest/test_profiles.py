"""What a profile asks: the stated popularity, arrivals and lengths, and the same for the same seed."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import Counter
from dataclasses import replace

import pytest
from loadgen.arrivals import Arrival
from loadgen.errors import ProfileError
from loadgen.profiles import PROFILES, Lengths, Popularity, Profile, Swaps, requests_of

ADAPTERS = [f"a{i}" for i in range(5)]
N = 20_000


def drawn(popularity: Popularity, n: int = N, adapters: list[str] = ADAPTERS) -> list[str]:
    return list(itertools.islice(popularity.choices(adapters, "base", random.Random(1)), n))


def within(count: int, share: float, n: int = N) -> bool:
    """Five standard deviations of a binomial draw: one run in two million would miss it, and the seed is fixed."""
    return abs(count - share * n) <= 5 * math.sqrt(n * share * (1 - share)) + 1e-9


def test_distinct_takes_turns() -> None:
    order = drawn(Popularity("distinct"), 100)
    assert all(len(set(order[i : i + 5])) == 5 for i in range(96))


@pytest.mark.parametrize(
    ("popularity", "shares"),
    [
        (Popularity("uniform"), [0.2] * 5),
        (Popularity("zipf"), [1 / k / (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) for k in range(1, 6)]),
        (Popularity("zipf", zipf_exponent=2), [k**-2 / 1.463611111 for k in range(1, 6)]),
        (Popularity("skewed", hot_share=0.6), [0.6, 0.1, 0.1, 0.1, 0.1]),
        (Popularity("identical"), [1, 0, 0, 0, 0]),
        (Popularity("mix", weights=(("a1", 3.0), ("a4", 1.0))), [0, 0.75, 0, 0, 0.25]),
    ],
    ids=lambda value: value.kind if isinstance(value, Popularity) else "",
)
def test_popularity_is_as_stated(popularity: Popularity, shares: list[float]) -> None:
    counts = Counter(drawn(popularity))
    assert all(within(counts[name], share) for name, share in zip(ADAPTERS, shares, strict=True)), counts
    assert counts.total() == sum(counts[name] for name in ADAPTERS)


@pytest.mark.parametrize("kind", ["distinct", "uniform", "identical"])
def test_the_base_has_its_share(kind: str) -> None:
    counts = Counter(drawn(Popularity(kind, base_share=0.25)))  # type: ignore[arg-type]
    assert within(counts["base"], 0.25)
    if kind == "distinct":
        assert max(counts[a] for a in ADAPTERS) - min(counts[a] for a in ADAPTERS) <= 1


def test_nothing_to_ask_and_one_adapter() -> None:
    with pytest.raises(ProfileError, match="lists no models"):
        next(Popularity().choices([], None, random.Random(0)))
    with pytest.raises(ProfileError, match="--base"):
        next(Popularity(base_share=0.5).choices(["a"], None, random.Random(0)))
    assert set(drawn(Popularity("skewed"), 10, ["only"])) == {"only"}
    assert set(drawn(Popularity("zipf"), 10, [])) == {"base"}


def test_the_same_seed_asks_the_same_and_another_does_not() -> None:
    profile = replace(PROFILES["burst"], seed=3)
    first, again = (list(requests_of(profile, ADAPTERS, "base")) for _ in range(2))
    assert first == again
    assert [r.body() for r in first] == [r.body() for r in again]
    assert first != list(requests_of(replace(profile, seed=4), ADAPTERS, "base"))


def test_one_property_does_not_shift_the_others() -> None:
    slow, fast = (list(requests_of(replace(PROFILES["zipf"], rate=rate), ADAPTERS, "base")) for rate in (2.0, 20.0))
    assert len(fast) > 3 * len(slow)
    for a, b in zip(slow, fast, strict=False):
        assert (a.model, a.kind, a.max_tokens, a.prompt_tokens, a.prompt_seed) == (
            b.model, b.kind, b.max_tokens, b.prompt_tokens, b.prompt_seed,
        )  # fmt: skip
    other = list(requests_of(replace(PROFILES["zipf"], output=Lengths.parse("lognormal:8:1:1-99")), ADAPTERS, "base"))
    assert [replace(r, max_tokens=1) for r in other] == [replace(r, max_tokens=1) for r in slow]


def test_a_request_is_as_the_profile_says() -> None:
    profile = Profile(
        "t",
        "",
        chat_share=0.3,
        prompt=Lengths(40, 60),
        output=Lengths(5, 9),
        prefix_tokens=30,
        rate=100.0,
        seconds=50.0,
    )
    asked = list(requests_of(profile, ADAPTERS, "base"))
    assert within(sum(r.kind == "chat" for r in asked), 0.3, len(asked))
    assert {r.max_tokens for r in asked} == set(range(5, 10))
    assert {r.prompt_tokens for r in asked} == set(range(40, 61))
    texts = {r.model: [] for r in asked}  # type: ignore[var-annotated]
    for request in asked:
        body = request.body()
        text = body["messages"][0]["content"] if request.kind == "chat" else body["prompt"]
        assert len(text.split()) == request.prompt_tokens
        texts[request.model].append(text.split())
    prefixes = {model: {tuple(words[:30]) for words in all_words} for model, all_words in texts.items()}
    assert all(len(seen) == 1 for seen in prefixes.values())
    assert len(set.union(*prefixes.values())) == len(ADAPTERS)
    assert len({tuple(words[30:]) for words in texts["a0"]}) == len(texts["a0"])


# --- arrivals --------------------------------------------------------------------------------------------------------


def counted(arrival: Arrival, rate: float, run_s: float, edges: list[float]) -> list[int]:
    times = list(arrival.times(rate, run_s, random.Random(2)))
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < run_s
    return [sum(a <= t < b for t in times) for a, b in itertools.pairwise(edges)]


def test_fixed_spacing_is_even() -> None:
    times = list(Arrival(spacing="fixed").times(4.0, 2.0, random.Random(0)))
    assert times == pytest.approx([0.25 * i for i in range(8)])


def test_poisson_gaps_are_exponential() -> None:
    gaps = [b - a for a, b in itertools.pairwise(Arrival().times(50.0, 400.0, random.Random(0)))]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.05)


def test_bursts_come_when_they_should() -> None:
    burst = Arrival("burst", burst_factor=5.0, burst_s=1.0, burst_every_s=4.0)
    assert counted(replace(burst, spacing="fixed"), 128.0, 8.0, [0, 3, 4, 7, 8]) == [384, 640, 384, 640]
    calm, loud, *_ = counted(burst, 1000.0, 8.0, [0, 3, 4])
    assert within(loud, 5 / 8, calm + loud)
    assert [burst.level(t, 8.0) for t in (0, 2.99, 3, 3.99, 4)] == [1, 1, 5, 5, 1]


def test_a_ramp_rises_in_a_straight_line() -> None:
    ramp = Arrival("ramp", spacing="fixed", ramp_from=0.2)
    # The integral of 0.2 + 0.8 t / 10 over each half of ten seconds is 2 and 4.
    assert counted(ramp, 1000.0, 10.0, [0, 5, 10]) == pytest.approx([2000, 4000], abs=2)
    assert [ramp.level(t, 10.0) for t in (0, 5, 10)] == pytest.approx([0.2, 0.6, 1.0])
    assert len(list(replace(ramp, ramp_from=1.0).times(10.0, 3.0, random.Random(0)))) == 30


@pytest.mark.parametrize("shape", ["steady", "burst", "ramp"])
def test_times_undo_the_levels_integral(shape: str) -> None:
    arrival = Arrival(shape)  # type: ignore[arg-type]
    steps, run_s = 40_000, 40.0
    integral = 0.0
    for i in range(steps):
        integral += arrival.level((i + 0.5) * run_s / steps, run_s) * run_s / steps
        if i % 5000 == 4999:
            assert arrival.time_of(integral, run_s) == pytest.approx((i + 1) * run_s / steps, abs=5e-3)


def test_clients_follow_the_level() -> None:
    closed = replace(PROFILES["closed"], arrival=Arrival("ramp"), seconds=10.0)
    assert [closed.clients_at(t) for t in (0.0, 5.0, 10.0)] == [1, 4, 8]
    burst = replace(PROFILES["closed"], arrival=Arrival("burst"))
    assert (burst.clients_at(0), burst.clients_at(9), burst.peak_clients) == (8, 32, 32)


def test_the_number_of_requests_is_bounded() -> None:
    assert len(list(requests_of(replace(PROFILES["closed"], max_requests=7), ADAPTERS, "base"))) == 7
    assert len(list(requests_of(replace(PROFILES["zipf"], rate=1000.0, max_requests=9), ADAPTERS, "base"))) == 9


# --- lengths, and what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["64", "32-128", "lognormal:64:0.5:8-512"])
def test_lengths_read_and_write(text: str) -> None:
    assert str(Lengths.parse(text)) == text


def test_lognormal_lengths() -> None:
    rng = random.Random(0)
    values = [Lengths.parse("lognormal:64:0.5:8-512").draw(rng) for _ in range(20_001)]
    assert statistics.median(values) == pytest.approx(64, rel=0.03)
    assert statistics.stdev(math.log(v) for v in values) == pytest.approx(0.5, rel=0.05)
    assert min(values) >= 8
    assert max(Lengths.parse("lognormal:64:3:8-100").draw(rng) for _ in range(100)) == 100


@pytest.mark.parametrize(
    "text", ["", "0", "9-3", "x", "3-", "lognormal:64:0.5", "lognormal:1:0.5:8-9", "lognormal:.:.:1-2"]
)
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(ProfileError, match="lengths"):
        Lengths.parse(text)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Popularity("often"), "popularity"),  # type: ignore[arg-type]
        (lambda: Popularity(hot_share=1.5), "hot share"),
        (lambda: Popularity("mix"), "mix"),
        (lambda: Arrival("wave"), "arrival"),  # type: ignore[arg-type]
        (lambda: Arrival(burst_s=11), "burst"),
        (lambda: Arrival(ramp_from=0), "ramp from"),
        (lambda: Swaps(0), "swap every"),
        (lambda: Swaps(1, ("melt",)), "swap actions"),  # type: ignore[arg-type]
        (lambda: replace(PROFILES["zipf"], rate=math.nan), "rate"),
        (lambda: replace(PROFILES["zipf"], seconds=0), "seconds"),
        (lambda: replace(PROFILES["zipf"], max_requests=0), "max requests"),
    ],
)  # fmt: skip
def test_what_no_profile_can_be_is_named(make: object, named: str) -> None:
    with pytest.raises(ProfileError, match=f"^{named}"):
        make()  # type: ignore[operator]
