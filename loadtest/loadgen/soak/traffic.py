"""Clients that ask until they are told to stop: good requests, wrong ones, and looks at what a monitor looks at."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import httpx

from loadgen.soak.admin import ALIAS, COMES_AND_GOES, FIXED_MERGED, MERGED, REPLACED
from loadgen.soak.answers import ask
from loadgen.soak.judge import Judge
from loadgen.soak.questions import random_ask
from loadgen.soak.world import Uses, World
from loadgen.soak.wrong_requests import Wrong, choose, problem_of

COMPOSED: tuple[Uses, ...] = (((MERGED, 0.7), ("pirate", 0.5)), (("json", 0.4), (REPLACED, 1.0)), (("sql", 0.5),))
"""Compositions that are asked for."""
_MONITORED = ("/health", "/ready", "/metrics", "/v1/models", "/v1/adapters")
_AGAIN_S = 0.05


def random_uses(rng: random.Random) -> Uses:
    """Names that change come more often than those that do not."""
    name = rng.choice(["", "json", "pirate", *[FIXED_MERGED, ALIAS, COMES_AND_GOES] * 2, *[REPLACED, MERGED] * 3, "+"])
    if name == "+":
        return rng.choice(COMPOSED)
    return ((name, 1.0),) if name else ()


def be_a_client(
    client: httpx.Client, judge: Judge, world: World, base: str, seed: str, stopping: threading.Event
) -> None:
    """Any question to anybody, one after the other, each answer judged."""
    rng = random.Random(seed)
    while not stopping.is_set():
        asked = random_ask(rng, base, random_uses(rng))
        moments = world.moments(asked.uses)
        answer = ask(client, asked.question.kind, asked.body, asked.leave)
        judge.answered(asked, moments, answer)
        if answer.status != 200:
            stopping.wait(_AGAIN_S)  # refusals cost nothing: they must not drown the others


def be_wrong(
    client: httpx.Client, judge: Judge, simple: tuple[Wrong, ...], broken: tuple[Wrong, ...], seed: str,
    stopping: threading.Event, pause_s: float,
) -> None:  # fmt: skip
    """What must be refused."""
    rng = random.Random(seed)
    while not stopping.wait(rng.uniform(0.2, 1.8) * pause_s):
        wrong = choose(rng, simple, broken)
        judge.count("broken adapters" if wrong in broken else "wrong requests")
        shown = {"asked": [wrong.method, wrong.path, wrong.content[:1000].decode(errors="replace")]}
        try:
            response = wrong.send(client)
        except httpx.HTTPError as error:
            judge.fail("broken answer", f"{wrong.name}: {error!r}", **shown)
            continue
        judge.status(response.status_code, wrong.name, **shown, answer=response.text[:1000])
        if problem := problem_of(wrong, response):
            judge.fail("not refused as documented", f"{wrong.name}: {problem}", **shown, answer=response.text[:1000])


def monitor(client: httpx.Client, judge: Judge, stopping: threading.Event, pause_s: float) -> None:
    """Scrapes, which must always be answered."""
    turn = 0
    while not stopping.wait(pause_s):
        path = _MONITORED[turn % len(_MONITORED)]
        turn += 1
        judge.count("scrapes")
        try:
            response = client.get(path)
        except httpx.HTTPError as error:
            judge.fail("broken answer", f"GET {path}: {error!r}")
            continue
        judge.status(response.status_code, f"GET {path}", answer=response.text[:1000])
        if response.status_code != 200:
            judge.fail("refused", f"GET {path}: HTTP {response.status_code}", answer=response.text[:1000])


def in_thread(name: str, function: Callable[[], None], judge: Judge) -> threading.Thread:
    """A daemon, so that one that hangs cannot keep the process; what it raises is a failure of the soak itself."""

    def run() -> None:
        try:
            function()
        except Exception as error:  # noqa: BLE001 - a client that died would otherwise only be quiet
            judge.fail("the soak itself", f"{name}: {error!r}")

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
