"""One adapter merged into a copy of the weights: which one, for which requests, and until when. Torch-free.

A *merged model* is made beside the base, which is never touched, and is another decoder over the same KV cache. A
request is *bound* to it when its adapter is resolved, if it asks for just that version alone and at scale 1, and keeps
it to its end. Everybody else's rows are computed by the base's decoder as always, in the same steps: nobody's bits
change while a merge is on, and none pays for what it does not use.

How a merge ends:

- ``unmerge``, or another merge, which is made in full before it takes the old one's place;
- the version is freed (its last name was taken away or given to another version, and its last request has ended):
  nobody can ask for it any more. A merged model holds no reference to its version, as it has all that it needs, so it
  never keeps one alive; while it is being made, it does hold one.

No request is bound after that. The copy is let go when the last bound request has ended, or at once if there is none.

Threads: ``merge`` and ``unmerge`` may take minutes and are for a thread of an admin's; one of them at a time, a second
one is refused. ``bind``, ``release`` and ``version_freed`` only ever hold ``_lock``, for a few assignments.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Final, Literal, Protocol, get_args

from manylora.adapters.errors import AdapterNotFound
from manylora.adapters.versions import AdapterRef
from manylora.server.engine.errors import EngineDraining, MergeBusy, MergeRefused
from manylora.server.engine.heap import give_back_soon

_log = logging.getLogger(__name__)

MergeMode = Literal["exact", "compact"]
MODES: Final = get_args(MergeMode)

_MIB: Final = 1 << 20
_merge_numbers: Final = count(1)
_LOST: Final = 0.25
"""Drift, as a share of the adapter's own effect, from which on it is warned of."""


@dataclass(frozen=True)
class Difference:
    """Of two computations' logits, absolute, over all positions of the probe prompt and all of the vocabulary."""

    max: float
    mean: float


@dataclass(frozen=True)
class Measured:
    """``drift``: merged logits against those of the unmerged adapter. ``effect``: the latter against the base's, so how
    much there is to lose."""

    drift: Difference
    effect: Difference


@dataclass(frozen=True)
class MergeInfo:
    """A merge that was made. ``nbytes``: of the weights that it does not share with the base; ``seconds`` that it took;
    ``automatic``: nobody asked for it."""

    name: str
    version: str
    mode: MergeMode
    nbytes: int
    measured: Measured
    seconds: float
    automatic: bool = False

    @property
    def warnings(self) -> tuple[str, ...]:
        drift, effect = self.measured.drift.mean, self.measured.effect.mean
        if drift <= _LOST * effect:
            return ()
        hint = "; mode exact keeps it" if self.mode == "compact" else ""
        return (
            f"merging loses much of this adapter: its logits drift by {drift:.3g} on average, where the adapter itself "
            f"changes the base's by {effect:.3g}{hint}",
        )


class Size(Protocol):
    """Bytes: ``kept`` as long as the merged model lives, ``working`` while it is being made besides."""

    @property
    def kept(self) -> int: ...
    @property
    def working(self) -> int: ...


class Builder(Protocol):
    """Makes merged models; ``server.engine.merge_builder`` is the real one. Weights and decoders are opaque here."""

    def size(self, weights: Any, mode: MergeMode) -> Size: ...
    def free_bytes(self) -> int: ...
    def build(self, weights: Any, mode: MergeMode, name: str) -> tuple[Any, int]:
        """The decoder, and the bytes it has of its own. Raises MergeRefused; CancelledError after ``stop``."""

    def stop(self) -> None:
        """End what is being built, and build nothing more."""

    def measure(self, decoder: Any, weights: Any) -> Measured:
        """Raises CancelledError if the engine has stopped."""

    def warm_up(self, model: MergedModel) -> None:
        """Whatever its first step would have to wait for. Raises as ``measure`` does."""


class Registry(Protocol):
    """What is used of ``adapters.registry.AdapterRegistry``."""

    def acquire(self, name: str) -> AdapterRef: ...
    def release(self, ref: AdapterRef) -> None: ...


class MergedModel:
    """What a bound request holds (``Request.merged``); it is computed by ``decoder``."""

    def __init__(self, manager: MergeManager, info: MergeInfo, decoder: Any) -> None:
        self.info = info
        self.identity = f"{info.version}:{info.mode}:{next(_merge_numbers)}"
        """No other merge has it: what these weights compute is shared among their own requests only."""
        self.graphs: Any = None
        """The runner's, made when they are first needed; they go with the decoder."""
        self._manager = manager
        self._decoder = decoder
        self.bound = 0
        """Bound requests; under the manager's lock."""

    @property
    def decoder(self) -> Any:
        if self._decoder is None:
            raise RuntimeError(
                f"the merged weights of adapter {self.info.name} were computed with after they were freed"
            )
        return self._decoder

    @property
    def is_freed(self) -> bool:
        return self._decoder is None

    def release(self) -> None:
        """A bound request has ended."""
        self._manager.release(self)

    def free(self) -> None:
        """For the manager: let go of the weights. Who still holds this object, an ended request, keeps no memory."""
        self._decoder = self.graphs = None


class MergeManager:
    """See the module's text.

    Args:
        registry: names and references.
        fetch: an adapter's weights in host memory; may wait for the disk. Raises AdapterError.
        builder: see ``Builder``.
    """

    def __init__(self, registry: Registry, fetch: Callable[[AdapterRef], Any], builder: Builder) -> None:
        self._registry, self._fetch, self._builder = registry, fetch, builder
        self._changing = threading.Lock()
        self._lock = threading.Lock()
        self._current: MergedModel | None = None
        self._ending: list[MergedModel] = []  # no longer current, and requests are still bound
        self._is_closed = False

    # --- admins ----------------------------------------------------------------------------------------------------

    def merge(
        self, name: str, mode: str = "exact", *, version: str | None = None, automatic: bool = False
    ) -> MergeInfo:
        """Merge the version that ``name`` means now, and bind its requests to it from now on. Blocks until it is done.

        An error leaves things as they were. Merging what is merged already, in the same mode, changes nothing.
        ``version``: merge only if the name still means it.

        Raises AdapterNotFound (also if the name is taken away meanwhile), MergeBusy, MergeRefused with the reason (for
        a lack of memory with the numbers), EngineDraining, AdapterError if its weights cannot be read.
        """
        if mode not in MODES:
            raise MergeRefused(f"`mode` must be one of {', '.join(MODES)}, got {mode!r}.", param="mode")
        with _Exclusive(self._changing):
            ref = self._registry.acquire(name)
            try:
                current = self._current
                if current is not None and (current.info.version, current.info.mode) == (ref.version, mode):
                    # What somebody asked for stays until somebody asks for the contrary.
                    current.info = replace(current.info, automatic=current.info.automatic and automatic)
                    return current.info
                if version is not None and version != ref.version:
                    raise AdapterNotFound(name)
                # ``mode`` is one of MODES, which mypy cannot see.
                model = self._make(ref, mode, automatic)  # type: ignore[arg-type]
                self._switch(model)
            finally:
                # It may be freed by that, with what it was merged for: ``version_freed`` then ends this merge, too.
                self._registry.release(ref)
            if self._current is not model:
                raise AdapterNotFound(name)
        give_back_soon()  # what it was computed in
        _log.info(
            "adapter %s (version %s) is merged (%s): %d MiB, logits drift by %.3g at most and %.3g on average (the "
            "adapter's own effect is %.3g), made in %.1f s",
            name,
            ref.version[:12],
            mode,
            model.info.nbytes // _MIB,
            model.info.measured.drift.max,
            model.info.measured.drift.mean,
            model.info.measured.effect.mean,
            model.info.seconds,
        )
        for warning in model.info.warnings:
            _log.warning("adapter %s: %s", name, warning)
        return model.info

    def unmerge(self, *, only: MergeInfo | None = None) -> MergeInfo:
        """Bind no more requests; what was merged. ``only``: if it is still that merge.

        Raises MergeRefused if nothing is merged (or something else is), MergeBusy.
        """
        with _Exclusive(self._changing):
            current = self._current
            if current is None or (only is not None and current.info is not only):
                raise MergeRefused("No adapter is merged.")
            self._switch(None)
        _log.info("adapter %s (version %s) is no longer merged", current.info.name, current.info.version[:12])
        return current.info

    def close(self) -> None:
        """The server is going down: end the merge, and let none begin."""
        with self._lock:
            self._is_closed = True
        self._builder.stop()
        self._switch(None)

    # --- requests --------------------------------------------------------------------------------------------------

    def bind(self, ref: AdapterRef, scale: float = 1.0, count: int = 1) -> MergedModel | None:
        """The merged model for ``count`` requests for ``ref`` alone, each to be released once; None if it is not merged
        or is asked for at another scale."""
        current = self._current  # without the lock: nearly always None
        if current is None or scale != 1.0 or count < 1 or current.info.version != ref.version:
            return None
        with self._lock:
            if self._current is not current:
                return None
            current.bound += count
            return current

    def release(self, model: MergedModel) -> None:
        """See ``MergedModel.release``. RuntimeError if nothing is bound."""
        with self._lock:
            if model.bound < 1:
                raise RuntimeError(f"the merged adapter {model.info.name} was released more often than it was bound")
            model.bound -= 1
            ended = self._ended()
        _free(ended)

    def version_freed(self, ref: AdapterRef) -> None:
        """A version has neither a name nor a reference any more (``AdapterRegistry.when_freed``)."""
        with self._lock:
            current = self._current
            if current is None or current.info.version != ref.version:
                return
            ended = self._replace(None)
        _free(ended)
        _log.info("adapter %s was unloaded or replaced, so it is no longer merged", current.info.name)

    # --- looking ---------------------------------------------------------------------------------------------------

    @property
    def current(self) -> MergeInfo | None:
        """What requests are bound to now."""
        current = self._current
        return None if current is None else current.info

    def check_integrity(self, *, idle: bool = False) -> None:
        """Raise RuntimeError, with the numbers, if a copy was lost; ``idle``: or if a request is still bound."""
        with self._lock:
            living = [*self._ending, *([] if self._current is None else [self._current])]
            bound = {model.info.name: model.bound for model in living}
            if any(model.is_freed or model.bound < 0 for model in living):
                raise RuntimeError(f"merges: a merged model in use was freed; bound: {bound}")
            if any(model.bound == 0 for model in self._ending):
                raise RuntimeError(f"merges: a copy without requests was not freed; bound: {bound}")
            if idle and any(bound.values()):
                raise RuntimeError(f"merges: requests are bound while idle: {bound}")

    # --- inside ----------------------------------------------------------------------------------------------------

    def _make(self, ref: AdapterRef, mode: MergeMode, automatic: bool) -> MergedModel:
        began = time.monotonic()
        try:
            weights = self._fetch(ref)
        except CancelledError:  # the host tier was closed
            raise EngineDraining from None
        size, free = self._builder.size(weights, mode), self._builder.free_bytes()
        if size.kept + size.working > free:
            hint = "; mode compact takes less" if mode == "exact" else ""
            raise MergeRefused(
                f"Merging `{ref.name}` in mode {mode} takes {size.kept} bytes for the merged weights and "
                f"{size.working} more while they are made, but {free} bytes are free{hint}."
            )
        _log.info("merging adapter %s (%s): %d MiB to be kept", ref.name, mode, size.kept // _MIB)
        model: MergedModel | None = None
        try:
            decoder, nbytes = self._builder.build(weights, mode, ref.name)
            nothing = Difference(0.0, 0.0)
            info = MergeInfo(ref.name, ref.version, mode, nbytes, Measured(nothing, nothing), 0.0, automatic)
            model, decoder = MergedModel(self, info, decoder), None
            measured = self._builder.measure(model.decoder, weights)
            self._builder.warm_up(model)
        except BaseException as error:
            if model is not None:
                model.free()  # whoever keeps the error, with its traceback, keeps no copy
            if isinstance(error, CancelledError):
                raise EngineDraining from None
            raise
        model.info = replace(info, measured=measured, seconds=time.monotonic() - began)
        return model

    def _switch(self, model: MergedModel | None) -> None:
        with self._lock:
            if model is not None and self._is_closed:
                model.free()
                raise EngineDraining
            ended = self._replace(model)
        _free(ended)

    def _replace(self, model: MergedModel | None) -> list[MergedModel]:
        """Caller holds ``_lock``, and frees what is returned without it."""
        old, self._current = self._current, model
        if old is not None:
            self._ending.append(old)
        return self._ended()

    def _ended(self) -> list[MergedModel]:
        """As ``_replace``."""
        ended = [model for model in self._ending if model.bound == 0]
        self._ending = [model for model in self._ending if model.bound]
        return ended


def _free(models: Sequence[MergedModel]) -> None:
    for model in models:  # giving gigabytes back takes a while: nobody is to wait for a lock meanwhile
        model.free()
    if models:
        give_back_soon()


class _Exclusive:
    """One change at a time; MergeBusy instead of waiting for what may take minutes."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise MergeBusy

    def __exit__(self, *_: object) -> None:
        self._lock.release()
