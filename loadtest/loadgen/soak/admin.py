"""Loads, replaces, unloads, pins, merges and aliases, at random, telling the world before and after each.

Two admins, each the only one to change its names, so that each knows what they mean: ``Swapper`` and ``Merger``. They
work at the same time, and beside the traffic.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from loadgen.soak.answers import ANSWER_S
from loadgen.soak.judge import Judge
from loadgen.soak.world import ABSENT, World, short

REPLACED, COMES_AND_GOES, MERGED, ALIAS, FIXED_MERGED = "replaced", "comes-and-goes", "merged", "alias", "sql"
"""Names: one that is replaced and never absent, one that is also unloaded, one that is merged besides, an alias of the
last, and a demo adapter that never changes and is merged too."""


@dataclass(frozen=True)
class Version:
    """Contents of an adapter: where they are, and their digest (short)."""

    source: Path
    digest: str


class Admin:
    """What both have. ``versions``: those that each of its names takes in turn."""

    def __init__(
        self, client: httpx.Client, judge: Judge, world: World, versions: Mapping[str, Sequence[Version]], seed: str
    ) -> None:
        self._client, self._judge, self._world, self._versions = client, judge, world, versions
        self._rng = random.Random(seed)

    def run(self, stopping: threading.Event, pause_s: float) -> None:
        """One action after the other, with pauses of ``pause_s`` on average."""
        while not stopping.wait(self._rng.uniform(0.2, 1.8) * pause_s):
            self.act()

    def act(self) -> None:
        raise NotImplementedError

    def _send(self, kind: str, method: str, path: str, **fields: Any) -> httpx.Response | None:
        """The answer if it is a success or a refusal; a refusal is a failure, as only sensible things are asked."""
        self._judge.count(kind)
        try:
            response = self._client.request(method, path, timeout=ANSWER_S, **fields)
        except httpx.HTTPError as error:
            self._judge.fail("admin", f"{kind}: {error!r}", asked=[method, path, str(fields)[:500]])
            return None
        self._judge.status(response.status_code, kind, asked=[method, path], answer=response.text[:1000])
        return response

    def _done(self, kind: str, response: httpx.Response | None) -> bool:
        if response is not None and response.is_success:
            return True
        if response is not None and response.status_code < 500:
            self._judge.fail("admin", f"{kind}: HTTP {response.status_code}", answer=response.text[:1000])
        return False

    def load(self, name: str, version: Version) -> None:
        """By any of three routes. The name means ``version`` from when it is acknowledged."""
        possible = self._world.names[name]
        kind = "loads" if ABSENT in possible.now() else "replacements"
        possible.changing(version.digest)
        match self._rng.choice(["source", "upload", "vllm"]):
            case "source":
                response = self._send(kind, "PUT", f"/v1/adapters/{name}", json={"source": str(version.source)})
            case "upload":
                files = [("files", (path.name, path.read_bytes())) for path in sorted(version.source.iterdir())]
                response = self._send(kind, "PUT", f"/v1/adapters/{name}", files=files)
            case _:
                body = {"lora_name": name, "lora_path": str(version.source), "load_inplace": True}
                response = self._send(kind, "POST", "/v1/load_lora_adapter", json=body)
        if self._done(kind, response):
            assert response is not None
            said = response.headers["content-type"].startswith("application/json") and response.json()["version"]
            if said and short(said) != version.digest:
                self._judge.fail("wrong version", f"{name}: {said} was loaded, not {version.digest}")
            possible.changed(version.digest)

    def unload(self, name: str) -> None:
        possible = self._world.names[name]
        possible.changing(ABSENT)
        if self._done("unloads", self._send("unloads", "DELETE", f"/v1/adapters/{name}")):
            possible.changed(ABSENT)

    def is_absent(self, name: str) -> bool:
        return ABSENT in self._world.names[name].now()

    def any_version(self, name: str) -> Version:
        return self._rng.choice(self._versions[name])


class Swapper(Admin):
    """Replaces one name, loads and unloads another, pins and unpins."""

    def act(self) -> None:
        match self._rng.choice(["replace", "replace", "come or go", "come or go", "pin"]):
            case "replace":
                self.load(REPLACED, self.any_version(REPLACED))
            case "come or go":
                if not self.is_absent(COMES_AND_GOES) and self._rng.random() < 0.5:
                    self.unload(COMES_AND_GOES)
                else:
                    self.load(COMES_AND_GOES, self.any_version(COMES_AND_GOES))
            case _:
                name, pinned = self._rng.choice(["pirate", REPLACED]), self._rng.random() < 0.4
                fields = {"json": {"pinned": pinned}}
                self._done("pins", self._send("pins", "PATCH", f"/v1/adapters/{name}", **fields))


class Merger(Admin):
    """Merges, unmerges, and replaces what may be merged meanwhile; gives an alias."""

    def act(self) -> None:
        match self._rng.choice(["merge", "merge", *["unmerge"] * 3, "replace", "alias", "come or go"]):
            case "merge":
                self.merge(self._rng.choice([MERGED, FIXED_MERGED]), self._rng.choice(["exact", "compact"]))
            case "unmerge":
                self.unmerge()
            case "replace":
                self._may_end_merge()
                self.load(MERGED, self.any_version(MERGED))
            case "alias":
                self.alias()
            case _:
                self._may_end_merge()
                if self.is_absent(MERGED):
                    self.load(MERGED, self.any_version(MERGED))
                else:
                    self.unload(MERGED)

    def merge(self, name: str, mode: str) -> None:
        if self.is_absent(name):
            return
        (version,) = self._world.names[name].now()
        merge = self._world.merge
        self._world.merging.set()
        merge.changing((version, mode))
        response = self._send(f"merges, {mode}", "POST", f"/v1/adapters/{name}/merge", json={"mode": mode})
        if self._done("merges", response):
            merge.changed((version, mode))

    def unmerge(self) -> None:
        merge = self._world.merge
        was = merge.now()
        if was == {None}:
            return
        merge.changing(None)
        response = self._send("unmerges", "POST", "/v1/adapters/unmerge")
        # It may have ended by itself, with the version that was merged.
        has_ended = response is not None and response.status_code == 400 and None in was
        if has_ended or self._done("unmerges", response):
            merge.changed(None)
            self._world.merging.clear()

    def alias(self) -> None:
        """The alias means what the other means now. A version that nobody else had is gone, and its merge with it."""
        if self.is_absent(MERGED):
            return
        self._may_end_merge()
        (version,) = self._world.names[MERGED].now()
        possible = self._world.names[ALIAS]
        possible.changing(version)
        if self._done("aliases", self._send("aliases", "PUT", f"/v1/adapters/{ALIAS}", json={"alias_of": MERGED})):
            possible.changed(version)

    def _may_end_merge(self) -> None:
        """A name of a merged version is about to mean another, or nothing."""
        merge = self._world.merge
        if any(merged is not None and merged[0] != self._fixed() for merged in merge.now()):
            merge.changing(None)

    def _fixed(self) -> str:
        (version,) = self._world.names[FIXED_MERGED].now()
        return version
