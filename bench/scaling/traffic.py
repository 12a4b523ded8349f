"""What is asked of a cluster, and when: the load test's own profiles and traces (loadtest/), as columns of numbers."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "loadtest"))

from loadgen.profiles import PROFILES, Popularity, Profile, requests_of
from loadgen.traces import TracedRequest

BASE = -1
"""The adapter number of a request for the base."""
_DRAWN_AT = 1000.0
"""Requests a second at which profiles are drawn, to be stretched: a trace must end within a day."""


@dataclass(frozen=True)
class Traffic:
    """Requests in the order of their times, one a place of each column. ``at_s``: seconds. ``adapter``: its number, 0
    being the most popular of a profile, or ``BASE``. ``prompt``, ``output``: tokens."""

    at_s: list[float]
    adapter: list[int]
    prompt: list[int]
    output: list[int]
    adapters: int

    def __len__(self) -> int:
        return len(self.at_s)

    @property
    def mean_prompt(self) -> float:
        return sum(self.prompt) / len(self.prompt)

    @property
    def mean_output(self) -> float:
        return sum(self.output) / len(self.output)

    def first(self, count: int, *, rate: float) -> Traffic:
        """The first ``count`` requests at ``rate`` requests a second instead: what the profile gives at that rate, as a
        load test's arrivals at another rate are the same ones on another scale."""
        scale = _DRAWN_AT / rate
        times = [at_s * scale for at_s in self.at_s[:count]]
        return Traffic(times, self.adapter[:count], self.prompt[:count], self.output[:count], self.adapters)

    @classmethod
    def of_requests(cls, requests: Iterable[TracedRequest], names: Iterable[str], base: str | None) -> Traffic:
        """Of a trace. Adapters that ``names`` lacks come after it, in the order in which they are asked for."""
        numbers = {name: i for i, name in enumerate(names)}
        columns: tuple[list[float], list[int], list[int], list[int]] = ([], [], [], [])
        for request in requests:
            adapter = BASE if request.model == base else numbers.setdefault(request.model, len(numbers))
            given = request.prompt
            # Of a text only the length is known: four characters make a token, or so.
            prompt = request.prompt_tokens if given is None else len(given) // (4 if isinstance(given, str) else 1)
            for column, value in zip(columns, (request.at_s, adapter, max(prompt, 1), request.max_tokens), strict=True):
                column.append(value)  # type: ignore[arg-type]
        return cls(*columns, adapters=len(numbers))


def zipf(
    adapters: int, exponent: float, count: int, *, rate: float = _DRAWN_AT, seed: int = 0, profile: str = "zipf"
) -> Traffic:
    """``count`` requests of a load test's profile: Poisson arrivals at ``rate`` a second, the k-th of ``adapters``
    in proportion to 1 / k^``exponent``, lengths as the profile has them (prompts of 32 to 96, answers of 16 to 48
    tokens)."""
    drawn: Profile = dataclasses.replace(
        PROFILES[profile],
        popularity=Popularity("zipf", zipf_exponent=exponent),
        rate=rate,
        max_requests=count,
        seconds=86_400.0,
        seed=seed,
    )
    names = [f"a{i}" for i in range(adapters)]
    return Traffic.of_requests(requests_of(drawn, names, None), names, None)
