"""Stand-ins for the parts of the engine that need a model: a runner, a tokenizer, adapter slots and a registry.

They need no torch, are deterministic, and check what they are given.
"""

from __future__ import annotations

import threading
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from typing import Any

from manylora.adapters.errors import AdapterError
from manylora.adapters.versions import AdapterRef
from manylora.server.engine.request import AdapterUse, Request, SampledToken, SampleFailed, SamplingParams, StepPlan

Sampled = SampledToken | SampleFailed


def adapter(name: str, version: str | None = None) -> AdapterRef:
    return AdapterRef(name, version or name.encode().hex().ljust(64, "0"))


def request(
    request_id: str = "r0", prompt: Sequence[int] = (1, 2, 3), *, adapter: AdapterRef | None = None, **kwargs: Any
) -> Request:
    """A request. ``adapter`` is short for one in ``adapters``; ``adapters``, ``merged``, ``priority``, ``tenant``,
    ``drafter``, ``cache_salt`` and ``arrival_time`` are the request's, everything else is a sampling parameter."""
    names = ("adapters", "merged", "priority", "tenant", "drafter", "cache_salt", "arrival_time")
    own = {key: kwargs.pop(key) for key in names if key in kwargs}
    if adapter is not None:
        own["adapters"] = (AdapterUse(adapter),)
    return Request(request_id, list(prompt), SamplingParams(**kwargs), **own)


class FakeMerge:
    """What a request holds whose adapter is merged."""

    def __init__(self, identity: str) -> None:
        self.identity = identity

    def release(self) -> None:
        """Nothing is counted here."""


class FakeTokenizer:
    """One token per character, the token's id being its code point; also the engine's vocabulary."""

    eos_token_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in token_ids)

    def stream(self, *, skip_special_tokens: bool, shown: Set[int] = frozenset()) -> _FakeTextStream:
        return _FakeTextStream(self.eos_token_id if skip_special_tokens and self.eos_token_id not in shown else None)


class _FakeTextStream:
    def __init__(self, skipped: int | None) -> None:
        self._skipped = skipped

    def feed(self, token_id: int) -> str:
        return "" if token_id == self._skipped else chr(token_id)

    def flush(self) -> str:
        return ""


def scripted(*answers: str | int | Sampled) -> Callable[[Request, Sequence[int]], Sampled]:
    """A model that gives these tokens (each character of a string is one), whatever the prompt; then "." for ever."""
    script: list[Sampled] = []
    for answer in answers:
        if isinstance(answer, str):
            script.extend(SampledToken(ord(character)) for character in answer)
        else:
            script.append(SampledToken(answer) if isinstance(answer, int) else answer)

    def model(request: Request, tokens: Sequence[int]) -> Sampled:
        position = len(tokens) - len(request.prompt_token_ids)
        return script[position] if position < len(script) else SampledToken(ord("."))

    return model


def hashing_model(request: Request, tokens: Sequence[int]) -> Sampled:
    """A letter that depends on every token so far and on the composition, as a real model's would."""
    return SampledToken(ord("a") + zlib.crc32(repr((request.composition, list(tokens))).encode()) % 26)


class FakeRunner:
    """Keeps the tokens of each KV page, as a real runner keeps their keys and values, and asks ``model`` for the next
    token given what *the pages* say. So a page that two requests share, or that was not computed again after a
    preemption, changes the output. And no row may read keys and values that other weights made.

    ``before_step`` is called with each plan first; it may block, or raise what a device would.
    """

    def __init__(
        self,
        model: Callable[[Request, Sequence[int]], Sampled] = hashing_model,
        *,
        page_size: int = 4,
        before_step: Callable[[StepPlan], None] = lambda _plan: None,
    ) -> None:
        self.model = model
        self.page_size = page_size
        self.before_step = before_step
        self.plans: list[list[tuple[str, int, int, tuple[int, ...]]]] = []
        """Of each step, its rows: request id, start, count, slots."""
        self.threads: set[str] = set()
        self._kv: dict[tuple[int, int], int] = {}
        self._made_by: dict[tuple[int, int], object] = {}

    def execute(self, plan: StepPlan) -> Mapping[str, Sampled]:
        self.threads.add(threading.current_thread().name)
        self.before_step(plan)
        self.plans.append([(row.request.request_id, row.start, row.count, row.request.slots) for row in plan.rows])
        order = [(row.request.merged is not None, row.request.slots) for row in plan.rows]
        assert order == sorted(order), f"rows are not sorted by merged and slots: {order}"
        sampled: dict[str, Sampled] = {}
        for row in plan.rows:
            assert row.request.num_computed == row.start
            assert len(row.request.slots) == (len(row.request.adapters) if row.request.merged is None else 0)
            for position in range(row.start, row.start + row.count):
                place = self._place(row.request, position)
                self._kv[place] = row.token_at(position)
                self._made_by[place] = self._weights(row.request)
        for row in plan.rows:
            if row.sample:
                sampled[row.request.request_id] = self._next(row.request)
        return sampled

    def draw_on(self, requests: Sequence[Request]) -> Mapping[str, Sampled]:
        return {request.request_id: self._next(request) for request in requests}

    def _next(self, request: Request) -> Sampled:
        """Given what the pages hold of its known tokens: drafts that were accepted were computed with the others."""
        places = [self._place(request, p) for p in range(request.num_tokens)]
        assert {self._made_by[place] for place in places} == {self._weights(request)}
        return self.model(request, [self._kv[place] for place in places])

    @staticmethod
    def _weights(request: Request) -> object:
        return request.composition, None if request.merged is None else id(request.merged)

    def _place(self, request: Request, position: int) -> tuple[int, int]:
        return request.pages[position // self.page_size], position % self.page_size


class FakeSlots:
    """Least recently used slots; an upload is ready after ``latency`` more calls of ``acquire`` for anything."""

    def __init__(self, max_slots: int, *, latency: int = 0, refused: Sequence[str] = ()) -> None:
        self.max_slots = max_slots
        self.latency = latency
        self.refused = set(refused)
        self.references: Counter[str] = Counter()
        """By version, as slots are."""
        self.dropped: list[AdapterRef] = []
        self.prefetched: list[AdapterRef] = []
        self.evictions = 0
        self._calls = 0
        self._slot_of: OrderedDict[str, int] = OrderedDict()
        self._ref_of: dict[str, AdapterRef] = {}
        self._ready_at: dict[str, int] = {}

    def never_together(self, refs: Collection[AdapterRef]) -> str | None:
        if len({ref.version for ref in refs}) <= self.max_slots:
            return None
        return f"{len(refs)} adapters have no room in {self.max_slots} slots"

    def acquire(self, ref: AdapterRef) -> int | None:
        self._calls += 1
        if ref.name in self.refused:
            raise AdapterError(f"{ref.name} cannot be uploaded")
        version = ref.version
        if version not in self._slot_of and not self._upload(version):
            return None
        self._ref_of[version] = ref
        if self._calls <= self._ready_at[version]:
            return None
        self._slot_of.move_to_end(version)
        self.references[version] += 1
        return self._slot_of[version]

    def _upload(self, version: str) -> bool:
        slot = next((s for s in range(self.max_slots) if s not in self._slot_of.values()), None)
        if slot is None:
            idle = [v for v in self._slot_of if self.references[v] == 0 and self._calls > self._ready_at[v]]
            if not idle:
                return False
            slot = self._slot_of.pop(idle[0])
            self.evictions += 1
        self._slot_of[version] = slot
        self._ready_at[version] = self._calls + self.latency
        return True

    def awaits_read(self, ref: AdapterRef) -> bool:
        return False  # everything is in host memory here

    def prefetch(self, ref: AdapterRef) -> None:
        self.prefetched.append(ref)

    def release(self, ref: AdapterRef) -> None:
        assert self.references[ref.version] > 0, f"{ref.name} was released more often than acquired"
        self.references[ref.version] -= 1

    def drop(self, ref: AdapterRef) -> None:
        self.dropped.append(ref)

    def resident_versions(self) -> set[str]:
        return {ref.version for ref in self.resident()}

    def resident(self) -> list[AdapterRef]:
        return [self._ref_of[version] for version in self._slot_of if self._calls >= self._ready_at[version]]

    def check_integrity(self, *, idle: bool = False) -> None:
        if idle and self.references.total():
            raise RuntimeError(f"slots: {self.references.total()} references are held while idle")


class FakeRegistry:
    """Counts what is released; as the engine's registry, ``acquire`` first."""

    def __init__(self) -> None:
        self.references: Counter[AdapterRef] = Counter()

    def acquire(self, ref: AdapterRef) -> AdapterRef:
        self.references[ref] += 1
        return ref

    def release(self, ref: AdapterRef) -> None:
        assert self.references[ref] > 0, f"{ref.name} was released more often than acquired"
        self.references[ref] -= 1
