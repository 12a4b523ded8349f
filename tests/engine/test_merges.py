"""Which merged model is bound to which requests, and when it is let go: the manager over a scripted builder."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from typing import Any

import pytest

from manylora.adapters.errors import AdapterError, AdapterNotFound
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.versions import AdapterRef, LoadedAdapter
from manylora.server.engine import merges
from manylora.server.engine.errors import EngineDraining, MergeBusy, MergeRefused
from manylora.server.engine.merges import Difference, Measured, MergedModel, MergeManager

MEASURED = Measured(drift=Difference(0.5, 0.01), effect=Difference(3.0, 0.1))


@dataclass
class Size:
    kept: int
    working: int


class Weights:
    """A merged decoder, of which only its life matters."""

    def __init__(self, what: str) -> None:
        self.what = what


class Builder:
    def __init__(self) -> None:
        self.free = 1000
        self.stopped = False
        self.measured = MEASURED
        self.built: list[tuple[str, str]] = []
        self.alive: list[weakref.ref[Weights]] = []
        self.before_build: Callable[[], None] = lambda: None
        self.before_measure: Callable[[], None] = lambda: None
        self.warmed: list[MergedModel] = []

    def size(self, weights: Any, mode: str) -> Size:
        return Size(600 if mode == "exact" else 150, 300)

    def free_bytes(self) -> int:
        return self.free

    def build(self, weights: Any, mode: str, name: str) -> tuple[Weights, int]:
        self.before_build()
        made = Weights(f"{weights} {mode}")
        self.built.append((weights, mode))
        self.alive.append(weakref.ref(made))
        return made, 590

    def measure(self, decoder: Weights, weights: Any) -> Measured:
        self.before_measure()
        return self.measured

    def stop(self) -> None:
        self.stopped = True

    def warm_up(self, model: MergedModel) -> None:
        self.warmed.append(model)

    def n_alive(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self.alive)


class Setup:
    """A real registry over adapters whose source is their content."""

    def __init__(self) -> None:
        self.freed: list[AdapterRef] = []
        self.registry = AdapterRegistry(
            lambda source: LoadedAdapter(source.encode().hex().ljust(64, "0"), 1, None, source),
            on_freed=self.freed.append,
        )
        for name in ("a", "b"):
            self.registry.load(name, f"content of {name}")
        self.builder = Builder()
        self.manager = MergeManager(self.registry, lambda ref: bytes.fromhex(ref.version).rstrip(b"\0"), self.builder)
        self.registry.when_freed(self.manager.version_freed)

    def bind(self, name: str, scale: float = 1.0, count: int = 1) -> MergedModel | None:
        """As a request does it: under a reference."""
        ref = self.registry.acquire(name)
        try:
            return self.manager.bind(ref, scale, count)
        finally:
            self.registry.release(ref)


@pytest.fixture
def setup() -> Setup:
    return Setup()


def test_requests_for_the_version_alone_are_bound(setup: Setup) -> None:
    assert setup.bind("a") is None
    info = setup.manager.merge("a")
    assert (info.name, info.mode, info.nbytes, info.measured) == ("a", "exact", 590, MEASURED)
    assert not info.automatic
    assert setup.manager.current == info
    model = setup.bind("a")
    assert model is not None
    assert model.decoder.what == f"{b'content of a'!r} exact"
    assert setup.builder.warmed == [model]
    assert setup.bind("b") is None
    assert setup.bind("a", 0.5) is None
    assert setup.bind("a", count=0) is None
    setup.registry.alias("also-a", "a")
    same = setup.bind("also-a")
    assert same is model, "equal content is the same version, whatever its name"
    for bound in (model, same):
        bound.release()
    setup.manager.check_integrity(idle=True)


def test_an_adapter_that_merging_loses_is_warned_of(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    assert setup.manager.merge("b").warnings == ()
    setup.builder.measured = Measured(drift=Difference(3.0, 0.026), effect=Difference(3.0, 0.1))
    (warning,) = setup.manager.merge("a", "compact").warnings
    assert "drift by 0.026 on average, where the adapter itself changes the base's by 0.1; mode exact" in warning
    assert any(record.levelname == "WARNING" and warning in record.message for record in caplog.records)


def test_nothing_is_held_after_merging(setup: Setup) -> None:
    """Neither a reference nor the adapter's weights: the copy has all that it needs."""
    setup.manager.merge("a")
    assert setup.registry.info("a").requests_in_flight == 0
    setup.registry.check_integrity()


def test_the_copy_lives_until_the_last_bound_request_has_ended(setup: Setup) -> None:
    setup.manager.merge("a")
    first, second = setup.bind("a"), setup.bind("a", count=2)
    assert first is not None
    assert second is first
    setup.manager.unmerge()
    assert setup.manager.current is None
    assert setup.bind("a") is None
    first.release()
    first.release()
    assert setup.builder.n_alive() == 1
    assert first.decoder.what.endswith("exact")
    with pytest.raises(RuntimeError, match="bound while idle"):
        setup.manager.check_integrity(idle=True)
    first.release()
    assert setup.builder.n_alive() == 0, "although an ended request still holds the model object"
    with pytest.raises(RuntimeError, match="after they were freed"):
        _ = first.decoder
    with pytest.raises(RuntimeError, match="more often than it was bound"):
        first.release()
    setup.manager.check_integrity(idle=True)


def test_an_idle_copy_is_freed_by_unmerge_itself(setup: Setup) -> None:
    setup.manager.merge("a")
    assert setup.builder.n_alive() == 1
    assert setup.manager.unmerge().name == "a"
    assert setup.builder.n_alive() == 0
    with pytest.raises(MergeRefused, match="No adapter is merged"):
        setup.manager.unmerge()


def test_another_merge_is_made_before_it_takes_the_place(setup: Setup) -> None:
    setup.manager.merge("a")
    old = setup.bind("a")
    assert old is not None
    setup.builder.before_build = lambda: bound.append(setup.bind("a"))
    bound: list[MergedModel | None] = []
    setup.manager.merge("b", "compact")
    assert bound == [old], "requests are bound to the old one until the new one is there"
    assert setup.bind("a") is None
    new = setup.bind("b")
    assert new is not None
    assert new.decoder.what.endswith("compact")
    assert setup.builder.n_alive() == 2
    old.release()
    old.release()
    assert setup.builder.n_alive() == 1
    new.release()
    setup.manager.check_integrity(idle=True)


def test_merging_what_is_merged_changes_nothing_but_the_mode(setup: Setup) -> None:
    first = setup.manager.merge("a", "compact")
    assert setup.manager.merge("a", "compact") == first
    assert setup.builder.built == [(b"content of a", "compact")]
    assert setup.manager.merge("a", "exact").mode == "exact"
    assert setup.builder.n_alive() == 1


def test_errors_leave_the_old_state(setup: Setup) -> None:
    def fail(error: Exception) -> Callable[[], None]:
        def raise_() -> None:
            raise error

        return raise_

    setup.manager.merge("a")
    with pytest.raises(AdapterNotFound):
        setup.manager.merge("nobody")
    with pytest.raises(MergeRefused, match="`mode` must be one of exact, compact, got 'fast'") as refused:
        setup.manager.merge("b", "fast")
    assert refused.value.param == "mode"
    for error, expected in (MergeRefused("no"), MergeRefused), (CancelledError(), EngineDraining), (OSError(), OSError):
        setup.builder.before_build = fail(error)
        with pytest.raises(expected):
            setup.manager.merge("b")
    setup.builder.before_build = lambda: None
    setup.builder.before_measure = fail(RuntimeError("the probe failed"))
    with pytest.raises(RuntimeError, match="the probe failed"):
        setup.manager.merge("b")
    setup.builder.before_measure = lambda: None  # it holds the error, which holds what the builder had in its hands
    assert setup.builder.n_alive() == 1, "what was made for nothing is gone"
    assert setup.manager.current is not None
    assert setup.manager.current.name == "a"
    assert setup.registry.info("b").requests_in_flight == 0
    assert setup.manager.merge("b").name == "b"


def test_what_does_not_fit_is_refused_with_the_bytes(setup: Setup) -> None:
    setup.builder.free = 899
    message = r"`a` in mode exact takes 600 bytes .* 300 more .* but 899 bytes are free; mode compact takes less"
    with pytest.raises(MergeRefused, match=message):
        setup.manager.merge("a")
    assert setup.builder.built == []
    assert setup.manager.merge("a", "compact").mode == "compact"
    setup.builder.free = 900
    assert setup.manager.merge("a", "exact").mode == "exact"


def test_weights_that_cannot_be_read_end_the_merge(setup: Setup) -> None:
    def gone(ref: AdapterRef) -> Any:
        raise AdapterError(f"{ref.name} is gone")

    manager = MergeManager(setup.registry, gone, setup.builder)
    with pytest.raises(AdapterError, match="a is gone"):
        manager.merge("a")
    assert setup.registry.info("a").requests_in_flight == 0


def test_a_second_merge_at_the_same_time_is_refused(setup: Setup) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(30)

    setup.builder.before_build = wait
    thread = threading.Thread(target=lambda: setup.manager.merge("a"))
    thread.start()
    assert begun.wait(30)
    with pytest.raises(MergeBusy):
        setup.manager.merge("b")
    with pytest.raises(MergeBusy):
        setup.manager.unmerge()
    assert setup.bind("a") is None
    go_on.set()
    thread.join(30)
    assert setup.manager.current is not None
    assert setup.manager.current.name == "a"


def test_a_new_version_of_the_name_is_not_merged(setup: Setup) -> None:
    setup.manager.merge("a")
    running = setup.registry.acquire("a")
    model = setup.manager.bind(running)
    assert model is not None
    setup.registry.load("a", "newer content", replace=True)
    assert setup.bind("a") is None
    assert setup.manager.current is not None, "a request still runs on the old version"
    model.release()
    setup.registry.release(running)  # the last use of the version
    assert setup.manager.current is None
    assert setup.builder.n_alive() == 0


def test_unloading_ends_the_merge(setup: Setup) -> None:
    setup.manager.merge("a")
    running = setup.registry.acquire("a")
    model = setup.manager.bind(running)
    assert model is not None
    setup.registry.unload("a")
    assert model.decoder is not None
    # As the step loop ends a request: first the binding, then the reference.
    model.release()
    setup.registry.release(running)
    assert setup.manager.current is None
    assert setup.builder.n_alive() == 0
    setup.registry.load("a", "content of a")
    assert setup.bind("a") is None, "it is the same version again, but nobody has merged it"


def test_an_alias_keeps_the_merge(setup: Setup) -> None:
    setup.registry.alias("also-a", "a")
    setup.manager.merge("a")
    setup.registry.unload("a")
    model = setup.bind("also-a")
    assert model is not None
    model.release()
    setup.registry.unload("also-a")
    assert setup.manager.current is None


def test_unloading_while_it_is_merged_leaves_nothing(setup: Setup) -> None:
    setup.builder.before_build = lambda: setup.registry.unload("a")
    with pytest.raises(AdapterNotFound):
        setup.manager.merge("a")
    assert setup.manager.current is None
    assert setup.builder.n_alive() == 0
    assert [ref.name for ref in setup.freed] == ["a"]


def test_a_version_that_is_freed_takes_no_other_merge_along(setup: Setup) -> None:
    setup.manager.merge("a")
    setup.registry.unload("b")
    assert setup.bind("a") is not None


def test_nothing_begins_after_close(setup: Setup) -> None:
    setup.manager.merge("a")
    setup.manager.close()
    assert setup.builder.stopped
    assert setup.builder.n_alive() == 0
    with pytest.raises(EngineDraining):
        setup.manager.merge("b")
    assert setup.builder.n_alive() == 0


def test_only_unmerges_that_merge(setup: Setup) -> None:
    first = setup.manager.merge("a", automatic=True)
    assert first.automatic
    by_hand = setup.manager.merge("a")
    assert by_hand == replace(first, automatic=False)
    with pytest.raises(MergeRefused):
        setup.manager.unmerge(only=first)
    assert setup.manager.unmerge(only=by_hand) is by_hand


def test_a_name_that_moved_on_is_not_merged_for_its_old_version(setup: Setup) -> None:
    ref = setup.registry.acquire("a")
    setup.registry.load("a", "newer content", replace=True)
    with pytest.raises(AdapterNotFound):
        setup.manager.merge("a", version=ref.version)
    setup.registry.release(ref)
    assert setup.builder.built == []


def test_binding_and_unmerging_race_without_losing_a_copy(setup: Setup) -> None:
    """Requests come and go on four threads while merges change on another: at the end, nothing is left."""
    stop = threading.Event()
    problems: list[BaseException] = []

    def requests(name: str) -> None:
        try:
            while not stop.is_set():
                model = setup.bind(name, count=2)
                if model is not None:
                    assert model.decoder.what.startswith(repr(f"content of {name}".encode()))
                    model.release()
                    assert not model.is_freed
                    model.release()
        except BaseException as error:  # noqa: BLE001 - shown by the test
            problems.append(error)

    threads = [threading.Thread(target=requests, args=(name,)) for name in "aabb"]
    for thread in threads:
        thread.start()
    for i in range(200):
        if i % 3 == 2:
            setup.manager.unmerge()
        else:
            setup.manager.merge("ab"[i % 2], ("exact", "compact")[i % 5 % 2])
        setup.manager.check_integrity()
    stop.set()
    for thread in threads:
        thread.join(30)
    if setup.manager.current is not None:
        setup.manager.unmerge()
    assert problems == []
    setup.manager.check_integrity(idle=True)
    assert setup.builder.n_alive() == 0


def test_memory_is_given_back_when_a_copy_is_gone(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    monkeypatch.setattr(merges, "give_back_soon", lambda: alive.append(setup.builder.n_alive()))
    setup.manager.merge("a")
    assert alive == [1], "what it was computed in"
    bound = setup.bind("a")
    assert bound is not None
    setup.manager.unmerge()
    assert alive == [1], "a request still computes with it"
    bound.release()
    assert alive == [1, 0]
    with pytest.raises(MergeRefused):
        setup.manager.unmerge()
    assert alive == [1, 0]
