"""Workloads as declared data: which adapters, when, how long, how many. ``PROFILES`` are the named ones.

``requests_of`` turns a profile and the server's adapters into requests. The same profile, seed and adapters give the
same requests; each property draws from a stream of its own, so that e.g. another rate leaves the adapters' order as
it was."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from loadgen.arrivals import Arrival
from loadgen.errors import ProfileError
from loadgen.traces import TracedRequest

PopularityKind = Literal["distinct", "uniform", "zipf", "skewed", "identical", "mix"]
Loop = Literal["open", "closed"]
SwapAction = Literal["load", "replace", "unload"]
_STEADY = Arrival()


@dataclass(frozen=True)
class Popularity:
    """How often each adapter is asked; adapters in the order that they are given.

    ``distinct``: in turn, so that any n requests in a row have as many adapters as they can. ``uniform``: at random,
    all alike. ``zipf``: the k-th in proportion to 1 / k^``zipf_exponent``. ``skewed``: the first has ``hot_share`` of
    the requests, the others share the rest. ``identical``: the first alone. ``mix``: by ``weights``, of any models.
    ``base_share`` of the requests go to the base, whatever the kind (but not with ``mix``, which can name it)."""

    kind: PopularityKind = "zipf"
    zipf_exponent: float = 1.0
    hot_share: float = 0.8
    base_share: float = 0.0
    weights: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(PopularityKind):
            raise ProfileError(f"popularity: expected one of {', '.join(get_args(PopularityKind))}, got {self.kind!r}")
        if not (math.isfinite(self.zipf_exponent) and self.zipf_exponent >= 0):
            raise ProfileError(f"zipf exponent: expected >= 0, got {self.zipf_exponent:g}")
        for name, share in (("hot share", self.hot_share), ("base share", self.base_share)):
            if not 0 <= share <= 1:
                raise ProfileError(f"{name}: expected 0 to 1, got {share:g}")
        if self.kind == "mix" and not self.weights:
            raise ProfileError("mix: expected name=weight,name=weight")
        if any(not (math.isfinite(weight) and weight > 0) for _, weight in self.weights):
            raise ProfileError("mix: weights must be positive numbers")

    def shares(self, adapters: Sequence[str], base: str | None) -> dict[str, float]:
        """The expected share of each model. ProfileError if there is nothing to ask."""
        if self.kind == "mix":
            return _normalised(dict(self.weights))
        if not adapters:
            if base is None:
                raise ProfileError("the server lists no models")
            return {base: 1.0}
        if self.base_share and base is None:
            raise ProfileError("base share: the server lists no base; name one with --base")
        count = len(adapters)
        match self.kind:
            case "zipf":
                weights = [rank**-self.zipf_exponent for rank in range(1, count + 1)]
            case "skewed" if count > 1:
                weights = [self.hot_share] + [(1 - self.hot_share) / (count - 1)] * (count - 1)
            case "identical":
                weights = [1.0] + [0.0] * (count - 1)
            case _:
                weights = [1.0] * count
        shares = {name: share * (1 - self.base_share) for name, share in _normalised_pairs(adapters, weights)}
        if self.base_share and base is not None:
            shares[base] = self.base_share
        return shares

    def choices(self, adapters: Sequence[str], base: str | None, rng: random.Random) -> Iterator[str]:
        """A model for each request, without end. ProfileError if there is nothing to ask."""
        shares = self.shares(adapters, base)
        if self.kind == "distinct" and adapters:
            turns = itertools.cycle(adapters)
            while True:
                yield base if base is not None and rng.random() < self.base_share else next(turns)
        names, weights = list(shares), list(itertools.accumulate(shares.values()))
        while True:
            yield rng.choices(names, cum_weights=weights)[0]


def _normalised_pairs(names: Sequence[str], weights: Sequence[float]) -> Iterator[tuple[str, float]]:
    total = sum(weights)
    return ((name, weight / total) for name, weight in zip(names, weights, strict=True))


def _normalised(weights: dict[str, float]) -> dict[str, float]:
    return dict(_normalised_pairs(list(weights), list(weights.values())))


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens: uniform in ``low`` .. ``high``, or, with a ``median``, log-normal with that median and
    ``sigma`` (of the logarithm), clipped to the same bounds."""

    low: int
    high: int
    median: float | None = None
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high <= 1_000_000:
            raise ProfileError(f"lengths: expected 1 <= low <= high <= 1000000, got {self.low} and {self.high}")
        if self.median is not None and not (self.low <= self.median <= self.high and 0 < self.sigma <= 10):
            raise ProfileError(f"lengths: a median inside {self.low}-{self.high} and a sigma > 0, got {self}")

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """``64``, ``32-128`` or ``lognormal:MEDIAN:SIGMA:LOW-HIGH``. ProfileError for anything else."""
        found = re.fullmatch(r"(?:lognormal:([0-9.]+):([0-9.]+):)?(\d+)(?:-(\d+))?", text)
        if found is None:
            raise ProfileError(f"lengths: expected 64, 32-128 or lognormal:MEDIAN:SIGMA:LOW-HIGH, got {text!r}")
        median, sigma, low, high = found.groups()
        try:
            shape = (None, 0.0) if median is None else (float(median), float(sigma))
        except ValueError:
            raise ProfileError(f"lengths: {median!r} or {sigma!r} is no number") from None
        return cls(int(low), int(high or low), *shape)

    def __str__(self) -> str:
        bounds = f"{self.low}" if self.low == self.high else f"{self.low}-{self.high}"
        return bounds if self.median is None else f"lognormal:{self.median:g}:{self.sigma:g}:{bounds}"

    def draw(self, rng: random.Random) -> int:
        if self.median is None:
            return rng.randint(self.low, self.high)
        return min(max(round(rng.lognormvariate(math.log(self.median), self.sigma)), self.low), self.high)


@dataclass(frozen=True)
class Swaps:
    """Every ``every_s`` seconds the next of ``actions``, in turn, on one adapter name of the load test's own."""

    every_s: float
    actions: tuple[SwapAction, ...] = ("load", "replace", "unload")

    def __post_init__(self) -> None:
        if not (math.isfinite(self.every_s) and self.every_s > 0):
            raise ProfileError(f"swap every: expected more than 0 seconds, got {self.every_s:g}")
        unknown = [action for action in self.actions if action not in get_args(SwapAction)]
        if unknown or not self.actions:
            raise ProfileError(f"swap actions: expected some of {', '.join(get_args(SwapAction))}, got {self.actions}")


@dataclass(frozen=True)
class Profile:
    """A workload. ``rate`` (requests a second) is the open loop's, ``clients`` the closed loop's; ``chat_share`` of the
    requests are chats, the others completions; it ends after ``seconds`` or ``max_requests``, whichever comes first."""

    name: str
    about: str
    popularity: Popularity = Popularity()
    arrival: Arrival = _STEADY
    loop: Loop = "open"
    rate: float = 2.0
    clients: int = 8
    chat_share: float = 0.5
    prompt: Lengths = Lengths(32, 96)
    output: Lengths = Lengths(16, 48)
    prefix_tokens: int = 0
    seconds: float = 30.0
    max_requests: int = 10_000
    seed: int = 0
    swaps: Swaps | None = None

    def __post_init__(self) -> None:
        if self.loop not in get_args(Loop):
            raise ProfileError(f"loop: expected open or closed, got {self.loop!r}")
        bounds = (
            ("rate", self.rate, 0.001, 100_000),
            ("clients", self.clients, 1, 10_000),
            ("chat share", self.chat_share, 0, 1),
            ("prefix tokens", self.prefix_tokens, 0, 1_000_000),
            ("seconds", self.seconds, 0.1, 86_400),
            ("max requests", self.max_requests, 1, 1_000_000),
        )
        for name, value, low, high in bounds:
            if not low <= value <= high:
                raise ProfileError(f"{name}: expected {low} to {high}, got {value:g}")

    @property
    def peak_clients(self) -> int:
        return max(1, round(self.clients * self.arrival.peak))

    def clients_at(self, at_s: float) -> int:
        """Of the closed loop, at a time of the run."""
        return max(1, round(self.clients * self.arrival.level(at_s, self.seconds)))


def requests_of(profile: Profile, adapters: Sequence[str], base: str | None) -> Iterator[TracedRequest]:
    """At most ``max_requests`` requests: those of an open loop at their times, those of a closed loop all at 0, to be
    taken one after the other. ProfileError if there is nothing to ask."""

    def stream(what: str) -> random.Random:
        return random.Random(f"{profile.seed} {what}")

    models = profile.popularity.choices(adapters, base, stream("models"))
    times: Iterator[float] = itertools.repeat(0.0)
    if profile.loop == "open":
        times = profile.arrival.times(profile.rate, profile.seconds, stream("arrivals"))
    prompts, outputs, kinds, seeds = (stream(what) for what in ("prompts", "outputs", "kinds", "seeds"))
    for at_s, model in itertools.islice(zip(times, models, strict=False), profile.max_requests):
        yield TracedRequest(
            at_s=round(at_s, 6),
            model=model,
            kind="chat" if kinds.random() < profile.chat_share else "completion",
            max_tokens=profile.output.draw(outputs),
            prompt_tokens=profile.prompt.draw(prompts),
            prefix_tokens=profile.prefix_tokens,
            prompt_seed=seeds.getrandbits(32),
        )


_DECLARED = (
    Profile("zipf", "adapters by Zipf's law, Poisson arrivals: what traffic of many tenants looks like"),
    Profile("distinct", "adapters in turn: batches as mixed as can be", Popularity("distinct")),
    Profile("uniform", "adapters at random, all alike", Popularity("uniform")),
    Profile("skewed", "one adapter has 80 % of the traffic", Popularity("skewed")),
    Profile("identical", "one adapter alone", Popularity("identical")),
    Profile("base", "the base alone, to compare with", Popularity("identical", base_share=1.0)),
    Profile("burst", "zipf; 2 of every 10 s at four times the rate", arrival=Arrival("burst")),
    Profile("ramp", "zipf, from 0.5 to 5 requests/s: where does it break?", arrival=Arrival("ramp"), rate=5.0),
    Profile("closed", "zipf, 8 clients that ask again when answered", loop="closed"),
    Profile("swaps", "zipf; an adapter loaded, replaced or unloaded every second", swaps=Swaps(1.0)),
    Profile(
        "smoke", "2 clients for 5 s, short answers: for CI", loop="closed", clients=2, seconds=5.0, output=Lengths(8, 8)
    ),
)
PROFILES = {profile.name: profile for profile in _DECLARED}
