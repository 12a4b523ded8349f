"""A load test as it was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from loadgen.profiles import Profile
from loadgen.thresholds import Threshold


@dataclass(frozen=True)
class Targets:
    """What a good answer keeps to: see README.md, "Goodput"."""

    ttft_ms: float = 1000.0
    itl_ms: float = 200.0


@dataclass(frozen=True)
class Settings:
    """A load test as it was asked for. With a ``trace`` the profile says only how it is replayed."""

    profile: Profile
    out: Path
    trace: Path | None = None
    n_adapters: int | None = None
    adapters: tuple[str, ...] = ()
    base: str | None = None
    targets: Targets = Targets()
    thresholds: tuple[Threshold, ...] = ()
    warmup_s: float = 0.0
    grace_s: float = 60.0
    timeout_s: float = 300.0
    max_open: int = 512
    bearer: str = field(default="", repr=False)
    admin_bearer: str = field(default="", repr=False)
    swap_upload: Path | None = None
    unlisted_models: bool = False


def bearer(key: str) -> dict[str, str]:
    """The headers that carry a key; none without one."""
    return {"Authorization": f"Bearer {key}"} if key else {}
