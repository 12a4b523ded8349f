"""The registry: names, versions, references, restarts, and the races between them. Torch-free."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from manylora.adapters.errors import (
    AdapterExists,
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterRefused,
    RegistryStateError,
)
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.versions import AdapterRef, LoadedAdapter, RegistryCounts


class Disk:
    """Sources and what they contain now; ``load`` reads them. Every load is a new payload object."""

    def __init__(self, **content: str) -> None:
        self.content = content
        self.loads: list[str] = []
        self.freed: list[AdapterRef] = []
        self.retired: list[AdapterRef] = []

    def load(self, source: str) -> LoadedAdapter:
        self.loads.append(source)
        version = self.content.get(source)
        if version is None:
            raise AdapterRefused(source, ["it is gone"])
        return LoadedAdapter(version=version, nbytes=10, report=f"report of {version}", weights=object())

    def registry(self, **kwargs: Any) -> AdapterRegistry:
        return AdapterRegistry(self.load, on_freed=self.freed.append, on_retired=self.retired.append, **kwargs)


def test_no_torch() -> None:
    code = "import sys, manylora.adapters.registry, manylora.adapters.slots; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_load_acquire_release() -> None:
    disk = Disk(src="v1")
    registry = disk.registry()
    info = registry.load("a", "src")
    assert (info.name, info.version, info.source, info.state) == ("a", "v1", "src", "ready")
    assert (info.requests_in_flight, info.nbytes, info.pinned, info.last_used) == (0, 10, False, None)
    assert info.report == "report of v1"
    ref = registry.acquire("a")
    assert registry.acquire("a") is ref
    assert registry.info("a").requests_in_flight == 2
    assert registry.info("a").last_used is not None
    registry.release(ref)
    registry.release(ref)
    assert disk.freed == [], "a named version stays"
    assert registry.counts() == RegistryCounts(ready=1, draining=0, requests_in_flight=0, nbytes=10)


def test_unknown_names() -> None:
    registry = Disk().registry()
    for call in (registry.acquire, registry.unload, registry.info):
        with pytest.raises(AdapterNotFound, match="`nobody`"):
            call("nobody")
    with pytest.raises(AdapterNotFound):
        registry.pin("nobody", True)


def test_unload_is_at_once_and_frees_after_the_last_request() -> None:
    disk = Disk(src="v1")
    registry = disk.registry()
    registry.load("a", "src")
    ref = registry.acquire("a")
    registry.unload("a")
    with pytest.raises(AdapterNotFound):
        registry.acquire("a")
    assert registry.list() == []
    assert [info.state for info in registry.list(draining=True)] == ["draining"]
    assert disk.freed == []
    registry.release(ref)
    assert disk.freed == [ref]
    assert registry.counts() == RegistryCounts(0, 0, 0, 0)
    registry.check_integrity()


def test_unload_of_an_idle_adapter_frees_at_once() -> None:
    disk = Disk(src="v1")
    registry = disk.registry()
    registry.load("a", "src")
    registry.unload("a")
    assert [ref.version for ref in disk.freed] == ["v1"]


def test_release_without_acquire() -> None:
    registry = Disk(src="v1").registry()
    registry.load("a", "src")
    ref = registry.acquire("a")
    registry.release(ref)
    with pytest.raises(RuntimeError, match="released more than acquired"):
        registry.release(ref)


def test_replace_under_load() -> None:
    disk = Disk(src="v1", new="v2")
    registry = disk.registry()
    registry.load("a", "src", pinned=True)
    old = registry.acquire("a")
    info = registry.load("a", "new", replace=True)
    assert info.pinned, "a pin survives being replaced"
    new = registry.acquire("a")
    assert (old.version, new.version) == ("v1", "v2")
    assert [i.version for i in registry.list(draining=True)] == ["v2", "v1"]
    assert registry.is_pinned(new.version)
    assert not registry.is_pinned(old.version)
    registry.release(old)
    assert disk.freed == [old]
    registry.release(new)
    assert disk.freed == [old]


def test_existing_name() -> None:
    disk = Disk(src="v1", new="v2")
    registry = disk.registry()
    registry.load("a", "src")
    with pytest.raises(AdapterExists):
        registry.load("a", "new")
    assert registry.info("a").version == "v1"


def test_replace_by_equal_content_changes_nothing_but_source_and_pin() -> None:
    disk = Disk(src="v1", moved="v1")
    registry = disk.registry()
    registry.load("a", "src")
    ref = registry.acquire("a")
    info = registry.load("a", "moved", replace=True, pinned=True)
    assert (info.version, info.source, info.pinned, info.requests_in_flight) == ("v1", "moved", True, 1)
    assert registry.acquire("a") is ref
    assert disk.freed == []


def test_reload_of_a_draining_version_takes_it_back() -> None:
    disk = Disk(src="v1")
    registry = disk.registry()
    registry.load("a", "src")
    ref = registry.acquire("a")
    registry.unload("a")
    registry.load("a", "src")
    assert registry.acquire("a") is ref
    registry.release(ref)
    registry.release(ref)
    assert disk.freed == []
    registry.check_integrity()


def test_going_back_and_forth_between_versions() -> None:
    disk = Disk(one="v1", two="v2")
    registry = disk.registry()
    registry.load("a", "one")
    first = registry.acquire("a")
    registry.load("a", "two", replace=True)
    registry.load("a", "one", replace=True)
    assert [ref.version for ref in disk.freed] == ["v2"]
    assert registry.acquire("a") is first
    registry.check_integrity()


def test_two_names_of_equal_content_are_one_version() -> None:
    disk = Disk(src="v1", copy="v1")
    registry = disk.registry()
    registry.load("a", "src")
    registry.load("b", "copy")
    assert registry.counts() == RegistryCounts(ready=2, draining=0, requests_in_flight=0, nbytes=10)
    assert registry.sources("v1") == ("src", "copy")
    a, b = registry.acquire("a"), registry.acquire("b")
    assert (a.version, a.source, b.version, b.source) == ("v1", "src", "v1", "copy")
    assert a != b
    registry.unload("a")
    assert registry.sources("v1") == ("copy", "src"), "a name's before a draining request's"
    registry.release(a)
    assert disk.retired == [a]
    assert disk.freed == []
    assert registry.is_live("v1")
    registry.unload("b")
    assert registry.is_live("v1")
    registry.release(b)
    assert disk.retired == [a, b]
    assert disk.freed == [b], "freed once, with the last of its names"
    assert not registry.is_live("v1")
    registry.check_integrity()


def test_references_are_counted_by_name() -> None:
    registry = Disk(src="v1").registry()
    registry.load("a", "src")
    registry.load("b", "src")
    ref = registry.acquire("a")
    assert (registry.info("a").requests_in_flight, registry.info("b").requests_in_flight) == (1, 0)
    with pytest.raises(RuntimeError, match="released more than acquired"):
        registry.release(AdapterRef("b", "v1"))
    registry.release(ref)


def test_pins_and_keeping() -> None:
    registry = Disk(src="v1", new="v2").registry()
    registry.load("a", "src")
    registry.load("b", "src")
    assert not registry.is_pinned("v1")
    assert not registry.must_keep("v1")
    registry.pin("b", True)
    assert registry.is_pinned("v1"), "by any of its names"
    assert registry.must_keep("v1")
    registry.unload("b")
    assert not registry.must_keep("v1")
    ref = registry.acquire("a")
    assert not registry.must_keep("v1"), "it can be read again"
    registry.load("a", "new", replace=True)
    assert registry.must_keep("v1"), "it was replaced, and its files may be gone"
    registry.release(ref)
    assert not registry.must_keep("v1")


def test_what_requests_need_is_in_the_reference() -> None:
    def load(source: str) -> LoadedAdapter:
        return LoadedAdapter("v1", 10, None, object(), {"q": 2}, "it is a DoRA", "template")

    registry = AdapterRegistry(load)
    registry.load("a", "src")
    registry.alias("b", "a")
    for name in "ab":
        ref = registry.acquire(name)
        assert (ref.name, ref.footprint, ref.nbytes) == (name, {"q": 2}, 10)
        assert (ref.not_composable, ref.chat_template) == ("it is a DoRA", "template")


# --- aliases ---------------------------------------------------------------------------------------------------------


def test_an_alias_is_a_version_and_stays_one() -> None:
    disk = Disk(src="v1", new="v2")
    registry = disk.registry()
    registry.load("a", "src")
    loads = len(disk.loads)
    info = registry.alias("prod", "a")
    assert (info.name, info.version, info.source, info.alias_of) == ("prod", "v1", "src", "a")
    assert len(disk.loads) == loads, "nothing is loaded"
    registry.load("a", "new", replace=True)
    assert registry.info("prod").version == "v1", "replacing the other does not move it"
    registry.unload("a")
    assert registry.acquire("prod").version == "v1"
    assert [ref.version for ref in disk.freed] == ["v2"]
    registry.check_integrity()


def test_aliases_that_are_refused() -> None:
    registry = Disk(src="v1").registry(reserved=["base"])
    registry.load("a", "src")
    registry.load("taken", "src")
    with pytest.raises(AdapterNotFound, match="`nobody`"):
        registry.alias("b", "nobody")
    with pytest.raises(AdapterExists):
        registry.alias("taken", "a")
    for name in ("a", "base", "a b"):
        with pytest.raises(AdapterNameInvalid):
            registry.alias(name, "a", replace=True)
    assert registry.alias("taken", "a", replace=True, pinned=True).pinned


def test_aliases_survive_a_restart_as_the_version_they_were_given(tmp_path: Path) -> None:
    disk, state = Disk(src="v1", new="v2"), tmp_path / "state.json"
    registry = disk.registry(state_path=state)
    registry.load("zz", "src")
    registry.alias("b", "zz", pinned=True)
    again = disk.registry(state_path=state)
    disk.loads.clear()
    assert again.restore() == []
    assert disk.loads == ["src"], "the alias needs no load of its own"
    info = again.info("b")
    assert (info.version, info.alias_of, info.pinned) == ("v1", "zz", True)
    again.load("zz", "new", replace=True)
    third = disk.registry(state_path=state)
    assert third.restore() == []
    assert (third.info("zz").version, third.info("b").version) == ("v2", "v1"), "read from where it came from"
    disk.content["src"] = "changed"
    fourth = disk.registry(state_path=state)
    ((name, error),) = fourth.restore()
    assert name == "b"
    assert "src held version v1 when it was loaded, and holds version changed now" in error
    remembered = {entry["name"]: entry for entry in json.loads(state.read_text())["adapters"]}
    assert remembered["b"]["alias_of"] == "zz"


def test_what_is_not_to_be_remembered_is_not(tmp_path: Path) -> None:
    disk, state = Disk(src="v1"), tmp_path / "state.json"
    registry = disk.registry(state_path=state)
    registry.load("a", "src", remember=False)
    assert not state.exists()
    registry.load("b", "src")
    registry.load("b", "src", replace=True, remember=False)
    assert json.loads(state.read_text())["adapters"] == []
    registry.pin("a", True)
    assert [entry["name"] for entry in json.loads(state.read_text())["adapters"]] == ["a"], "somebody asked for it"


def test_sources_in_use(tmp_path: Path) -> None:
    disk, state = Disk(one="v1", two="v2", three="v3"), tmp_path / "state.json"
    disk.registry(state_path=state).load("unrestored", "three")
    registry = disk.registry(state_path=state)
    registry.load("a", "one")
    ref = registry.acquire("a")
    registry.load("a", "two", replace=True)
    assert registry.sources_in_use() == {"one", "two", "three"}
    registry.release(ref)
    registry.unload("unrestored")
    assert registry.sources_in_use() == {"two"}


# --- host memory -----------------------------------------------------------------------------------------------------


class Store:
    """What HostTier does for the registry."""

    def __init__(self) -> None:
        self.kept: set[str] = set()

    def put(self, version: str, weights: Any, nbytes: int) -> None:
        self.kept.add(version)

    def drop(self, version: str) -> None:
        self.kept.discard(version)


def test_weights_go_to_the_host_tier_and_leave_it_with_their_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, store = Disk(src="v1", new="v2"), Store()
    registry = disk.registry(host=store, state_path=tmp_path / "state.json")
    registry.load("a", "src")
    registry.load("b", "src")
    ref = registry.acquire("a")
    assert store.kept == {"v1"}
    registry.unload("a")
    registry.unload("b")
    assert store.kept == {"v1"}
    registry.release(ref)
    assert store.kept == set()
    registry.load("a", "src")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RegistryStateError):
        registry.load("b", "src")
    with pytest.raises(RegistryStateError):
        registry.load("c", "new")
    assert store.kept == {"v1"}, "what could not be recorded is not kept, unless others have it"


def test_failed_replace_leaves_the_old_version_serving() -> None:
    disk = Disk(src="v1")
    registry = disk.registry()
    registry.load("a", "src")
    with pytest.raises(AdapterRefused):
        registry.load("a", "gone", replace=True)
    assert registry.acquire("a").version == "v1"
    with pytest.raises(AdapterRefused):
        registry.load("b", "gone")
    with pytest.raises(AdapterNotFound):
        registry.acquire("b")
    registry.check_integrity()


@pytest.mark.parametrize("name", ["a", "Llama-3:sql", "org/adapter_v1.2", "0", "x" * 128])
def test_names_that_are_allowed(name: str) -> None:
    assert Disk(src="v1").registry().load(name, "src").name == name


@pytest.mark.parametrize("name", ["", "x" * 129, "-a", "/a", "a b", "a\n", "é", "a@b", "a\0", "base", ".."])
def test_names_that_are_not(name: str) -> None:
    with pytest.raises(AdapterNameInvalid, match="cannot be an adapter's name"):
        Disk(src="v1").registry(reserved=["base"]).load(name, "src")


def test_acquire_while_a_slow_load_runs() -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow(source: str) -> LoadedAdapter:
        if source == "slow":
            started.set()
            assert go_on.wait(10)
        return LoadedAdapter(source, 1, None, None)

    registry = AdapterRegistry(slow)
    registry.load("a", "v1")
    loader = threading.Thread(target=registry.load, args=("a", "slow"), kwargs={"replace": True})
    loader.start()
    assert started.wait(10)
    assert registry.acquire("a").version == "v1"
    registry.load("b", "v1")
    registry.unload("b")
    go_on.set()
    loader.join()
    assert registry.acquire("a").version == "slow"


def test_concurrent_loads_of_a_name_do_not_interleave() -> None:
    running = Counter[str]()
    most = 0

    def load(source: str) -> LoadedAdapter:
        nonlocal most
        running["now"] += 1
        most = max(most, running["now"])
        threading.Event().wait(0.002)
        running["now"] -= 1
        return LoadedAdapter(source, 1, None, None)

    registry = AdapterRegistry(load)
    outcomes: list[str] = []

    def attempt(i: int) -> None:
        try:
            outcomes.append(registry.load("a", f"v{i}").version)
        except AdapterExists:
            outcomes.append("exists")

    _run_all([partial(attempt, i) for i in range(8)])
    assert most == 1
    assert outcomes.count("exists") == 7
    assert len(registry._name_locks) == 0


class InterruptingLock:
    """Stands in for the registry's lock: after the ``n``-th time it is let go, ``interrupt`` happens, once."""

    def __init__(self, lock: threading.Lock, n: int, interrupt: Callable[[], object]) -> None:
        self.lock, self.left, self.interrupt = lock, n, interrupt

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        self.left -= 1
        if self.left == 0:
            self.interrupt()


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("other", ["unload", "replace"])
@pytest.mark.parametrize("interrupted", ["acquire", "release"])
def test_no_moment_within_acquire_or_release_is_unsafe(interrupted: str, other: str, n: int) -> None:
    """Another thread's unload or replace, put at each point where ``acquire`` or ``release`` holds no lock."""
    disk = Disk(src="v1", new="v2")
    registry = disk.registry()
    registry.load("a", "src")
    plain = registry._lock

    def interrupt() -> None:
        if other == "unload":
            registry.unload("a")
        else:
            registry.load("a", "new", replace=True)

    def interruptible(name: str) -> Any:
        return InterruptingLock(plain, n, interrupt) if name == interrupted else plain

    registry._lock = interruptible("acquire")
    ref = registry.acquire("a")
    assert ref.version == "v1"
    assert ref not in disk.freed, "freed under a request that was just admitted"
    registry._lock = interruptible("release")
    registry.release(ref)
    registry._lock = plain
    registry.check_integrity()
    if registry.list():
        registry.unload("a")
    assert registry.counts() == RegistryCounts(0, 0, 0, 0)
    assert set(Counter(disk.freed).values()) == {1}


@pytest.mark.parametrize("seed", range(3))
def test_random_threads_free_every_version_once_and_never_in_use(seed: int) -> None:
    """Names and contents overlap, so that versions are shared, freed and loaded again all the time."""
    names, lock = ["a", "b", "c"], threading.Lock()
    # By the reference itself: the same name may have the same version again after both were gone.
    in_use, retired, freed = Counter[int](), Counter[int](), Counter[int]()
    refs: list[AdapterRef] = []  # kept, so that no identity is used again

    def mark_of(ref: AdapterRef) -> int:
        refs.append(ref)
        return id(ref)

    def load(source: str) -> LoadedAdapter:
        return LoadedAdapter(source, 1, None, None)

    def on_retired(ref: AdapterRef) -> None:
        with lock:
            retired[mark_of(ref)] += 1
            assert in_use[mark_of(ref)] == 0

    def on_freed(ref: AdapterRef) -> None:
        with lock:
            freed[mark_of(ref)] += 1
            assert retired[mark_of(ref)] == 1

    registry = AdapterRegistry(load, on_freed=on_freed, on_retired=on_retired)
    errors: list[BaseException] = []
    taken = set[int]()

    def worker(worker_seed: int) -> None:
        rng = random.Random(worker_seed)
        held: list[AdapterRef] = []
        for _ in range(400):
            name = rng.choice(names)
            try:
                match rng.choice([*["acquire"] * 3, *["release"] * 2, "load", "alias", "unload", "pin"]):
                    case "acquire":
                        ref = registry.acquire(name)
                        with lock:
                            in_use[mark_of(ref)] += 1
                            assert retired[mark_of(ref)] == 0, "acquired after it was freed"
                            taken.add(mark_of(ref))
                        held.append(ref)
                    case "release" if held:
                        ref = held.pop(rng.randrange(len(held)))
                        with lock:
                            in_use[mark_of(ref)] -= 1
                        registry.release(ref)
                    case "load":
                        registry.load(name, f"v{rng.randrange(3)}", replace=rng.random() < 0.8)
                    case "alias":
                        registry.alias(f"alias-{name}", name, replace=rng.random() < 0.8)
                    case "unload":
                        registry.unload(rng.choice([name, f"alias-{name}"]))
                    case "pin":
                        registry.pin(name, rng.random() < 0.5)
            except (AdapterNotFound, AdapterExists):
                pass
            registry.check_integrity()
        for ref in held:
            with lock:
                in_use[mark_of(ref)] -= 1
            registry.release(ref)

    def guarded(worker_seed: int) -> None:
        try:
            worker(worker_seed)
        except BaseException as error:
            errors.append(error)
            raise

    _run_all([partial(guarded, seed * 100 + i) for i in range(6)])
    assert not errors
    for info in registry.list():
        assert info.requests_in_flight == 0
        registry.unload(info.name)
    registry.check_integrity()
    assert registry.counts() == RegistryCounts(0, 0, 0, 0)
    assert set(retired.values()) == {1}
    assert set(freed.values()) == {1}
    assert taken <= set(retired), "every use that there ever was has retired"
    assert set(freed) < set(retired), "some were shared"


def _run_all(targets: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=target) for target in targets]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(switch)
    assert not any(thread.is_alive() for thread in threads)


# --- restarts ------------------------------------------------------------------------------------------------------


def test_restart_brings_the_adapters_back(tmp_path: Path) -> None:
    disk, state = Disk(one="v1", two="v2"), tmp_path / "sub" / "state.json"
    registry = disk.registry(state_path=state)
    registry.load("a", "one")
    registry.load("b", "one", pinned=True)
    registry.load("c", "two")
    registry.load("a", "two", replace=True)
    registry.unload("c")
    registry.pin("a", True)
    registry.pin("b", False)

    again = disk.registry(state_path=state)
    assert again.list() == []
    assert again.restore() == []
    assert [(i.name, i.version, i.source, i.pinned) for i in again.list()] == [
        ("a", "v2", "two", True),
        ("b", "v1", "one", False),
    ]


def test_sources_are_remembered_as_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dir").mkdir()
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "dir")
    registry = Disk(**{path: "v1", "org/name": "v2"}).registry()
    assert registry.load("a", "dir").source == path
    assert registry.load("b", "org/name").source == "org/name"


def test_changed_content_is_loaded_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk, state = Disk(src="v1"), tmp_path / "state.json"
    disk.registry(state_path=state).load("a", "src")
    disk.content["src"] = "v2"
    registry = disk.registry(state_path=state)
    with caplog.at_level(logging.WARNING):
        assert registry.restore() == []
    assert "version was v1, is now v2" in caplog.text
    assert registry.info("a").version == "v2"
    assert json.loads(state.read_text())["adapters"][0]["version"] == "v2"


def test_what_failed_to_restore_stays_remembered(tmp_path: Path) -> None:
    disk, state = Disk(one="v1", two="v2"), tmp_path / "state.json"
    registry = disk.registry(state_path=state)
    registry.load("a", "one")
    registry.load("b", "two")
    del disk.content["one"]

    registry = disk.registry(state_path=state)
    registry.load("c", "two")  # before restore: must not forget what is still to be restored
    ((name, error),) = registry.restore()
    assert name == "a"
    assert "it is gone" in error
    registry.unload("b")

    disk.content["one"] = "v1"
    registry = disk.registry(state_path=state)
    assert registry.restore() == []
    assert [info.name for info in registry.list()] == ["a", "c"]


def test_a_name_that_failed_to_restore_can_be_forgotten(tmp_path: Path) -> None:
    disk, state = Disk(one="v1"), tmp_path / "state.json"
    disk.registry(state_path=state).load("a", "one")
    disk.content.clear()
    registry = disk.registry(state_path=state)
    assert len(registry.restore()) == 1
    registry.unload("a")
    assert disk.registry(state_path=state).restore() == []
    with pytest.raises(AdapterNotFound):
        registry.unload("a")


def test_names_loaded_before_restore_win(tmp_path: Path) -> None:
    disk, state = Disk(one="v1", two="v2"), tmp_path / "state.json"
    disk.registry(state_path=state).load("a", "one")
    registry = disk.registry(state_path=state)
    registry.load("a", "two")
    assert registry.restore() == []
    assert registry.info("a").version == "v2"


ENTRY = {"name": "a", "source": "s", "pinned": False, "version": "v"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": 2, "adapters": []}',
        '{"format": 1}',
        '{"format": 1, "adapters": [{"name": "a"}]}',
        json.dumps({"format": 1, "adapters": [ENTRY | {"pinned": "no"}]}),
        json.dumps({"format": 1, "adapters": [ENTRY | {"more": 1}]}),
        json.dumps({"format": 1, "adapters": [ENTRY, ENTRY]}),
    ],
)
def test_unusable_state_file_is_left_alone(text: str, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    state.write_text(text)
    with pytest.raises(RegistryStateError, match="move it aside") as caught:
        Disk().registry(state_path=state)
    assert str(state) in str(caught.value)
    assert state.read_text() == text


def test_a_change_that_cannot_be_recorded_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, state = Disk(one="v1", two="v2"), tmp_path / "state.json"
    registry = disk.registry(state_path=state)
    registry.load("a", "one")
    before = state.read_text()

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    changes: list[Callable[[], object]] = [
        lambda: registry.load("a", "two", replace=True),
        lambda: registry.load("b", "two"),
        lambda: registry.unload("a"),
        lambda: registry.pin("a", True),
    ]
    for change in changes:
        with pytest.raises(RegistryStateError, match="No space left on device"):
            change()
    assert [(i.name, i.version, i.pinned) for i in registry.list()] == [("a", "v1", False)]
    assert disk.freed == []
    assert state.read_text() == before
    assert list(tmp_path.iterdir()) == [state], "no temporary file is left"
    registry.check_integrity()


def test_killed_at_any_moment_the_state_file_is_whole(tmp_path: Path) -> None:
    """kill -9 while it loads and unloads: what comes back is a state that was acknowledged, or the next one."""
    state = tmp_path / "state.json"
    script = """
import sys, pathlib
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.versions import LoadedAdapter
r = AdapterRegistry(lambda s: LoadedAdapter(s, 1, None, None), state_path=pathlib.Path(sys.argv[1]))
for i in range(10**6):
    r.load(f"n{i}", "s")
    print(i, flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", script, str(state)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(30):
            acknowledged = int(process.stdout.readline())
        process.kill()
    registry = AdapterRegistry(lambda source: LoadedAdapter(source, 1, None, None), state_path=state)
    assert registry.restore() == []
    names = {info.name for info in registry.list()}
    assert {f"n{i}" for i in range(acknowledged + 1)} <= names
