"""Steps of one shape queue the same kernels with the same arguments: they are queued by Python once, then run again.

Python takes 4 to 10 milliseconds to queue the four hundred kernels of a step, about half of what it takes to compute
one row of a small model. So what a step queued is kept with the tensors that it read, and a later step of the same
shape only copies its own inputs into those and runs it. The kernels are the same, so are the bits.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from manylora.kernels.cpu.threads import Recording, recorded

_T = TypeVar("_T")

_KEPT = 48
"""Recordings of a thread; one is about 100 KiB and its inputs. A server has steps of few shapes, many of each."""


@dataclass(frozen=True)
class _Kept:
    """Inputs of a recording's own, the same as arrays, what runs over them unless it has to be queued each time, and
    what that writes."""

    inputs: list[torch.Tensor]
    arrays: list[np.ndarray]
    recording: Recording | None
    results: Any


class Recordings(threading.local):
    """What has been recorded, on each thread for itself: scratch memory is a thread's own. ``hits`` counts the runs
    that needed no Python."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self.hits = 0

    def run(
        self,
        key: Hashable,
        inputs: Callable[[], list[torch.Tensor]],
        fill: Callable[[Sequence[np.ndarray]], None],
        compute: Callable[[Sequence[torch.Tensor]], _T],
    ) -> _T:
        """What ``compute(inputs)`` returns, which it writes by queued kernels only, after ``fill`` has put the step's
        numbers into them. It may overwrite its inputs and return them. The results are good until this thread computes
        anything else: they may lie in scratch memory.

        ``key`` stands for everything but the inputs' values that ``compute`` depends on, their shapes too.
        """
        found = self._kept.get(key)
        if found is None:
            return self._record(key, inputs, fill, compute)
        self._kept.move_to_end(key)
        fill(found.arrays)
        if found.recording is None:
            return compute(found.inputs)
        found.recording.run()
        self.hits += 1
        results: _T = found.results
        return results

    def _record(
        self,
        key: Hashable,
        inputs: Callable[[], list[torch.Tensor]],
        fill: Callable[[Sequence[np.ndarray]], None],
        compute: Callable[[Sequence[torch.Tensor]], _T],
    ) -> _T:
        with torch.inference_mode(mode=False), torch.no_grad():  # others may write to them without inference mode
            own = inputs()
        arrays = [tensor.numpy() for tensor in own]
        fill(arrays)
        with recorded() as runs:
            results = compute(own)
        # Had it been run in parts, something would have been computed by others in between.
        self._kept[key] = _Kept(own, arrays, runs[0] if len(runs) == 1 else None, results)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return results
