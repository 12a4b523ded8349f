"""Adapters loaded, replaced and unloaded through the server's own routes while traffic goes on.

One name of the load test's own, which no other request asks for: so a 404 in the traffic is the server's fault, and
never a swap's. After each load one request asks for the new version: its first token is what a user waits for after
an upload."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gevent
import requests
from locust.contrib.fasthttp import FastHttpSession

from loadgen.errors import ProfileError
from loadgen.profiles import SwapAction, Swaps
from loadgen.records import Record
from loadgen.streams import ask
from loadgen.traces import TracedRequest

NAME = "loadtest-swap"
_VERSIONS = 64
_FILES = ("adapter_config.json", "adapter_model.safetensors")
_ADMIN_S = 120.0


@dataclass
class Swap:
    """One action: when it was due, how long the server took, and what went wrong, if anything."""

    action: SwapAction
    due_s: float
    sent_s: float
    took_s: float
    failure: str = ""
    message: str = ""
    version: str = ""


class UploadedVersions:
    """An adapter's directory on this machine, uploaded each time as a version of its own, with another ``lora_alpha``
    (64 in turn): a server may share what has equal content, and then would have nothing to load."""

    def __init__(self, directory: Path) -> None:
        """ProfileError if it is not an adapter's directory."""
        try:
            self._files = {name: (directory / name).read_bytes() for name in _FILES}
            self._config = json.loads(self._files[_FILES[0]])
            self._alpha = self._config["lora_alpha"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ProfileError(f"swap upload: {directory} is no adapter's directory: {error!r}") from None

    def put(self, url: str, headers: dict[str, str], number: int, replace: bool) -> requests.Response:
        config = {**self._config, "lora_alpha": self._alpha + 1 + number % _VERSIONS}
        files = {**self._files, _FILES[0]: json.dumps(config).encode()}
        return requests.put(
            url,
            files={name: (name, content) for name, content in files.items()},
            data={"replace": str(replace).lower()},
            headers=headers,
            timeout=_ADMIN_S,
        )


class ListedSources:
    """Where the server got its adapters from, in turn; the server reads them again itself. What is loaded already under
    another name shares its copy, so this is the cheap kind of swap."""

    def __init__(self, sources: tuple[str, ...]) -> None:
        """ProfileError if there is none."""
        if not sources:
            raise ProfileError("swaps: the server names no adapter's source; give an adapter with --swap-upload DIR")
        self._sources = sources

    def put(self, url: str, headers: dict[str, str], number: int, replace: bool) -> requests.Response:
        body: dict[str, Any] = {"source": self._sources[number % len(self._sources)], "replace": replace}
        return requests.put(url, json=body, headers=headers, timeout=_ADMIN_S)


@dataclass
class Swapper:
    """Does a profile's swaps from the run's start to the end of its sending, and cleans up."""

    url: str
    plan: Swaps
    source: UploadedVersions | ListedSources
    headers: dict[str, str]
    admin_headers: dict[str, str]
    timeout_s: float
    clock: Callable[[], float]
    session: FastHttpSession
    swaps: list[Swap] = field(default_factory=list)
    probes: list[Record] = field(default_factory=list)

    @property
    def _route(self) -> str:
        return f"{self.url}/v1/adapters/{NAME}"

    def run(self, until_s: float) -> None:
        """Each action at its time, or, if the one before took longer than that, right after it."""
        number = loaded = 0
        try:
            while (due := self.plan.every_s * (number + 1)) < until_s:
                gevent.sleep(max(due - self.clock(), 0.0))
                action = self.plan.actions[number % len(self.plan.actions)]
                swap = self._act(action, due, loaded)
                self.swaps.append(swap)
                if action != "unload":
                    loaded += 1
                    if not swap.failure:
                        self._probe(swap)
                number += 1
        finally:
            self._clean_up()

    def _act(self, action: SwapAction, due: float, loaded: int) -> Swap:
        sent = self.clock()
        swap = Swap(action, due, sent, 0.0)
        try:
            if action == "unload":
                answer = requests.delete(self._route, headers=self.admin_headers, timeout=_ADMIN_S)
            else:
                answer = self.source.put(self._route, self.admin_headers, loaded, replace=action == "replace")
            if answer.status_code >= 300:
                swap.failure, swap.message = f"http_{answer.status_code}", answer.text[:300]
            elif action != "unload":
                swap.version = str(answer.json().get("version", ""))
        except (requests.RequestException, ValueError) as error:
            swap.failure, swap.message = "broken", repr(error)[:300]
        swap.took_s = self.clock() - sent
        return swap

    def _probe(self, swap: Swap) -> None:
        request = TracedRequest(
            at_s=self.clock(), model=NAME, max_tokens=4, prompt_tokens=16, prompt_seed=len(self.probes)
        )
        record = Record(request, scheduled_s=request.at_s)
        self.probes.append(record)
        ask(self.session, record, clock=self.clock, headers=self.headers, timeout_s=self.timeout_s)
        answered = record.fingerprint.rpartition("_")[2].partition("-")[0]
        if record.ok and swap.version and answered and not swap.version.startswith(answered):
            record.fail("wrong_version", f"{swap.version} was loaded, {record.fingerprint} answered")

    def _clean_up(self) -> None:
        """Take the name away again, unless the last action did."""
        done = [swap.action for swap in self.swaps if not swap.failure]
        if done and done[-1] != "unload":
            self.swaps.append(self._act("unload", self.clock(), 0))

    def fields(self) -> list[dict[str, Any]]:
        return [asdict(swap) for swap in self.swaps]
