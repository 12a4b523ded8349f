"""The server under test: whether it answers, and which models it lists."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import requests

from loadgen.errors import TargetError

_ASK_S = 10.0


@dataclass(frozen=True)
class Target:
    """A server, and what it serves: ``base`` is the listed model without a parent, ``adapters`` those with one.

    ``sources`` are where the adapters' weights came from, as the server names it (empty if it does not say)."""

    url: str
    base: str | None
    adapters: tuple[str, ...]
    sources: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        return (*((self.base,) if self.base else ()), *self.adapters)


def answers(url: str) -> bool:
    """Whether a server at ``url`` says that it is ready."""
    try:
        return bool(requests.get(f"{url}/ready", timeout=3).ok)
    except requests.RequestException:
        return False


def wait_for(url: str, seconds: float) -> None:
    """Until something answers at ``url``, whatever it answers: another server has another word for ready. TargetError
    after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            answer = requests.get(f"{url}/ready", timeout=3)
            if answer.status_code != 503:
                return
            problem = "is not ready"
        except requests.RequestException as error:
            problem = f"does not answer ({type(error).__name__})"
        if time.monotonic() >= deadline:
            raise TargetError(f"{url} {problem}; is the server running there?")
        time.sleep(0.2)


def look_at(url: str, headers: dict[str, str]) -> Target:
    """Ask for the models. TargetError if there is no such answer."""
    listed = _get(f"{url}/v1/models", headers)
    try:
        cards = [(str(card["id"]), card.get("parent"), str(card.get("root") or "")) for card in listed["data"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise TargetError(f"{url}/v1/models: expected a list of models ({error!r})") from None
    bases = [name for name, parent, _ in cards if parent is None]
    adapters = [(name, root) for name, parent, root in cards if parent is not None]
    return Target(
        url=url,
        base=bases[0] if bases else None,
        adapters=tuple(name for name, _ in adapters),
        sources=tuple(dict.fromkeys(root for _, root in adapters if root)),
    )


def _get(url: str, headers: dict[str, str]) -> Any:
    try:
        answer = requests.get(url, headers=headers, timeout=_ASK_S)
        answer.raise_for_status()
        return answer.json()
    except (requests.RequestException, ValueError) as error:
        raise TargetError(f"{url}: {error}") from None
