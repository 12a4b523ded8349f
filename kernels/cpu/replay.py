"""Steps of one shape queue the same kernels with the same arguments: they are queued by Python once, then run again.

Python takes 4 to 10 milliseconds to queue the four hundred kernels of a step, about half of what it takes to compute
one row of a small model. So what a step queued is kept with the tensors that it read, and a later step of the same
shape only copies its own inputs into those and runs it. The kernels are the same, so are the bits.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch

from manylora.kernels.cpu.threads import Recording, recorded

_KEPT = 48
"""Recordings of a thread; one is about 100 KiB and its inputs. A server has steps of few shapes, many of each."""


class Recordings(threading.local):
    """What has been recorded, on each thread for itself: scratch memory is a thread's own. ``hits`` counts the runs
    that needed no Python."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, tuple[list[torch.Tensor], Recording | None]] = OrderedDict()
        self.hits = 0

    def run(
        self, key: Hashable, inputs: Sequence[torch.Tensor], compute: Callable[[Sequence[torch.Tensor]], None]
    ) -> torch.Tensor:
        """``compute(inputs)`` writes its result into the first input, by queued kernels only; a copy of that.

        ``key`` stands for everything but the inputs' values that ``compute`` depends on, their shapes too.
        """
        found = self._kept.get(key)
        if found is None:
            found = self._record(key, inputs, compute)
        else:
            self._kept.move_to_end(key)
            own, recording = found
            for there, value in zip(own, inputs, strict=True):
                there.copy_(value)
            if recording is None:
                compute(own)
            else:
                recording.run()
                self.hits += 1
        return found[0][0].clone()

    def _record(
        self, key: Hashable, inputs: Sequence[torch.Tensor], compute: Callable[[Sequence[torch.Tensor]], None]
    ) -> tuple[list[torch.Tensor], Recording | None]:
        with torch.inference_mode(mode=False), torch.no_grad():  # others may write to them without inference mode
            own = [value.clone() for value in inputs]
        with recorded() as runs:
            compute(own)
        # Had it been run in parts, something would have been computed by others in between.
        found = own, runs[0] if len(runs) == 1 else None
        self._kept[key] = found
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found
