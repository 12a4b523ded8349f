"""Memory for the results of queued kernels, taken again and again in the order in which the kernels will run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_BLOCK = 1 << 20
"""Smallest block, in fp32 values: 4 MiB."""
_ALIGN = 16
"""fp32 values of a cache line."""


class Scratch(threading.local):
    """A stack of fp32 blocks, one for each thread. What is taken within a ``scope`` is free again when that ends, even
    if the kernels that use it have only been queued: they run in order, so one that is queued later for the same memory
    finds it done with. A layer's intermediate results thus lie where the last layer's did, still in the cache."""

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []
        self._depth = 0
        self._block = 0
        self._used = 0

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        block, used = self._block, self._used
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            self._block, self._used = block, used

    def empty(self, rows: int, width: int) -> torch.Tensor:
        """``[rows, width]`` fp32, uninitialised; outside any scope an ordinary tensor."""
        if self._depth == 0:
            return torch.empty(rows, width)
        count = rows * width
        while True:
            if self._block == len(self._blocks):
                self._blocks.append(torch.empty(max(_rounded_up(count), _BLOCK)))
            block = self._blocks[self._block]
            if self._used + count <= block.numel():
                taken = block.as_strided((rows, width), (width, 1), self._used)
                self._used += -(-count // _ALIGN) * _ALIGN
                return taken
            if self._used == 0:  # nothing of it is taken: make it large enough, seldom, as recordings keep the old one
                self._blocks[self._block] = torch.empty(_rounded_up(count))
            else:
                self._block, self._used = self._block + 1, 0


def _rounded_up(count: int) -> int:
    """The next power of two: whatever is asked for, one after the other, is little more than the largest in all."""
    return 1 << (count - 1).bit_length()
