"""More adapters than fit into host memory, and fewer still on the device: a real server, and what each one answers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.e2e.adapters import host_bytes, write_adapter
from tests.e2e.server_process import (
    Answer,
    Server,
    adapters_by_name,
    complete,
    demo_flags,
    greedy,
    put_adapter,
    serving,
    wait_for,
)

NAMES = tuple(f"adapter-{i}" for i in range(6))
PROMPT, LENGTH = "The best way to cook an egg is", 6


@dataclass
class Setup:
    server: Server
    client: httpx.Client
    watched: Path
    roots: Path

    def ask(self, name: str) -> Answer:
        return complete(self.client, greedy(name, PROMPT, LENGTH))

    def tiers(self) -> dict[str, str]:
        return {name: one["tier"] for name, one in adapters_by_name(self.client).items()}

    def metric(self, line: str) -> float:
        text = self.client.get("/metrics").text
        return float(next(found for found in text.splitlines() if found.startswith(line + " ")).rpartition(" ")[2])


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> Iterator[Setup]:
    """Six adapters, of which three are in host memory and two on the device."""
    tmp_path = tmp_path_factory.mktemp("tiers")
    watched, roots = tmp_path / "watched", tmp_path / "roots"
    for i, name in enumerate(NAMES):
        write_adapter(watched / name, seed=i)
    roots.mkdir()
    flags = [
        *("--max-device-adapters", "2", "--max-host-adapters", "3", "--state-dir", str(tmp_path / "state")),
        *("--adapter-dir", str(watched), "--watch", "0.2", "--adapter-root", str(roots), "--adapters-on-demand"),
    ]
    with (
        serving(tmp_path / "log", *demo_flags(base_cache), *flags) as server,
        server.client() as client,
    ):
        yield Setup(server, client, watched, roots)


def test_all_are_reachable_and_answer_as_themselves(setup: Setup) -> None:
    answers = {name: setup.ask(name) for name in NAMES}
    assert {answer.status for answer in answers.values()} == {200}
    assert len({answer.text for answer in answers.values()}) == len(NAMES)
    for name, described in adapters_by_name(setup.client).items():
        assert described["version"].startswith(answers[name].version)
    with ThreadPoolExecutor(6) as clients:
        for _ in range(3):
            for name, answer in zip(NAMES, clients.map(setup.ask, NAMES), strict=True):
                assert answer == answers[name], "by whatever way it came to the device"
    tiers = list(setup.tiers().values())
    assert tiers.count("device") == 2
    assert tiers.count("disk") >= 1
    assert setup.metric("manylora_host_adapters") <= 3
    assert setup.metric("manylora_host_adapter_bytes") <= 3 * host_bytes(4)
    hits, misses = (
        setup.metric(f'manylora_adapter_lookups_total{{result="{r}",tier="host"}}') for r in ("hit", "miss")
    )
    assert hits + misses >= 6
    assert setup.metric("manylora_host_read_seconds_count") >= 3


def test_files_that_changed_end_in_an_error_that_says_so(setup: Setup, tmp_path: Path) -> None:
    source = write_adapter(setup.roots / "elsewhere", seed=20)
    other = write_adapter(tmp_path / "other", seed=21)
    put_adapter(setup.client, "mine", source)
    before = setup.ask("mine")
    for name in NAMES:
        setup.ask(name)
    assert setup.tiers()["mine"] == "disk"
    shutil.copy(other / "adapter_model.safetensors", source)
    failed = setup.ask("mine")
    assert failed.status == 503
    assert "can no longer be read" in failed.body
    assert str(source) in failed.body
    assert setup.ask(NAMES[0]).status == 200
    put_adapter(setup.client, "mine", source)
    after = setup.ask("mine")
    assert after.status == 200
    assert after.version != before.version
    setup.client.delete("/v1/adapters/mine")


def test_an_alias_answers_as_what_it_stands_for(setup: Setup) -> None:
    expected = setup.ask(NAMES[1])
    put = setup.client.put("/v1/adapters/prod", json={"alias_of": NAMES[1]})
    assert put.status_code == 201
    assert put.json()["tier"] == "device"
    assert setup.ask("prod") == expected
    setup.client.delete("/v1/adapters/prod")
    assert setup.ask(NAMES[1]) == expected


def test_watched_folders_come_change_and_go(setup: Setup, tmp_path: Path) -> None:
    staged = write_adapter(tmp_path / "staged", seed=10)
    folder = setup.watched / "late"
    assert setup.ask("late").status == 404
    staged.rename(folder)
    wait_for(lambda: setup.ask("late").status == 200, what="the new folder to be loaded")
    first = setup.ask("late")
    changed = write_adapter(tmp_path / "changed", seed=11)
    shutil.copy(changed / "adapter_model.safetensors", folder)
    wait_for(lambda: setup.ask("late").version != first.version, what="the changed folder to be loaded")
    shutil.rmtree(folder)
    wait_for(lambda: setup.ask("late").status == 404, what="the folder's adapter to be unloaded")
    said = setup.server.log_text()
    assert said.count("adapter late is loaded") == said.count("adapter late is replaced") == 1
    assert said.count("adapter late is unloaded") == 1


def test_named_on_demand(setup: Setup) -> None:
    write_adapter(setup.roots / "team" / "frank", seed=12)
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(setup.ask, ["team/frank"] * 4))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert setup.ask("team/nobody").status == 404
    assert setup.ask("../watched/adapter-0").status == 404
