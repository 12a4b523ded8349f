"""What an adapter version is to those who hold, list or load one. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class AdapterRef:
    """One immutable adapter version under one of its names, as requests, slots and caches hold it.

    Equal and hashed by ``(name, version)``. It carries the small facts that serving a request needs and never the
    weights: those are in the host tier, or only on the disk (see adapters.host_tier). Where weights are meant, on the
    device, in host memory or in a prefix cache, the key is ``version`` alone: two names of equal content share them.
    """

    name: str
    version: str
    """sha256, 64 hexadecimal digits."""
    source: str = field(default="", compare=False)
    """Where the name came from when the reference was made."""
    footprint: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    """What it takes on the device, by kind: ``LoraPool.pages_needed``."""
    nbytes: int = field(default=0, compare=False, repr=False)
    """Bytes of its weights in host memory."""
    not_composable: str | None = field(default=None, compare=False, repr=False)
    """Why it can only be asked for alone and at scale 1; None if it may be rescaled and combined with others."""
    chat_template: str | None = field(default=None, compare=False, repr=False)
    """The adapter's own chat template, if it ships one."""


class Loaded(Protocol):
    """What the registry's ``load`` callable returns; ``LoadedAdapter`` is the plain way to make one."""

    @property
    def version(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def report(self) -> Any: ...
    @property
    def weights(self) -> Any: ...
    @property
    def footprint(self) -> Mapping[str, int]: ...
    @property
    def not_composable(self) -> str | None: ...
    @property
    def chat_template(self) -> str | None: ...


@dataclass(frozen=True)
class LoadedAdapter:
    """A ``Loaded`` by its fields: ``nbytes`` in host memory, ``report`` for people, ``weights`` for the host tier
    (``adapters.weights.AdapterWeights`` in the server), and the facts that become fields of the ``AdapterRef``."""

    version: str
    nbytes: int
    report: Any
    weights: Any
    footprint: Mapping[str, int] = field(default_factory=dict)
    not_composable: str | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class AdapterInfo:
    """A moment's view of one name of one version. ``state`` is "draining" if the name is gone or has moved on to
    another version and requests that came by it still run. ``alias_of`` is the name whose version it was given, if it
    was made so. Times are ``time.time()`` seconds; ``last_used`` is ``None`` before the first use."""

    name: str
    version: str
    source: str
    pinned: bool
    state: Literal["ready", "draining"]
    requests_in_flight: int
    nbytes: int
    loaded_at: float
    last_used: float | None
    alias_of: str | None = None
    report: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class RegistryCounts:
    """Names; names that only finish their requests; references held; and the bytes of all versions' weights, each
    version once, wherever they are now."""

    ready: int
    draining: int
    requests_in_flight: int
    nbytes: int
