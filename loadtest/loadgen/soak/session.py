"""One soak: a fresh server, what it answers when asked alone, everything at random for so long, and an orderly end."""

from __future__ import annotations

import contextlib
import functools
import random
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from loadgen.errors import TargetError
from loadgen.fresh_server import DEMO_FLAGS, FreshServer, fresh_process
from loadgen.soak import traffic
from loadgen.soak.admin import (
    ALIAS,
    COMES_AND_GOES,
    FIXED_MERGED,
    MERGED,
    REPLACED,
    Admin,
    Merger,
    Swapper,
    Version,
)
from loadgen.soak.answers import ANSWER_S
from loadgen.soak.judge import Judge
from loadgen.soak.questions import QUESTIONS, Recorder
from loadgen.soak.vitals import Sample, sample
from loadgen.soak.world import ABSENT, Composition, Uses, World, composition, short
from loadgen.soak.wrong_requests import MAX_BODY, Wrong, broken_adapters, wrong_requests
from tests.e2e.adapters import write_adapter

BASE = DEMO_FLAGS[DEMO_FLAGS.index("--served-model-name") + 1]
DEMO_ADAPTERS = ("json", "pirate", "sql")
SERVER_FLAGS = (
    *DEMO_FLAGS,
    # Small, so that everything is fought for, and so that all of it is soon touched: memory that was never used before
    # would look like a leak. Two requests of the longest kind fill the keys and values.
    *("--device", "cpu", "--max-context", "512", "--kv-memory", "48MiB", "--prefix-cache", "on"),
    *("--max-rows", "6", "--max-batch-tokens", "96", "--max-device-adapters", "4", "--max-host-adapters", "4"),
    *("--max-body", str(MAX_BODY)),
)
INTEGRITY_PASSED = "integrity check passed"
"""What the server logs when it has ended with nothing lost."""
SCRATCH = "soak-reference"
"""The name under which versions are asked before the soak."""
_RANKS = (4, 8, 16, 12)
_IDLE_S = 60.0
_SAMPLE_S = 2.0
_SETTLED_S = 5.0
"""After a merge has ended: by then no request is bound to its weights any more."""
_PROGRESS_S = 15.0


@dataclass(frozen=True)
class SoakSettings:
    """As it was asked for. Pauses in seconds, on average."""

    minutes: float
    seed: int
    out: Path
    versions: int = 3
    clients: int = 5
    admin_pause_s: float = 3.0
    wrong_pause_s: float = 0.5
    server_flags: tuple[str, ...] = ()


@dataclass
class Soak:
    """``run`` it once; the rest is for the summary."""

    settings: SoakSettings
    judge: Judge = field(init=False)
    samples: list[Sample] = field(default_factory=list)
    prepared_s: float = 0.0
    soaked_s: float = 0.0
    interrupted: bool = False
    exit_code: int | None = None
    integrity: str = ""
    """What the server's log said of it at the end; empty if nothing."""
    digests: dict[Path, str] = field(default_factory=dict)
    """Of the adapters that were written, by folder: the part of the version that a fingerprint has."""

    def run(self) -> None:
        """TargetError if no server starts, or it cannot even answer alone; httpx.HTTPError if it is gone by then."""
        log = self.settings.out / "server.log"
        with tempfile.TemporaryDirectory(prefix="soak-") as name:
            folder = Path(name)
            flags = [*SERVER_FLAGS, "--adapter-root", str(folder), *self.settings.server_flags]
            with fresh_process(flags, log) as server, _client(server.url) as client:
                versions = self._write(folder)
                self._prepare(client, versions)
                broken = broken_adapters(folder)
                admins = self._admins(server.url, versions)
                for admin, names in zip(admins, ((REPLACED, COMES_AND_GOES), (MERGED,)), strict=True):
                    for adapter in names:
                        admin.load(adapter, admin.any_version(adapter))
                self._soak(server, admins, broken)
                self._look_at_the_end(client)
                self.exit_code = server.end()
        self._read_log(log.read_text(errors="replace"))

    # --- before --------------------------------------------------------------------------------------------------

    def _write(self, folder: Path) -> dict[str, list[Path]]:
        """Random adapters: for each name that changes so many contents, all of different weights."""
        seeds = iter(range(1000 * self.settings.seed, 1000 * self.settings.seed + 1000))
        return {
            name: [
                write_adapter(folder / f"{name}-{i}", next(seeds), rank=_RANKS[i % len(_RANKS)])
                for i in range(self.settings.versions)
            ]
            for name in (REPLACED, COMES_AND_GOES, MERGED)
        }

    def _prepare(self, client: httpx.Client, sources: dict[str, list[Path]]) -> None:
        """Ask for every reference, and make the judge."""
        began = time.monotonic()
        print("asking for the references: each question to each version, alone ...", flush=True)
        recorder = Recorder(client, BASE)
        recorder.record(())
        digests = {name: recorder.record(((name, 1.0),)) for name in DEMO_ADAPTERS}
        compositions: dict[Composition, str] = {}

        def compose(uses: Uses, found: dict[str, str]) -> None:
            key = composition([found[name] for name, _ in uses], [scale for _, scale in uses])
            compositions[key] = recorder.record(uses)

        for name, paths in sources.items():
            for path in paths:
                said = short(_put(client, SCRATCH, path))
                self.digests[path] = digest = recorder.record(((SCRATCH, 1.0),))
                if digest != said:
                    raise TargetError(f"{path.name}: {said} was loaded, {digest} answered")
                for uses in traffic.COMPOSED:
                    if name in (used for used, _ in uses):
                        as_scratch = tuple((SCRATCH if used == name else used, scale) for used, scale in uses)
                        compose(as_scratch, {**digests, SCRATCH: digest})
                if name == MERGED:
                    self._record_merged(client, recorder, SCRATCH)
        for uses in traffic.COMPOSED:
            if all(name in DEMO_ADAPTERS for name, _ in uses):
                compose(uses, digests)
        self._record_merged(client, recorder, FIXED_MERGED)
        _ok(client.delete(f"/v1/adapters/{SCRATCH}"))
        if len(set(self.digests.values())) != len(self.digests):
            raise TargetError(f"two of {len(self.digests)} adapters have one digest")
        world = World(digests, (REPLACED, COMES_AND_GOES, MERGED, ALIAS), compositions)
        self.judge = Judge(recorder.references, world)
        self.prepared_s = time.monotonic() - began
        print(f"{len(recorder.references)} references in {self.prepared_s:.0f} s", flush=True)

    @staticmethod
    def _record_merged(client: httpx.Client, recorder: Recorder, name: str) -> None:
        for mode in ("exact", "compact"):
            _ok(client.post(f"/v1/adapters/{name}/merge", json={"mode": mode}))
            if not recorder.record(((name, 1.0),)).endswith(f"-{mode}"):
                raise TargetError(f"{name} is merged ({mode}), but its answers do not say so")
        _ok(client.post("/v1/adapters/unmerge"))

    # --- meanwhile -----------------------------------------------------------------------------------------------

    def _admins(self, url: str, sources: dict[str, list[Path]]) -> tuple[Admin, Admin]:
        versions = {name: [Version(path, self.digests[path]) for path in paths] for name, paths in sources.items()}
        made = [
            kind(_client(url), self.judge, self.judge.world, versions, f"{self.settings.seed} {kind.__name__}")
            for kind in (Swapper, Merger)
        ]
        return made[0], made[1]

    def _soak(self, server: FreshServer, admins: tuple[Admin, Admin], broken: tuple[Wrong, ...]) -> None:
        settings, judge = self.settings, self.judge
        stopping = threading.Event()
        url, seed = server.url, settings.seed
        # Bound at once: a loop's variable would be the last one in all of them.
        bound = functools.partial
        jobs = [
            *(bound(admin.run, stopping, settings.admin_pause_s) for admin in admins),
            bound(
                traffic.be_wrong, _client(url), judge, wrong_requests(BASE), broken, f"{seed} wrong", stopping,
                settings.wrong_pause_s,
            ),
            bound(traffic.monitor, _client(url), judge, stopping, 1.0),
            *(
                bound(traffic.be_a_client, _client(url), judge, judge.world, BASE, f"{seed} client {i}", stopping)
                for i in range(settings.clients)
            ),
        ]  # fmt: skip
        began = time.monotonic()
        threads = [traffic.in_thread(f"soak-{i}", job, judge) for i, job in enumerate(jobs)]
        try:
            self._watch(server, began)
        except KeyboardInterrupt:
            self.interrupted = True
            print("interrupted: waiting for what is under way", flush=True)
        stopping.set()
        self.soaked_s = time.monotonic() - began
        deadline = time.monotonic() + 2 * ANSWER_S
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        if hanging := sum(thread.is_alive() for thread in threads):
            judge.fail("broken answer", f"{hanging} clients still wait for an answer after {2 * ANSWER_S:g} s")

    def _watch(self, server: FreshServer, began: float) -> None:
        """Sample the process and say how it goes, until the time is over or the server is gone."""
        merging = self.judge.world.merging
        last_merged = told = -1e9
        while (now := time.monotonic() - began) < self.settings.minutes * 60:
            if server.process.poll() is not None:
                self.judge.fail("the server", f"ended with exit code {server.process.returncode} in the middle")
                return
            if merging.is_set():
                last_merged = now
            with contextlib.suppress(OSError):  # it ended just now: the next turn says so
                self.samples.append(sample(server.process.pid, now, now - last_merged > _SETTLED_S))
            if now - told >= _PROGRESS_S:
                told = now
                print(self._progress(now), flush=True)
            time.sleep(_SAMPLE_S)

    def _progress(self, now: float) -> str:
        done, judge = self.judge.done, self.judge
        loads = sum(done[kind] for kind in ("loads", "replacements", "unloads"))
        merges = sum(n for kind, n in done.items() if kind.startswith("merges"))
        left = sum(n for kind, n in done.items() if kind.startswith("left"))
        rss = f"{self.samples[-1].rss / (1 << 20):.0f} MiB" if self.samples else "?"
        return (
            f"{now / 60:5.1f} of {self.settings.minutes:g} min: {judge.checked} answers checked, {left} left, "
            f"{loads} loads, {merges} merges, {done['wrong requests'] + done['broken adapters']} wrong requests, "
            f"RSS {rss}, {judge.failed.total()} failures"
        )

    # --- afterwards ----------------------------------------------------------------------------------------------

    def _look_at_the_end(self, client: httpx.Client) -> None:
        """With nothing going on: nothing is held, and the answers are what they were at the beginning."""
        if self.judge.failed["the server"]:
            return
        try:
            left = self._wait_until_idle(client)
        except (httpx.HTTPError, LookupError, ValueError) as error:
            left = f"it cannot be asked: {error!r}"
        if left:
            self.judge.fail("not idle", f"{_IDLE_S:g} s after the last request: {left}")
            return
        recorder = Recorder(client, BASE)
        names = [name for name, possible in self.judge.world.names.items() if ABSENT not in possible.now()]
        for uses in [(), *(((name, 1.0),) for name in names)]:
            question = random.Random(f"{self.settings.seed} {uses}").choice(QUESTIONS)
            moments = self.judge.world.moments(uses)
            try:
                self.judge.answered(recorder.alone(question, uses), moments, recorder.ask(question, uses))
            except TargetError as error:
                self.judge.fail("refused", f"at the end: {error}")

    def _wait_until_idle(self, client: httpx.Client) -> str:
        """What is still in use; "" if nothing."""
        deadline = time.monotonic() + _IDLE_S
        while True:
            metrics = client.get("/metrics").text
            busy = [
                line
                for gauge in ("vllm:num_requests_running", "vllm:num_requests_waiting")
                for line in metrics.splitlines()
                if line.startswith(gauge + "{") and not line.endswith(" 0.0")
            ]
            listed = client.get("/v1/adapters").json()["data"]
            busy += [f"{one['name']} {one['state']}" for one in listed if one["state"] != "ready"]
            busy += [f"{one['name']} is held" for one in listed if one["requests_in_flight"]]
            if not busy or time.monotonic() > deadline:
                return "; ".join(busy)
            time.sleep(0.2)

    def _read_log(self, log: str) -> None:
        self.integrity = next((line for line in log.splitlines() if "integrity check" in line), "")
        if self.exit_code:
            self.judge.fail("the server", f"exit code {self.exit_code} after SIGTERM")
        if INTEGRITY_PASSED not in log or "integrity check failed" in log:
            self.judge.fail("integrity", self.integrity or "the log has no word of an integrity check at the end")
        errors = [line for line in log.splitlines() if " ERROR " in line or " CRITICAL " in line or "Traceback" in line]
        if errors:
            self.judge.fail("errors in the log", f"{len(errors)} lines, the first: {errors[0][:500]}")


def _client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=ANSWER_S)


def _ok(response: httpx.Response) -> httpx.Response:
    """TargetError unless it was done."""
    if not response.is_success:
        raise TargetError(f"{response.request.method} {response.request.url.path}: {response.text[:1000]}")
    return response


def _put(client: httpx.Client, name: str, source: Path) -> str:
    """Load it; its version."""
    return str(_ok(client.put(f"/v1/adapters/{name}", json={"source": str(source)})).json()["version"])
