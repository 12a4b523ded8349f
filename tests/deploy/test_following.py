"""A real registry made to have what another one has."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from manylora.adapters.errors import AdapterSourceChanged
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.registry_state import StateEntry
from manylora.adapters.versions import LoadedAdapter
from manylora.deploy.ray_serve.fleet_state import FleetState, Merge
from manylora.deploy.ray_serve.following import follow, state_of
from manylora.server.engine.errors import MergeBusy


class Disk(dict[str, str]):
    """Sources and the versions they hold; ``loads`` counts."""

    loads = 0

    def load(self, source: str) -> LoadedAdapter:
        self.loads += 1
        if source not in self:
            raise FileNotFoundError(source)
        return LoadedAdapter(self[source], 1, None, object())


@dataclass
class Merged:
    name: str
    version: str
    mode: str
    automatic: bool = False


class Merges:
    def __init__(self) -> None:
        self.current: Merged | None = None
        self.made: list[tuple[str, str]] = []
        self.busy = False

    def merge(self, name: str, mode: str) -> None:
        if self.busy:
            raise MergeBusy
        self.made.append((name, mode))
        self.current = Merged(name, REGISTRY_VERSIONS[name], mode)

    def unmerge(self) -> None:
        self.made.append(("", ""))
        self.current = None


REGISTRY_VERSIONS = {"a": "v1", "b": "v2"}


def entry(name: str, version: str, pinned: bool = False, alias_of: str | None = None) -> StateEntry:
    return StateEntry(name, f"hub/{version}", pinned, version, alias_of)


@pytest.fixture
def disk() -> Disk:
    return Disk({"hub/v1": "v1", "hub/v2": "v2", "hub/v3": "v3"})


@pytest.fixture
def registry(disk: Disk) -> AdapterRegistry:
    return AdapterRegistry(disk.load)


def means(registry: AdapterRegistry) -> dict[str, tuple[str, bool]]:
    return {info.name: (info.version, info.pinned) for info in registry.list()}


def test_everything_is_loaded_changed_and_unloaded_as_the_state_says(disk: Disk, registry: AdapterRegistry) -> None:
    merges = Merges()
    first = FleetState.of([entry("a", "v1", pinned=True), entry("b", "v2"), entry("also-a", "v1", alias_of="a")])
    assert follow(first, registry, merges) == {}
    assert means(registry) == {"a": ("v1", True), "b": ("v2", False), "also-a": ("v1", False)}
    assert disk.loads == 2, "an alias loads nothing"
    assert state_of(registry, merges) == first
    assert follow(first, registry, merges) == {}
    assert disk.loads == 2, "what is had already is not loaded again"
    second = FleetState.of([entry("a", "v3"), entry("also-a", "v1", alias_of="a")])
    assert follow(second, registry, merges) == {}
    assert means(registry) == {"a": ("v3", False), "also-a": ("v1", False)}
    assert state_of(registry, merges) == second


def test_a_source_that_holds_something_else_by_now_is_not_taken_and_the_old_version_neither(
    disk: Disk, registry: AdapterRegistry
) -> None:
    merges = Merges()
    follow(FleetState.of([entry("a", "v1"), entry("b", "v2")]), registry, merges)
    disk["hub/v3"] = "retrained"
    wanted = FleetState.of([entry("a", "v3"), entry("b", "v2")])
    missing = follow(wanted, registry, merges)
    assert list(missing) == ["a"]
    assert "retrained" in missing["a"]
    assert means(registry) == {"b": ("v2", False)}
    assert state_of(registry, merges) == wanted, "or this replica's next change would take the name away everywhere"
    # Once the source is right again, it is had.
    disk["hub/v3"] = "v3"
    assert follow(wanted, registry, merges) == {}
    assert means(registry)["a"] == ("v3", False)


def test_files_that_are_gone_take_only_their_own_name(disk: Disk, registry: AdapterRegistry) -> None:
    del disk["hub/v1"]
    missing = follow(FleetState.of([entry("a", "v1"), entry("b", "v2")]), registry, Merges())
    assert list(missing) == ["a"]
    assert means(registry) == {"b": ("v2", False)}


def test_a_missing_name_can_be_unloaded(disk: Disk, registry: AdapterRegistry) -> None:
    del disk["hub/v1"]
    follow(FleetState.of([entry("a", "v1"), entry("b", "v2")]), registry, Merges())
    registry.unload("a")
    assert state_of(registry, Merges()) == FleetState.of([entry("b", "v2")])


def test_requests_that_run_finish_on_the_version_they_began_with(disk: Disk, registry: AdapterRegistry) -> None:
    follow(FleetState.of([entry("a", "v1")]), registry, Merges())
    ref = registry.acquire("a")
    follow(FleetState.of([entry("a", "v3")]), registry, Merges())
    assert registry.is_live("v1")
    registry.release(ref)
    assert not registry.is_live("v1")
    registry.check_integrity()


def test_what_was_loaded_on_demand_is_nobody_else_s_and_stays(disk: Disk, registry: AdapterRegistry) -> None:
    registry.load("folder", "hub/v3", remember=False)
    assert state_of(registry, Merges()) == FleetState()
    follow(FleetState.of([entry("a", "v1")]), registry, Merges())
    assert means(registry) == {"folder": ("v3", False), "a": ("v1", False)}


def test_the_registry_itself_says_what_is_wrong_with_a_source(disk: Disk, registry: AdapterRegistry) -> None:
    with pytest.raises(AdapterSourceChanged, match="v2"):
        registry.follow(replace(entry("a", "v1"), source="hub/v2"))
    assert means(registry) == {}
    assert registry.remembered() == [replace(entry("a", "v1"), source="hub/v2")]


def test_merges_are_followed_and_automatic_ones_left_alone(registry: AdapterRegistry) -> None:
    merges = Merges()
    adapters = [entry("a", "v1"), entry("b", "v2")]
    merged = FleetState.of(adapters, Merge("a", "v1", "exact"))
    follow(merged, registry, merges)
    follow(merged, registry, merges)
    assert merges.made == [("a", "exact")]
    assert state_of(registry, merges) == merged
    follow(FleetState.of(adapters, Merge("a", "v1", "compact")), registry, merges)
    follow(FleetState.of(adapters), registry, merges)
    assert merges.made == [("a", "exact"), ("a", "compact"), ("", "")]
    merges.current = Merged("b", "v2", "exact", automatic=True)
    assert state_of(registry, merges).merge is None
    follow(FleetState.of(adapters), registry, merges)
    assert merges.current is not None


def test_a_merge_that_cannot_be_had_keeps_no_adapter_from_being_served(registry: AdapterRegistry) -> None:
    merges = Merges()
    merges.busy = True
    assert follow(FleetState.of([entry("a", "v1")], Merge("a", "v1", "exact")), registry, merges) == {}
    assert means(registry) == {"a": ("v1", False)}
    # Of a version that the name does not mean there is none.
    merges.busy = False
    follow(FleetState.of([entry("a", "v1")], Merge("a", "v0", "exact")), registry, merges)
    assert merges.made == []
