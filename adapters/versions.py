"""What an adapter version is to those who hold, list or load one. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class AdapterRef:
    """One immutable adapter version, as requests, slots and caches hold it.

    Equal and hashed by ``(name, version)``: equal content under one name is the same adapter. ``weights`` is opaque
    here (``adapters.weights.AdapterWeights`` in the server), so that this module needs no torch.
    """

    name: str
    version: str
    """sha256, 64 hexadecimal digits."""
    weights: Any = field(default=None, compare=False, repr=False)
    source: str = field(default="", compare=False)


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


@dataclass(frozen=True)
class LoadedAdapter:
    """A ``Loaded`` by its fields: ``nbytes`` in host memory, ``report`` for people, ``weights`` for the engine."""

    version: str
    nbytes: int
    report: Any
    weights: Any


@dataclass(frozen=True)
class AdapterInfo:
    """A moment's view of one version. ``state`` is "draining" if its name is gone or has moved on to another version
    and requests still run on it. Times are ``time.time()`` seconds; ``last_used`` is ``None`` before the first use."""

    name: str
    version: str
    source: str
    pinned: bool
    state: Literal["ready", "draining"]
    requests_in_flight: int
    nbytes: int
    loaded_at: float
    last_used: float | None
    report: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class RegistryCounts:
    """Versions that have a name, versions that only finish their requests, references held, bytes of host memory."""

    ready: int
    draining: int
    requests_in_flight: int
    nbytes: int
