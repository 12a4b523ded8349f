"""Tenants: what each may use and see, that nothing tells of the rest, what it may use over time, and new key files."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from manylora.adapters import on_demand
from manylora.server.api.access.callers import NamePatterns
from manylora.server.api.access.keys import KeyRing
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig, ConfigError
from manylora.server.engine.tenant import EVERYBODY, Tenant
from manylora.server.tenants_file import hashed
from tests.api.fakes import FakeEngine, finish, write_adapter

Connect = Callable[..., TestClient]

FILE = """
[tenants.all]
adapters = ["*"]
[tenants.acme]
adapters = ["alice", "acme-*"]
share = 3.0
max_waiting = 5
[tenants.only]
adapters = ["org/*", "alice2"]
base = false
[tenants.none]
"""


def with_keys(text: str) -> str:
    """The file with a key for each tenant: its name with "-key"."""
    names = [line[len("[tenants.") : -1] for line in text.splitlines() if line.startswith("[tenants.")]
    return text + "".join(f'\n[[tenants.{n}.keys]]\nsha256 = "{hashed(n + "-key").hex()}"\n' for n in names)


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(with_keys(FILE))
    return path


@pytest.fixture
def tenants(config: ApiConfig, keys_file: Path) -> ApiConfig:
    return replace(config, keys_file=keys_file, admin_key="root")


def of(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {tenant}-key"}


ADMIN = {"Authorization": "Bearer root"}


def ask(client: TestClient, tenant: str, **fields: Any) -> Any:
    return client.post("/v1/completions", json={"model": "base", "prompt": "x", **fields}, headers=of(tenant))


USES: list[tuple[dict[str, Any], set[str]]] = [
    ({"model": "base"}, {"all", "acme", "none"}),
    ({"model": "alice"}, {"all", "acme"}),
    ({"model": "base:alice"}, {"all", "acme"}),
    ({"model": "org/bob"}, {"all", "only"}),
    ({"model": "base:org/bob"}, {"all", "only"}),
    ({"lora_path": "alice"}, {"all", "acme"}),
    ({"lora_path": "org/bob"}, {"all", "only"}),
    ({"adapters": [{"name": "alice"}]}, {"all", "acme"}),
    ({"adapters": [{"name": "alice"}, {"name": "org/bob"}]}, {"all"}),
    ({"model": "alice", "adapters": [{"name": "org/bob"}, {"name": "alice"}]}, {"all"}),
    # At scale 0, and near it, an adapter is the base.
    ({"adapters": [{"name": "alice", "scale": 0}]}, {"all", "acme"}),
    ({"adapters": [{"name": "org/bob", "scale": 0}]}, {"all"}),
    ({"adapters": [{"name": "org/bob", "scale": 0.5}]}, {"all"}),
    ({"adapters": [{"name": "org/bob", "scale": 1}]}, {"all", "only"}),
]


@pytest.mark.parametrize(("fields", "who"), USES, ids=[str(fields) for fields, _ in USES])
def test_who_may_use_what(connect: Connect, tenants: ApiConfig, fields: dict[str, Any], who: set[str]) -> None:
    client = connect(tenants)
    for tenant in ("all", "acme", "only", "none"):
        chat = {"model": "base", **fields, "messages": [{"role": "user", "content": "x"}]}
        answers = [
            ask(client, tenant, **fields),
            client.post("/v1/chat/completions", json=chat, headers=of(tenant)),
        ]
        for answer in answers:
            assert answer.status_code == (200 if tenant in who else 403), (tenant, answer.text)
            if tenant not in who:
                assert answer.json()["error"]["type"] == "PermissionDeniedError"
                assert answer.json()["error"]["param"] is not None
    assert client.post("/v1/completions", json={"model": "base", "prompt": "x", **fields}).status_code == 401


def test_tokens_take_the_same_permission(connect: Connect, tenants: ApiConfig) -> None:
    client = connect(tenants)
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [65]})):
        for tenant, model, status in (
            ("acme", None, 200),
            ("only", None, 403),
            ("only", "base", 403),
            ("only", "org/bob", 200),
            ("acme", "alice", 200),
            ("acme", "org/bob", 403),
            ("none", "alice", 403),
        ):
            answer = client.post(path, json={**body, "model": model}, headers=of(tenant))
            assert answer.status_code == status, (path, tenant, model)
    conversation = {"model": "org/bob", "messages": [{"role": "user", "content": "x"}]}
    assert client.post("/tokenize", json=conversation, headers=of("acme")).status_code == 403


def test_models_are_those_that_may_be_used(connect: Connect, tenants: ApiConfig, serving: Serving) -> None:
    client = connect(tenants)
    seen = {
        "all": ["base", "alice", "org/bob"],
        "acme": ["base", "alice"],
        "only": ["org/bob"],
        "none": ["base"],
    }
    for tenant, names in seen.items():
        listed = client.get("/v1/models", headers=of(tenant)).json()["data"]
        assert [one["id"] for one in listed] == names
        for name in ("base", "alice", "org/bob"):
            for asked in {name, f"base:{name}" if name != "base" else name}:
                answer = client.get(f"/v1/models/{asked}", headers=of(tenant))
                assert answer.status_code == (200 if name in names else 403), (tenant, asked)
        # The server's directories are no business of tenants.
        assert str(serving.registry.info("alice").source) not in client.get("/v1/models", headers=of(tenant)).text
    assert [one["id"] for one in client.get("/v1/models", headers=ADMIN).json()["data"]] == ["base", "alice", "org/bob"]


def test_what_is_kept_from_a_tenant_might_as_well_not_exist(connect: Connect, tenants: ApiConfig) -> None:
    """Letter by letter the same answers, but for the name that was asked for."""
    client = connect(tenants)

    def answers(name: str) -> list[tuple[int, str]]:
        conversation = {"messages": [{"role": "user", "content": "x"}]}
        given = [
            ask(client, "acme", model=name),
            ask(client, "acme", model=f"base:{name}"),
            ask(client, "acme", lora_path=name),
            ask(client, "acme", adapters=[{"name": "alice"}, {"name": name}]),
            ask(client, "acme", model="alice", adapters=[{"name": name}]),
            ask(client, "acme", model=name, lora_path="alice"),
            client.post("/v1/chat/completions", json={"model": name, **conversation}, headers=of("acme")),
            client.post("/tokenize", json={"model": name, "prompt": "x"}, headers=of("acme")),
            client.post("/detokenize", json={"model": name, "tokens": []}, headers=of("acme")),
            client.get(f"/v1/models/{name}", headers=of("acme")),
            client.get(f"/v1/models/base:{name}", headers=of("acme")),
            client.get(f"/v1/adapters/{name}", headers=of("acme")),
        ]
        assert all(answer.status_code in (400, 403) for answer in given)
        return [(answer.status_code, answer.text.replace(name, "NAME")) for answer in given]

    assert answers("org/bob") == answers("org/eve") == answers("nobody")
    # What one may use may be told apart.
    assert ask(client, "acme", model="acme-none").status_code == 404
    assert client.get("/v1/models/acme-none", headers=of("acme")).status_code == 404


def test_a_name_that_reads_two_ways_is_only_the_permitted_one(
    connect: Connect, tenants: ApiConfig, serving: Serving, engine: FakeEngine, tmp_path: Path
) -> None:
    """`base:alice` is the adapter of that whole name if there is one, and else `alice` on the base. Who may use
    `alice` alone must get that, whoever else has loaded the other."""
    serving.registry.load("base:alice", str(write_adapter(tmp_path / "theirs", '{"r": 99}')))
    client = connect(tenants)
    assert ask(client, "acme", model="base:alice").status_code == 200
    assert ask(client, "all", model="base:alice").status_code == 200
    assert [request.adapters[0].ref.name for request in engine.requests] == ["alice", "base:alice"]
    assert client.get("/v1/models/base:alice", headers=of("acme")).json()["root"] == "alice"
    assert client.get("/v1/models/base:alice", headers=of("only")).status_code == 403
    serving.registry.unload("alice")
    assert ask(client, "acme", model="base:alice").status_code == 404
    assert ask(client, "acme", lora_path="base:alice").status_code == 403


def test_an_alias_at_the_opposite_scale_is_the_base(connect: Connect, tenants: ApiConfig, serving: Serving) -> None:
    serving.registry.alias("org/bob2", "org/bob")
    two = [{"name": "org/bob", "scale": 1}, {"name": "org/bob2", "scale": -1}]
    client = connect(tenants)
    assert ask(client, "all", adapters=two).status_code == 200
    assert ask(client, "only", adapters=two).status_code == 403


def test_nothing_is_loaded_for_those_who_may_not_use_it(
    connect: Connect, tenants: ApiConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("acme-new", "their-new", "base:acme-new"):
        write_adapter(tmp_path / "roots" / name)
    looked: list[str] = []
    find = on_demand.OnDemand.find

    def finding(self: on_demand.OnDemand, name: str) -> Path | None:
        looked.append(name)
        return find(self, name)

    monkeypatch.setattr(on_demand.OnDemand, "find", finding)
    client = connect(replace(tenants, adapter_roots=(tmp_path / "roots",), adapters_on_demand=10))
    for name in ("their-new", "their-none", "../keys.toml", "acme/../their-new"):
        assert ask(client, "acme", model=name).status_code == 403
    assert looked == []
    assert ask(client, "acme", model="base:acme-new").status_code == 200
    assert ask(client, "acme", model="acme-/../their-new").status_code == 404
    assert looked == ["acme-new", "acme-/../their-new"]


def test_patterns_of_names() -> None:
    patterns = NamePatterns(["acme-*", "a?c", "x.y", "org/*/v?"])
    for name in ("acme-", "acme-1", "acme-a/b", "abc", "x.y", "org/a/v1", "org/a/b/v1"):
        assert patterns.match(name), name
    for name in ("acme", "Acme-1", "xacme-1", "ac", "abbc", "xzy", "org/v1", "", "abc\n", "acme-" + "x" * 200):
        assert not patterns.match(name), name
    assert not NamePatterns([]).match("")
    assert not NamePatterns([]).match("a")
    # Many stars over a long name: in no time, or this test times out.
    assert not NamePatterns(["*a" * 60 + "b"]).match("a" * 128)


def test_the_engine_knows_whose_request_it_is(connect: Connect, tenants: ApiConfig, engine: FakeEngine) -> None:
    client = connect(replace(tenants, api_keys=("mine",)))
    assert ask(client, "acme").status_code == 200
    for key in ("mine", "root"):
        body = {"model": "base", "prompt": "x", "priority": -9}
        assert client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert [request.tenant for request in engine.requests] == [Tenant("acme", 3.0, 5), EVERYBODY, EVERYBODY]


# --- limits over time ------------------------------------------------------------------------------------------------

SLOW = """
[tenants.slow]
adapters = ["*"]
requests_per_second = 0.01
burst = 4
[tenants.other]
requests_per_second = 0.01
burst = 1
"""


@pytest.fixture
def slow(config: ApiConfig, keys_file: Path) -> ApiConfig:
    keys_file.write_text(with_keys(SLOW))
    return replace(config, keys_file=keys_file, admin_key="root", api_keys=("mine",))


def test_requests_a_second(connect: Connect, slow: ApiConfig, engine: FakeEngine) -> None:
    client = connect(slow)
    assert [ask(client, "slow").status_code for _ in range(4)] == [200] * 4
    refused = ask(client, "slow")
    assert refused.status_code == 429
    assert 90 <= int(refused.headers["retry-after"]) <= 100
    error = refused.json()["error"]
    assert error["type"] == "RateLimitError"
    assert "0.01 requests a second and 4 at once" in error["message"]
    assert len(engine.requests) == 4
    # Everything that computes is counted, and refused before its body is read; looking is free.
    assert client.post("/tokenize", content=b"{", headers=of("slow")).status_code == 429
    assert client.get("/v1/models", headers=of("slow")).status_code == 200
    # Nobody else is.
    assert ask(client, "other").status_code == 200
    assert ask(client, "other").status_code == 429
    for key in ("mine", "root"):
        for _ in range(6):
            body = {"model": "base", "prompt": "x"}
            answer = client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 200


def test_each_choice_counts(connect: Connect, slow: ApiConfig, engine: FakeEngine) -> None:
    client = connect(slow)
    assert ask(client, "slow", n=3).status_code == 200
    assert ask(client, "slow", n=2).status_code == 429
    assert len(engine.requests) == 3
    assert ask(client, "slow").status_code == 429  # the first of the two was paid for


def test_more_choices_than_ever(connect: Connect, slow: ApiConfig, engine: FakeEngine) -> None:
    """To come again later would not help, so it is not a 429."""
    refused = ask(connect(slow), "slow", prompt=["a", "b", "c"], n=2)
    assert refused.status_code == 400
    assert "6 choices" in refused.json()["error"]["message"]
    assert engine.requests == []


def test_wrong_keys_and_refused_names_cost_what_they_cost(connect: Connect, slow: ApiConfig) -> None:
    client = connect(slow)
    for _ in range(20):
        wrong = {"Authorization": "Bearer slow-kex"}
        assert client.post("/v1/completions", json={"model": "base", "prompt": "x"}, headers=wrong).status_code == 401
    assert [ask(client, "slow", model="nobody").status_code for _ in range(5)] == [404, 404, 404, 404, 429]


# --- new key files ---------------------------------------------------------------------------------------------------


def keyring(client: TestClient) -> KeyRing:
    ring: KeyRing = client.app.state.manylora.keys  # type: ignore[attr-defined]
    return ring


def test_a_new_file_counts_at_once(connect: Connect, slow: ApiConfig, keys_file: Path, serving: Serving) -> None:
    client = connect(slow)
    assert [ask(client, "slow").status_code for _ in range(5)] == [200, 200, 200, 200, 429]
    text = with_keys("[tenants.slow]\nadapters = ['alice']\nrequests_per_second = 0.01\nburst = 6\n[tenants.new]\n")
    keys_file.write_text(text)
    assert ask(client, "new").status_code == 401  # not before it is told
    asyncio.run(keyring(client).reload())
    assert ask(client, "new").status_code == 200
    assert ask(client, "other").status_code == 401
    assert keyring(client).tenants == {"slow", "new"}
    # What was used stays used: a reload gives two more, not six.
    assert ask(client, "slow", model="org/bob").status_code == 403
    assert [ask(client, "slow").status_code for _ in range(2)] == [200, 429]
    assert serving.metrics.tenants == [{"slow", "new"}]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text", ["[tenants.slow", "[tenants.slow]\nbase = 3", with_keys("[tenants.root]").replace("sha", "sha3"), None]
)
def test_a_bad_file_changes_nothing(connect: Connect, slow: ApiConfig, keys_file: Path, text: str | None) -> None:
    client = connect(slow)
    if text is None:
        keys_file.unlink()
    else:
        keys_file.write_text(text)
    with pytest.raises(ConfigError, match=r"^--keys: .*keys\.toml"):
        asyncio.run(keyring(client).reload())
    assert ask(client, "slow").status_code == 200


def test_a_new_file_cannot_take_the_admin_key(connect: Connect, slow: ApiConfig, keys_file: Path) -> None:
    client = connect(slow)
    keys_file.write_text(f'[[tenants.slow.keys]]\nsha256 = "{hashed("root").hex()}"\n')
    with pytest.raises(ConfigError, match=r"one of them is also --admin-key"):
        asyncio.run(keyring(client).reload())
    assert client.get("/v1/adapters", headers=ADMIN).status_code == 200


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_no_key_gets_into_a_log_or_an_answer(
    connect: Connect, slow: ApiConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    client = connect(replace(slow, admin_key="the-admin-secret", api_keys=("the-api-secret",)))
    text = ""
    for key in ("slow-key", "the-api-secret", "the-admin-secret", "a-wrong-secret"):
        for path in ("/v1/models", "/v1/adapters", "/nowhere", "/v1/models/nobody", "/metrics", "/openapi.json"):
            answer = client.get(path, headers={"Authorization": f"Bearer {key}"})
            text += answer.text + str(answer.headers)
        for scheme in ("Bearer", "Basic", ""):
            for body in ({"model": "base", "prompt": "x"}, {"model": "x"}, {}):
                answer = client.post("/v1/completions", json=body, headers={"Authorization": f"{scheme} {key}"})
                text += answer.text + str(answer.headers)
    for secret in ("slow-key", "the-api-secret", "the-admin-secret", "a-wrong-secret", hashed("slow-key").hex()):
        assert secret not in text
        assert secret not in caplog.text
    assert "secret" not in repr(slow) + repr(client.app.state.manylora)  # type: ignore[attr-defined]


def test_odd_keys(connect: Connect, slow: ApiConfig) -> None:
    client = connect(slow)
    body = {"model": "base", "prompt": "x"}

    def status(*values: str | bytes) -> int:
        headers: Any = [("Authorization", value) for value in values]
        return client.post("/v1/completions", json=body, headers=headers).status_code

    assert status("Bearer slow-key") == 200
    for value in (
        "",
        "Bearer",
        "Bearer ",
        "Bearer slow-key,slow-key",
        "Bearer slow-key slow-key",
        "Bearer Slow-key",
        "Bearer slow-key\u00a0".encode("latin-1"),
        "Bearer " + hashed("slow-key").hex(),
        "Bearer " + "k" * 100_000,
        "Bearer \u00ff".encode("latin-1"),
        "Bearer slow",
        "Token slow-key",
        "slow-key",
    ):
        assert status(value) == 401, value
    # A proxy before the server may have checked another one than we would.
    assert status("Bearer slow-key", "Bearer wrong") == 400
    assert status("Bearer wrong", "Bearer slow-key") == 400
    assert client.post("/v1/completions?api_key=slow-key", json=body).status_code == 401


def test_what_is_wrong_with_an_adapter_is_the_operators_to_know(
    connect: Connect, tenants: ApiConfig, tmp_path: Path, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """It names files of the machine."""
    write_adapter(tmp_path / "roots" / "broken", "bad")
    client = connect(replace(tenants, adapter_roots=(tmp_path / "roots",), adapters_on_demand=5))
    refused = ask(client, "all", model="broken")
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "The adapter cannot be served."
    assert "is refused" in caplog.text
    told = client.post("/v1/completions", json={"model": "broken", "prompt": "x"}, headers=ADMIN)
    assert "it is bad" in told.json()["error"]["message"]

    gone = f"{tmp_path} held another version."
    engine.script = lambda request: [[replace(finish(request, "error", error=gone), is_unavailable=True)]]
    for stream in (False, True):
        unavailable = ask(client, "all", model="alice", stream=stream)
        assert unavailable.status_code == 503
        assert str(tmp_path) not in unavailable.text
    assert gone in client.post("/v1/completions", json={"model": "alice", "prompt": "x"}, headers=ADMIN).text
