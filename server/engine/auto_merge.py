"""Merging by itself: the adapter that most tokens are generated for is merged, until it no longer is. Torch-free.

Off unless asked for (``--auto-merge SHARE:SECONDS[:MODE]``). The step loop counts tokens by version (`TokenShares`, one
addition a row); a thread of its own looks at the counts, lets `AutoMergePolicy` decide, and has the merge made.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from manylora.adapters.errors import AdapterError
from manylora.adapters.versions import AdapterRef
from manylora.server.engine.errors import EngineRefusal
from manylora.server.engine.merges import MODES, MergeInfo, MergeMode
from manylora.server.engine.request import Request, ScheduledRow

_log = logging.getLogger(__name__)

_LOOKS: Final = 10
"""Looks in a window: how finely it slides."""
_RETRY_WINDOWS: Final = 10
"""Windows during which an adapter that could not be merged is not tried again."""


@dataclass(frozen=True)
class AutoMerge:
    """Merge (in ``mode``) an adapter that had more than ``share`` of the tokens generated over the last ``seconds``,
    and unmerge it when it has less than ``keep`` of them."""

    share: float
    seconds: float
    mode: MergeMode = "exact"

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"the share must lie between 0 and 1, got {self.share:g}")
        if not 1.0 <= self.seconds <= 86400.0:
            raise ValueError(f"the seconds must be 1 to 86400, got {self.seconds:g}")
        if self.mode not in MODES:
            raise ValueError(f"the mode must be one of {', '.join(MODES)}, got {self.mode!r}")

    @property
    def keep(self) -> float:
        """A fifth below ``share``: an adapter about there is not merged and unmerged again and again."""
        return 0.8 * self.share

    @classmethod
    def parse(cls, text: str) -> AutoMerge:
        """``"0.8:60"`` or ``"0.8:60:compact"``. ValueError says what is wrong."""
        parts = text.split(":")
        if len(parts) not in (2, 3):
            raise ValueError(f"expected SHARE:SECONDS or SHARE:SECONDS:MODE, such as 0.8:60:compact, got {text!r}")
        try:
            share, seconds = float(parts[0]), float(parts[1])
        except ValueError:
            raise ValueError(f"expected numbers in SHARE:SECONDS, got {text!r}") from None
        mode = parts[2] if len(parts) == 3 else "exact"
        return cls(share, seconds, mode)  # type: ignore[arg-type]  # checked by the class


class TokenShares:
    """Tokens generated since the last look, by version; "" for all that could not be merged: the base, compositions,
    other scales. Counted by the step loop, taken by another thread."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._refs: dict[str, AdapterRef] = {}

    def count(self, rows: Sequence[ScheduledRow]) -> None:
        """Those of a step that were sampled."""
        self.count_for(row.request for row in rows if row.sample)

    def count_for(self, requests: Iterable[Request]) -> None:
        """One token of each."""
        counts = self._counts
        for request in requests:
            uses = request.adapters
            if len(uses) == 1 and uses[0].scale == 1.0:
                ref = uses[0].ref
                counts[ref.version] += 1
                self._refs[ref.version] = ref
            else:
                counts[""] += 1

    def take(self) -> tuple[Mapping[str, int], Mapping[str, AdapterRef]]:
        """The counts, which begin anew, and what the versions are called. A step that is counting at this moment may
        put its tokens into either."""
        counts, refs = self._counts, self._refs
        self._counts, self._refs = Counter(), {}
        return counts, refs


@dataclass(frozen=True)
class Promote:
    version: str


@dataclass(frozen=True)
class Demote:
    pass


Decision = Promote | Demote | None


class AutoMergePolicy:
    """Decides by a sliding window over what it is told; time is the caller's.

    Nothing is decided before a whole window has been seen, nor, after a change, before another whole one. A window
    without any token changes nothing: an idle merge costs memory alone, and is what the next request will want.
    """

    def __init__(self, settings: AutoMerge) -> None:
        self._settings = settings
        self._seen: deque[tuple[float, Mapping[str, int]]] = deque()
        self._since: float | None = None
        self._not_before: dict[str, float] = {}

    def observe(self, now: float, counts: Mapping[str, int], merged: str | None) -> Decision:
        """Tell the tokens since the last call, by version; ``merged``: the version that this policy has merged."""
        if self._since is None:
            self._since = now
        self._seen.append((now, counts))
        while self._seen and self._seen[0][0] <= now - self._settings.seconds:
            self._seen.popleft()
        self._not_before = {version: at for version, at in self._not_before.items() if at > now}
        if now - self._since < self._settings.seconds:
            return None
        totals: Counter[str] = Counter()
        for _, one in self._seen:
            totals.update(one)
        total = totals.total()
        if total == 0:
            return None
        version, most = max(((v, n) for v, n in totals.items() if v), key=lambda item: item[1], default=("", 0))
        if merged is not None and totals[merged] >= self._settings.keep * total:
            return None
        if most > self._settings.share * total and version != merged and version not in self._not_before:
            return Promote(version)
        return Demote() if merged is not None else None

    def changed(self, now: float) -> None:
        """A decision was carried out: look at a whole window before the next."""
        self._since = now
        self._seen.clear()

    def failed(self, now: float, version: str) -> None:
        """A version could not be merged: leave it for a while."""
        self._not_before[version] = now + _RETRY_WINDOWS * self._settings.seconds


class Merges(Protocol):
    """What is used of ``merges.MergeManager``."""

    @property
    def current(self) -> MergeInfo | None: ...
    def merge(self, name: str, mode: str, *, version: str | None, automatic: bool) -> MergeInfo: ...
    def unmerge(self, *, only: MergeInfo | None) -> MergeInfo: ...


class AutoMerger:
    """The thread. What an admin has merged by hand it leaves alone."""

    def __init__(
        self,
        settings: AutoMerge,
        merges: Merges,
        shares: TokenShares,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._merges, self._shares, self._clock = settings, merges, shares, clock
        self._policy = AutoMergePolicy(settings)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="manylora-auto-merge", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Does not wait for a merge that is being made."""
        self._stop.set()

    def look(self) -> None:
        """Once: take the counts, decide, and carry it out."""
        counts, refs = self._shares.take()
        current = self._merges.current
        own = current if current is not None and current.automatic else None
        now = self._clock()
        decision = self._policy.observe(now, counts, None if own is None else own.version)
        if decision is None or (current is not None and own is None):
            return
        version = decision.version if isinstance(decision, Promote) else ""
        try:
            if isinstance(decision, Demote):
                self._merges.unmerge(only=own)
                _log.info("automatically unmerged adapter %s", own.name if own is not None else "")
            else:
                ref = refs.get(version)
                if ref is None:  # none of its tokens are of this look: the next one has some, or it is over
                    return
                self._merges.merge(ref.name, self._settings.mode, version=version, automatic=True)
        except (EngineRefusal, AdapterError, OSError, MemoryError, RuntimeError) as error:  # torch's OOM is the last
            _log.warning("adapter could not be merged or unmerged automatically: %s", error)
            if version:
                self._policy.failed(now, version)
            return
        self._policy.changed(self._clock())

    def _run(self) -> None:
        while not self._stop.wait(self._settings.seconds / _LOOKS):
            try:
                self.look()
            except Exception:  # noqa: BLE001 - the boundary of the thread: serving goes on without it being right
                _log.exception("the automatic merge failed; it is tried again")
