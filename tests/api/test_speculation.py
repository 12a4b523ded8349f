"""``speculative_config``: what reaches the engine, and what a server takes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from manylora.server.config import ApiConfig
from tests.api.fakes import FakeEngine

ROUTES = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
}
TEXT = [1, 2, 3, 4, 5, 6, 1, 2, 3]


def ask(client: TestClient, route: str, **fields: Any) -> Any:
    return client.post(route, json={"model": "base", **ROUTES[route], **fields})


@pytest.mark.parametrize("route", ROUTES)
def test_each_choice_has_a_drafter_of_its_own(client: TestClient, engine: FakeEngine, route: str) -> None:
    assert ask(client, route, n=2, speculative_config={}).status_code == 200
    assert ask(client, route).status_code == 200
    first, second, without = [request.drafter for request in engine.requests]
    assert without is None
    assert first is not None
    assert second is not None
    assert first is not second
    assert first.propose(TEXT, [], 9) == [4, 5]


@pytest.mark.parametrize("route", ROUTES)
def test_its_numbers_are_the_drafters(client: TestClient, engine: FakeEngine, route: str) -> None:
    wanted = {"method": "ngram", "num_speculative_tokens": 1, "prompt_lookup_min": 4, "prompt_lookup_max": 4}
    assert ask(client, route, speculative_config=wanted).status_code == 200
    wanted |= {"prompt_lookup_min": 3}
    assert ask(client, route, speculative_config=wanted).status_code == 200
    four, three = [request.drafter for request in engine.requests]
    assert four is not None
    assert three is not None
    assert list(four.propose(TEXT, [], 9)) == []
    assert list(three.propose(TEXT, [], 9)) == [4]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("limit", "wanted", "param", "says"),
    [
        (0, {}, "speculative_config", "off on this server"),
        (3, {}, "speculative_config.num_speculative_tokens", "is 4; at most 3 are taken"),
        (8, {"num_speculative_tokens": 9}, "speculative_config.num_speculative_tokens", "is 9; at most 8"),
        (8, {"prompt_lookup_max": 1}, "speculative_config.prompt_lookup_min", "`prompt_lookup_max` (1)"),
        (8, {"method": "eagle"}, "speculative_config.method", "ngram"),
    ],
)
def test_what_is_refused(
    connect: Callable[..., TestClient],
    config: ApiConfig,
    engine: FakeEngine,
    route: str,
    limit: int,
    wanted: dict[str, Any],
    param: str,
    says: str,
) -> None:
    client = connect(replace(config, max_speculative_tokens=limit))
    answer = ask(client, route, speculative_config=wanted)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert engine.requests == []
