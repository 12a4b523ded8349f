"""Random lives of adapters, against a simple model of what must be true.

Hypothesis draws sequences of load, replace, alias, unload, pin, merge, unmerge, generate and cancel, some of them at
the same moment on several threads, over a server with two device slots and room for three versions in host memory, so
that nearly everything is swapped all the time. The model is a dictionary from names to contents. What must be true:

- a request is answered by the version that its name meant when it was admitted (by one of them, if the name was being
  changed at that moment), and its tokens are exactly those which that version gives alone on an idle server;
- after each step the registry, the host tier and the merges agree with themselves; when all is over, with everything
  unloaded, no page, slot, byte of host memory or reference is left.

The planted races at the end break one rule each, and the machine must notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Final

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import HypothesisException
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from manylora.adapters.errors import AdapterExists, AdapterNameInvalid, AdapterNotFound
from manylora.adapters.versions import AdapterRef
from manylora.kernels.lora_weights import LoraWeights
from manylora.server.api.context import RequestContext
from manylora.server.api.errors import ApiError
from manylora.server.api.generation import PromptPlan, submit_all
from manylora.server.api.schemas import CompletionRequest
from manylora.server.api.targets import target_of
from manylora.server.config import EngineConfig, ServeConfig
from manylora.server.engine.errors import MergeBusy, MergeRefused
from manylora.server.engine.request import FinishEvent, SamplingParams, StepPlan, TokenEvent
from manylora.server.model.loader import LoadedBase, load_base
from manylora.server.model.synthetic import synthetic_adapter
from manylora.server.serving import Running, build
from tests.checkpoints import write_weights

NAMES: Final = ("red", "green", "blue", "black")
CONTENTS: Final = 5
SCALES: Final = (1.0, -0.5)
MODES: Final = ("exact", "compact")
TOKENS: Final = 16
STEP_S: Final = 0.001
"""How much longer a step takes than it need, so that requests still run while the next things are done."""
PROMPT: Final = [5, 17, 33, 60, 2, 9, 81, 44, 7]
CONTEXT: Final = RequestContext("life")
WAIT_S: Final = 60
STRENGTH: Final = 20.0
EXAMPLES: Final = int(os.environ.get("MANYLORA_LIFE_EXAMPLES", "100"))
"""More of them, drawn at random each time, if the environment says so; the same ones in every run otherwise."""

Content = int | None
"""The adapter directory that a name means; None: there is no such name."""
Composition = tuple[tuple[int, float], ...]
"""Contents and their scales; empty for the base."""
Tokens = tuple[int, ...]


@dataclass(eq=False)
class Asked:
    """A request on its way. ``allowed``: for each name, the contents it may have meant; ``merged``: the contents and
    modes of the merges that it may have been bound to."""

    uses: tuple[tuple[str, float], ...]
    allowed: list[set[Content]]
    merged: set[tuple[int, str]]
    admitted: Future[None]
    """Done when its names have been resolved, or refused."""
    done: Future[Tokens | str]
    streams: list[Any]
    is_cancelled: bool = False


@dataclass(frozen=True)
class Contents:
    """The adapters' directories, a way to make servers for them, and what is known of their answers."""

    folders: tuple[Path, ...]
    serve: Callable[[], Running]
    version_of: dict[int, str] = field(default_factory=dict)
    known: dict[Composition, Tokens] = field(default_factory=dict)
    known_merged: dict[tuple[int, str], Tokens] = field(default_factory=dict)


class World:
    """The server, an event loop on a thread of its own, and what each version is known to answer."""

    def __init__(self, contents: Contents) -> None:
        self.running, self.folders = contents.serve(), contents.folders
        running = self.running
        self._serial = count()
        execute = running.runner.execute

        def slowly(plan: StepPlan) -> Any:
            time.sleep(STEP_S)
            return execute(plan)

        running.runner.execute = slowly  # type: ignore[method-assign]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="event-loop", daemon=True)
        self._thread.start()
        self._call(self._start())
        self.pool = ThreadPoolExecutor(4)
        self.found: list[BaseException] = []
        """What was seen to be wrong. Hypothesis runs a failing life again, and may only say that it then went well."""
        self.free_pages = dict(running.pool.free_pages())
        self.version_of, self._known, self._known_merged = contents.version_of, contents.known, contents.known_merged
        if not self._known:
            self._learn()

    async def _start(self) -> None:
        self.running.engine.start()

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(WAIT_S)

    def close(self) -> None:
        self._call(self.running.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self.pool.shutdown()

    def _learn(self) -> None:
        """Every answer there can be, each from a server that does nothing else."""
        registry, merges = self.running.registry, self.running.merges
        self._known[()] = self._answer(())
        for content, folder in enumerate(self.folders):
            self.version_of[content] = registry.load(f"know-{content}", str(folder)).version
        singles = [(c, s) for c in range(CONTENTS) for s in SCALES]
        pairs = [(a, b) for a in singles for b in singles if a[0] <= b[0]]
        for composition in [*((one,) for one in singles), *pairs]:
            uses = tuple((f"know-{c}", s) for c, s in composition)
            if len({c for c, _ in composition}) < len(uses):  # a name may be given once only: under two names here
                registry.alias("again", uses[0][0])
                uses = (("again", uses[0][1]), uses[1])
            self._known[composition] = self._answer(uses)
            if "again" in dict(uses):
                registry.unload("again")
        for content in range(CONTENTS):
            for mode in MODES:
                merges.merge(f"know-{content}", mode)
                self._known_merged[content, mode] = self._answer(((f"know-{content}", 1.0),))
                merges.unmerge()
        for content in range(CONTENTS):
            registry.unload(f"know-{content}")
        assert len(set(self._known.values())) > len(self._known) // 2, (
            "the adapters answer too much alike to be told apart"
        )

    def _answer(self, uses: tuple[tuple[str, float], ...]) -> Tokens:
        answer = self.ask(uses, [], set()).done.result(WAIT_S)
        assert isinstance(answer, tuple), answer
        return answer

    def expected(self, contents: Sequence[int], scales: Sequence[float]) -> Tokens:
        composition = tuple(sorted(zip(contents, scales, strict=True)))
        return self._known[composition] if composition in self._known else self._known[composition[::-1]]

    def expected_merged(self, content: int, mode: str) -> Tokens:
        return self._known_merged[content, mode]

    def ask(
        self, uses: tuple[tuple[str, float], ...], allowed: list[set[Content]], merged: set[tuple[int, str]]
    ) -> Asked:
        """Begin to generate; ``done`` brings the tokens, or an error's text."""
        streams: list[Any] = []
        admitted: Future[None] = Future()
        future = asyncio.run_coroutine_threadsafe(self._generate(uses, streams, admitted), self._loop)
        return Asked(uses, allowed, merged, admitted, future, streams)

    async def _generate(
        self, uses: tuple[tuple[str, float], ...], streams: list[Any], admitted: Future[None]
    ) -> Tokens | str:
        """As the HTTP routes do it: resolve, lease, submit, read."""
        serving = self.running.serving
        adapters = [{"name": name, "scale": scale} for name, scale in uses]
        body = CompletionRequest.model_validate(
            {"model": serving.base_name, "prompt": PROMPT, **({"adapters": adapters} if uses else {})}
        )
        params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        try:
            with target_of(serving, body).lease(serving, 1) as lease:
                streams += submit_all(
                    serving, lease, body, [PromptPlan(PROMPT, params)], f"life-{next(self._serial)}", CONTEXT
                )
        except ApiError as error:
            return f"{error.status} {error.message}"
        finally:
            admitted.set_result(None)
        tokens: list[int] = []
        async for event in streams[0]:
            if isinstance(event, TokenEvent):
                tokens += event.token_ids
            elif isinstance(event, FinishEvent) and event.reason not in ("length", "abort"):
                return f"{event.reason} {event.error}"
        return tuple(tokens)

    def cancel(self, asked: Asked) -> None:
        asked.is_cancelled = True
        self._loop.call_soon_threadsafe(lambda: [stream.abort() for stream in asked.streams])

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        try:
            yield
        except (AssertionError, RuntimeError) as error:
            self.found.append(error)
            raise

    def check(self) -> None:
        self.running.registry.check_integrity()
        self.running.host.check_integrity()
        self.running.merges.check_integrity()
        assert self.running.engine.is_healthy

    def check_empty(self) -> None:
        """With nothing loaded and nothing running: that nothing is left. What was let go is freed within moments."""
        deadline = time.monotonic() + 10
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert not left, left
        self.running.registry.check_integrity()
        self.running.host.check_integrity(idle=True)
        self.running.merges.check_integrity(idle=True)
        self.running.pool.check_integrity()

    def _left(self) -> dict[str, Any]:
        counts, host = self.running.registry.counts(), self.running.host.stats()
        pages, stats = dict(self.running.pool.free_pages()), self.running.engine.stats()
        left = {
            "names": counts.ready,
            "versions": counts.draining,
            "references": counts.requests_in_flight,
            "host bytes": host.nbytes,
            "running": stats.running,
            "waiting": stats.waiting,
            "KV pages": stats.kv_pages_used,
            "adapter pages": {kind: n for kind, n in self.free_pages.items() if pages[kind] != n},
        }
        return {what: number for what, number in left.items() if number}


class Life(RuleBasedStateMachine):
    """See the module's text; ``world`` is given by the test."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, int] = {}
        self.merged: tuple[int, str] | None = None
        self.asked: list[Asked] = []

    @initialize()
    def begin(self) -> None:
        self.world.check_empty()
        for content, name in enumerate(NAMES[1:]):  # more than there are slots
            self._load(name, content, False)
            self.names[name] = content

    # --- one thing at a time: the outcome is known ------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), content=st.integers(0, CONTENTS - 1), replace=st.booleans())
    def load(self, name: str, content: int, replace: bool) -> None:
        if name in self.names and not replace:
            with pytest.raises(AdapterExists):
                self._load(name, content, False)
            return
        self._load(name, content, replace)
        self.names[name] = content
        self._after_names_changed()

    @rule(name=st.sampled_from(NAMES), other=st.sampled_from(NAMES))
    def alias(self, name: str, other: str) -> None:
        registry = self.world.running.registry
        if name == other or other not in self.names:
            with pytest.raises(AdapterNameInvalid if name == other else AdapterNotFound):
                registry.alias(name, other, replace=True)
            return
        registry.alias(name, other, replace=True)
        self.names[name] = self.names[other]
        self._after_names_changed()

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        if name not in self.names:
            with pytest.raises(AdapterNotFound):
                self.world.running.registry.unload(name)
            return
        self.world.running.registry.unload(name)
        del self.names[name]
        self._after_names_changed()

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        if name not in self.names:
            with pytest.raises(AdapterNotFound):
                self.world.running.registry.pin(name, pinned)
            return
        assert self.world.running.registry.pin(name, pinned).pinned is pinned

    @rule(name=st.sampled_from(NAMES), mode=st.sampled_from(MODES))
    def merge(self, name: str, mode: str) -> None:
        if name not in self.names:
            with pytest.raises(AdapterNotFound):
                self.world.running.merges.merge(name, mode)
            return
        self.world.running.merges.merge(name, mode)
        self.merged = self.names[name], mode

    @rule()
    def unmerge(self) -> None:
        # A merge ends by itself when its version is freed, which requests that still run on it put off.
        if self.world.running.merges.current is None:
            with pytest.raises(MergeRefused):
                self.world.running.merges.unmerge()
        else:
            self.world.running.merges.unmerge()
        self.merged = None

    @rule(names=st.lists(st.sampled_from(NAMES), max_size=2, unique=True), scale=st.sampled_from(SCALES))
    def generate(self, names: list[str], scale: float) -> None:
        uses = tuple(zip(names, (scale, 1.0), strict=False))
        merged = {self.merged} if self.merged is not None else set()
        self.asked.append(self.world.ask(uses, [{self.names.get(name)} for name in names], merged))
        self.asked[-1].admitted.result(WAIT_S)

    @rule(mode=st.sampled_from(MODES), name=st.sampled_from(NAMES))
    def merge_and_ask(self, name: str, mode: str) -> None:
        self.merge(name, mode)
        self.generate([name], 1.0)

    @rule(names=st.permutations(NAMES))
    def ask_everybody(self, names: Sequence[str]) -> None:
        for name in names:
            self.generate([name], 1.0)

    @rule(which=st.integers(0, 3))
    def cancel(self, which: int) -> None:
        if which < len(self.asked):
            self.world.cancel(self.asked[which])

    @rule()
    def settle(self) -> None:
        asked, self.asked = self.asked, []
        for one in asked:
            with self.world.noting():
                self._judge(one)

    # --- several at once: it must be one of those that are possible -------------------------------------------------

    @rule(
        changes=st.lists(
            st.tuples(
                st.sampled_from(("load", "unload", "merge", "unmerge", "pin")),
                st.sampled_from(NAMES),
                st.integers(0, CONTENTS - 1),
            ),
            min_size=2,
            max_size=4,
        ),
        names=st.lists(st.sampled_from(NAMES), max_size=2, unique=True),
    )
    def storm(self, changes: list[tuple[str, str, int]], names: list[str]) -> None:
        possible: dict[str, set[Content]] = {name: {self.names.get(name)} for name in NAMES}
        for kind, name, content in changes:
            if kind in ("load", "unload"):
                possible[name].add(content if kind == "load" else None)
        merged = {self.merged} if self.merged is not None else set()
        for kind, name, content in changes:
            if kind == "merge":
                merged |= {(c, MODES[content % 2]) for c in possible[name] if c is not None}
        running = [self.world.pool.submit(self._change, change) for change in changes]
        uses = tuple((name, 1.0) for name in names)
        self.asked += [self.world.ask(uses, [possible[name] for name in names], merged) for _ in range(2)]
        for change in (*running, *(asked.admitted for asked in self.asked[-2:])):
            change.result(WAIT_S)
        for name in NAMES:  # which of the changes was the last is not ours to know
            content = self._meaning(name)
            assert content in possible[name], f"{name} means {content}, possible were {possible[name]}"
            self.names.pop(name, None)
            if content is not None:
                self.names[name] = content
        info = self.world.running.merges.current
        self.merged = None if info is None else (self._content(info.version), info.mode)
        assert self.merged is None or self.merged in merged

    def _change(self, change: tuple[str, str, int]) -> None:
        kind, name, content = change
        running = self.world.running
        try:
            match kind:
                case "load":
                    self._load(name, content, True)
                case "unload":
                    running.registry.unload(name)
                case "pin":
                    running.registry.pin(name, bool(content % 2))
                case "merge":
                    running.merges.merge(name, MODES[content % 2])
                case _:
                    running.merges.unmerge()
        except (AdapterNotFound, MergeRefused, MergeBusy):
            pass  # as another of the changes would have it

    # --- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        with self.world.noting():
            self.world.check()
            for name in NAMES:
                assert self._meaning(name) == self.names.get(name)

    def teardown(self) -> None:
        self.settle()
        if self.world.running.merges.current is not None:
            self.world.running.merges.unmerge()
        for name in list(self.names):
            self.world.running.registry.unload(name)
        with self.world.noting():
            self.world.check_empty()

    def _judge(self, asked: Asked) -> None:
        answer = asked.done.result(WAIT_S)
        if isinstance(answer, str):
            assert any(None in allowed for allowed in asked.allowed), f"{asked.uses}: {answer}"
            assert answer.startswith("404 "), answer
            return
        scales = [scale for _, scale in asked.uses]
        possible = {
            self.world.expected(contents, scales): f"contents {contents}"
            for contents in _choices([{c for c in allowed if c is not None} for allowed in asked.allowed])
        }
        if scales == [1.0]:
            for content, mode in asked.merged:
                if content in asked.allowed[0]:
                    possible[self.world.expected_merged(content, mode)] = f"content {content}, merged ({mode})"
        if asked.is_cancelled:
            assert any(answer == tokens[: len(answer)] for tokens in possible), (asked.uses, answer, possible)
        else:
            assert answer in possible, (asked.uses, answer, possible)

    def _load(self, name: str, content: int, replace: bool) -> None:
        info = self.world.running.registry.load(name, str(self.world.folders[content]), replace=replace)
        assert info.version == self.world.version_of[content]

    def _meaning(self, name: str) -> Content:
        try:
            return self._content(self.world.running.registry.info(name).version)
        except AdapterNotFound:
            return None

    def _content(self, version: str) -> int:
        return next(content for content, known in self.world.version_of.items() if known == version)

    def _after_names_changed(self) -> None:
        """A merge may have ended, at once or when the last request of its version does."""
        if self.merged is not None and self.merged[0] not in self.names.values():
            info = self.world.running.merges.current
            self.merged = None if info is None else self.merged


def _choices(sets: Sequence[set[int]]) -> Iterator[tuple[int, ...]]:
    if not sets:
        yield ()
        return
    for first in sets[0]:
        for rest in _choices(sets[1:]):
            yield (first, *rest)


@pytest.fixture(scope="module")
def contents(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Contents:
    root = tmp_path_factory.mktemp("life")

    def base() -> LoadedBase:
        return load_base(str(checkpoints["llama"]), cache_dir=root / "cache", progress=False)

    shapes = base().spec.lora_shapes()
    folders = []
    for content in range(CONTENTS):
        # Of different sizes, and so strong that each answers differently.
        weights = synthetic_adapter(shapes, 4 + 9 * content, seed=content, dtype=torch.float32)
        strong = {module: replace(pair, scale=STRENGTH * pair.scale) for module, pair in weights.pairs.items()}
        folders.append(write_weights(root / f"content-{content}", shapes, LoraWeights(strong), "llama"))
    config = ServeConfig(
        model="tiny", engine=EngineConfig(max_context=64, max_rows=4, max_device_adapters=2, max_host_adapters=3)
    )
    return Contents(tuple(folders), lambda: build(config, base=base()))


@pytest.fixture
def world(contents: Contents) -> Iterator[World]:
    world = World(contents)
    yield world
    world.close()


def live(world: World, examples: int) -> None:
    """Run so many lives in this world. Raises what the first one that fails raised."""
    at_random = "MANYLORA_LIFE_EXAMPLES" in os.environ
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        type("LifeInWorld", (Life,), {"world": world}),
        settings=settings(
            max_examples=examples,
            stateful_step_count=20,
            deadline=None,
            derandomize=not at_random,
            database=None,
            # What depends on threads does not shrink well, and the steps of a failure say enough.
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_adapters_live_as_they_should(world: World) -> None:
    live(world, EXAMPLES)


# --- planted races: each takes one rule away --------------------------------------------------------------------------


def look_up_and_count_apart(running: Running, patch: pytest.MonkeyPatch) -> None:
    """The registry's acquire as two steps, between which the name may come to mean something else."""
    registry, acquire = running.registry, running.registry.acquire

    def in_two_steps(name: str) -> AdapterRef:
        looked_up = acquire(name)
        registry.release(looked_up)
        time.sleep(0.002)
        try:
            counted = acquire(name)
        except AdapterNotFound:
            return looked_up
        if counted.version != looked_up.version:
            registry.release(counted)
            return looked_up
        return counted

    patch.setattr(registry, "acquire", in_two_steps)


def publish_before_the_upload_ends(running: Running, patch: pytest.MonkeyPatch) -> None:
    """A slot is computed with while it is being written."""
    slots, acquire, write = running.slots, running.slots.acquire, running.pool.write

    def early(ref: AdapterRef) -> int | None:
        index = acquire(ref)
        slot = slots._slots.get(ref.version)
        if index is None and slot is not None and slot.upload is not None:
            slot.references += 1
            return slot.index
        return index

    def slowly(slot: int, weights: LoraWeights) -> None:
        time.sleep(0.005)
        write(slot, weights)

    patch.setattr(slots, "acquire", early)
    patch.setattr(running.pool, "write", slowly)


def evict_what_is_in_use(running: Running, patch: pytest.MonkeyPatch) -> None:
    """A slot makes way although requests are computed with it."""
    slots = running.slots
    patch.setattr(slots, "_evictable", lambda: [slot for slot in slots._slots.values() if slot.upload is None])


def free_merged_weights_in_use(running: Running, patch: pytest.MonkeyPatch) -> None:
    """Merged weights go when the merge ends, and not when the last request on them does."""
    merges = running.merges

    def at_once() -> list[Any]:
        ended, merges._ending = merges._ending, []
        return ended

    patch.setattr(merges, "_ended", at_once)


@pytest.mark.parametrize(
    "plant",
    [look_up_and_count_apart, publish_before_the_upload_ends, evict_what_is_in_use, free_merged_weights_in_use],
    ids=lambda plant: plant.__name__,
)
def test_a_planted_race_is_found(
    plant: Callable[[Running, pytest.MonkeyPatch], None], contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(contents)
    plant(world.running, monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, ExceptionGroup, HypothesisException)):
        live(world, 300)  # it ends with the first that fails
    assert world.found
    monkeypatch.undo()
    world.close()
