"""Memory that kernels use between their programs, at addresses that stay: captured graphs hold on to them."""

from __future__ import annotations

import torch


class Scratch:
    """Named buffers that only grow. A buffer that was outgrown is kept, since a captured graph may still use it.

    Launches on one stream follow one another, so all of them may use the same buffers.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._buffers: dict[str, torch.Tensor] = {}
        self._outgrown: list[torch.Tensor] = []

    def empty(self, name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        """At least ``count`` elements of anything."""
        return self._get(name, count, dtype)

    def zeros(self, name: str, count: int) -> torch.Tensor:
        """At least ``count`` int32 that are zero at first and that every user leaves at zero."""
        return self._get(name, count, torch.int32)

    def _get(self, name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        held = self._buffers.get(name)
        if held is None or held.numel() < count or held.dtype != dtype:
            if held is not None:
                self._outgrown.append(held)
            held = torch.zeros(max(count, 1), dtype=dtype, device=self._device)
            self._buffers[name] = held
        return held
