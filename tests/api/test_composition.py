"""Several adapters in one request: what reaches the engine, what is refused, and what the response says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.versions import AdapterRef
from manylora.server.api.state import Serving
from manylora.server.engine.engine import AdaptersNeverFit
from tests.api.fakes import FakeEngine, FakeTokenizer, write_adapter

BOTH = [{"name": "alice", "scale": 0.7}, {"name": "org/bob", "scale": 0.3}]


@pytest.fixture
def registry(serving: Serving, tmp_path: Path) -> AdapterRegistry:
    """Besides alice and org/bob: alice's content under another name, one with org/bob's chat template, one that cannot
    be composed."""
    assert isinstance(serving.registry, AdapterRegistry)
    serving.registry.load("also-alice", str(tmp_path / "alice"))
    serving.registry.load("carol", str(write_adapter(tmp_path / "carol", '{"template": 2}')))
    serving.registry.load("dora", str(write_adapter(tmp_path / "dora", "nonlinear")))
    return serving.registry


def post(client: TestClient, adapters: Any, **fields: Any) -> Any:
    return client.post("/v1/completions", json={"model": "base", "prompt": "Hi", "adapters": adapters, **fields})


def error_of(response: Any, status: int = 400) -> Any:
    assert response.status_code == status, response.text
    return response.json()["error"]


def fingerprint(client: TestClient, adapters: Any) -> str:
    response = post(client, adapters)
    assert response.status_code == 200, response.text
    return str(response.json()["system_fingerprint"])


def test_the_versions_and_scales_reach_the_engine(client: TestClient, engine: FakeEngine, serving: Serving) -> None:
    answer = post(client, BOTH, n=3).json()
    assert answer["model"] == "base"
    assert len(engine.requests) == 3
    for request in engine.requests:
        assert [(use.ref.name, use.scale) for use in request.adapters] == [("alice", 0.7), ("org/bob", 0.3)]
        assert request.adapters[0].ref.version == serving.registry.info("alice").version


@pytest.mark.parametrize("model", ["alice", "base:alice", "org/bob"])
def test_model_may_name_one_of_them(client: TestClient, engine: FakeEngine, model: str) -> None:
    assert post(client, BOTH, model=model).json()["model"] == model
    assert len(engine.requests[0].adapters) == 2


def test_model_naming_another_adapter_is_refused(client: TestClient, engine: FakeEngine, registry: object) -> None:
    error = error_of(post(client, BOTH, model="carol"))
    assert error["param"] == "adapters"
    assert error["message"] == (
        "`model` names `carol` and `adapters` names `alice`, `org/bob`: give the base's name (`base`) as `model`, or "
        "one of them."
    )
    assert engine.requests == []


def test_one_unknown_name_is_404_and_keeps_no_reference(client: TestClient, serving: Serving) -> None:
    error = error_of(post(client, [*BOTH, {"name": "nobody"}], n=4), 404)
    assert error["message"] == "The adapter `nobody` does not exist."
    assert error["param"] == "adapters"
    assert serving.registry.info("alice").requests_in_flight == 0


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ([], "`adapters` must name 1 to 8 adapters, got 0; for the base alone leave the field out."),
        ([{"name": f"a{i}"} for i in range(9)], "`adapters` must name 1 to 8 adapters, got 9"),
        ([{"name": "alice"}] * 2, "`adapters` names `alice` more than once: name it once, with the sum of its scales."),
    ],
)
def test_how_many_and_which(client: TestClient, adapters: Any, message: str) -> None:
    error = error_of(post(client, adapters))
    assert error["message"].startswith(message)
    assert error["param"] == "adapters"


@pytest.mark.parametrize("scale", [100.5, -101, "1", True, 1e300])
def test_a_bad_scale_is_named(client: TestClient, scale: Any) -> None:
    assert error_of(post(client, [BOTH[0], {"name": "org/bob", "scale": scale}]))["param"] == "adapters.1.scale"


@pytest.mark.parametrize(
    ("adapters", "what"),
    [
        ([{"name": "alice"}, {"name": "dora"}], "combined with others"),
        ([{"name": "dora", "scale": 0.5}], "rescaled (`scale` is 0.5)"),
        ([{"name": "dora", "scale": 0}], "rescaled (`scale` is 0)"),
    ],
)
def test_what_is_not_linear_is_served_alone_and_as_it_is(
    client: TestClient, engine: FakeEngine, registry: AdapterRegistry, adapters: Any, what: str
) -> None:
    error = error_of(post(client, adapters, n=2))
    assert error["param"] == "adapters"
    assert error["message"] == (
        f"`adapters`: `dora` cannot be {what}: its outputs are not linear in its scale. It is served alone, at scale 1."
    )
    assert engine.requests == []
    assert registry.counts().requests_in_flight == 0
    assert post(client, [{"name": "dora", "scale": 1}]).status_code == 200


def test_what_has_no_room_on_the_device_is_a_400_about_adapters(client: TestClient, engine: FakeEngine) -> None:
    engine.refuse = lambda request: AdaptersNeverFit("no room") if len(request.adapters) > 1 else None
    error = error_of(post(client, BOTH))
    assert (error["param"], error["message"]) == ("adapters", "no room")


def test_the_fingerprint_is_of_the_whole_composition(client: TestClient, registry: AdapterRegistry) -> None:
    plain = fingerprint(client, [{"name": "alice"}])
    assert plain == f"fp_ba5eba5e_{registry.info('alice').version[:12]}"
    others = [
        fingerprint(client, adapters)
        for adapters in (
            BOTH,
            [{"name": "alice", "scale": 0.3}, {"name": "org/bob", "scale": 0.7}],
            [{"name": "alice", "scale": 0.7}, {"name": "carol", "scale": 0.3}],
            [{"name": "alice", "scale": 0.7}],
            [{"name": "alice", "scale": 0.7000000000000001}],
            [{"name": "alice"}, {"name": "org/bob"}],
        )
    ]
    assert len({plain, *others}) == 7
    assert fingerprint(client, BOTH[::-1]) == others[0], "the order in which they are named changes nothing"


def test_two_names_of_one_version_are_one_adapter(client: TestClient, registry: AdapterRegistry) -> None:
    halves = [{"name": "alice", "scale": 0.5}, {"name": "also-alice", "scale": 0.5}]
    assert fingerprint(client, halves) == fingerprint(client, [{"name": "alice"}])


@pytest.mark.parametrize(
    ("names", "template"),
    [
        (["alice", "org/bob"], None),
        (["org/bob", "carol"], "[own template]"),
        (["org/bob", "carol", "alice"], None),
        (["carol"], "[own template]"),
    ],
)
def test_a_conversation_is_written_by_the_template_that_all_share(
    client: TestClient, serving: Serving, registry: AdapterRegistry, names: list[str], template: str | None
) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
    response = client.post("/v1/chat/completions", json={**body, "adapters": [{"name": name} for name in names]})
    assert response.status_code == 200, response.text
    assert isinstance(serving.tokenizer, FakeTokenizer)
    assert serving.tokenizer.templates[0]["chat_template"] == template


def test_all_choices_run_on_the_same_versions_of_all_adapters(
    client: TestClient, registry: AdapterRegistry, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second name is replaced by another thread just between two choices' references."""
    acquire, calls = registry.acquire, 0

    def acquire_with_a_race(name: str) -> AdapterRef:
        nonlocal calls
        calls += name == "carol"
        if calls == 2:
            registry.load("carol", str(write_adapter(tmp_path / "v2", "v2")), replace=True)
        return acquire(name)

    monkeypatch.setattr(registry, "acquire", acquire_with_a_race)
    assert post(client, [{"name": "alice"}, {"name": "carol"}], n=3).status_code == 200
    versions = {tuple(use.ref.version for use in request.adapters) for request in engine.requests}
    assert versions == {(registry.info("alice").version, registry.info("carol").version)}
    registry.check_integrity()
    assert registry.counts().requests_in_flight == 0


def test_a_choice_refused_in_the_middle_gives_every_reference_back(
    client: TestClient, registry: AdapterRegistry, engine: FakeEngine
) -> None:
    engine.refuse = lambda _request: AdaptersNeverFit("no more") if len(engine.requests) == 2 else None
    error_of(post(client, BOTH, n=4))
    assert len(engine.requests) == 2
    assert registry.counts().requests_in_flight == 0
    registry.check_integrity()
