"""How many bytes a second a device's memory gives: what a decode step, which reads all weights once, cannot be faster
than."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import torch

_BYTES: Final = 128 << 20
"""Several times what a processor's last cache keeps of it."""
_PASSES: Final = 10


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second, and how they are known."""

    bytes_per_second: float
    source: str


def measure_bandwidth(device: torch.device) -> Bandwidth:
    """The fastest of a few passes over a buffer, in some tens of milliseconds: reads by all of torch's threads on a
    CPU, copies (read and written bytes both count) on CUDA."""
    values = torch.ones(_BYTES // 8, dtype=torch.int64, device=device)
    best = min(_seconds(values) for _ in range(_PASSES))
    if device.type == "cuda":
        return Bandwidth(2 * _BYTES / best, f"measured: copies on {torch.cuda.get_device_name(device)}")
    threads = torch.get_num_threads()
    return Bandwidth(_BYTES / best, f"measured: {threads} thread{'s' if threads > 1 else ''} reading")


def _seconds(values: torch.Tensor) -> float:
    """Of one pass; the first also warms up, and is not the fastest."""
    if values.device.type == "cuda":
        target = torch.empty_like(values)
        torch.cuda.synchronize(values.device)
        began = time.perf_counter()
        target.copy_(values)
        torch.cuda.synchronize(values.device)
        return time.perf_counter() - began
    began = time.perf_counter()
    values.sum()
    return time.perf_counter() - began
