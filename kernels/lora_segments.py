"""Which rows of a batch use which adapter, sorted so that a kernel meets each adapter once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LoraSegments:
    """Pairs (row, slot, scale), those of a slot together: ``offsets[s] .. offsets[s + 1] - 1`` belong to ``slots[s]``.

    ``rows`` int32 ``[P]`` (ascending within a segment, none twice), ``scales`` fp32 ``[P]``, ``slots`` int32 ``[S]``
    (distinct, in any order), ``offsets`` int32 ``[S + 1]``; all on the pool's device. The ``host_*`` are the same on
    the host, so that scheduling work by them never waits for the device.

    A row may be in several segments. Its deltas are added up in the order of the segments, so whoever makes them must
    put the same adapters in the same order each time if the row is to have the same bits each time: the engine sorts
    by version, as slots change.
    """

    rows: torch.Tensor
    scales: torch.Tensor
    slots: torch.Tensor
    offsets: torch.Tensor
    slot_list: tuple[int, ...]
    host_rows: Ints
    host_scales: Floats
    host_offsets: Ints

    @classmethod
    def from_arrays(
        cls, rows: Ints, scales: Floats, slots: Iterable[int], offsets: Ints, device: torch.device | str = "cpu"
    ) -> LoraSegments:
        """Pairs that lie together already."""
        slot_list = tuple(slots)
        there = [torch.from_numpy(array).to(device) for array in (rows, scales, np.array(slot_list, np.int32), offsets)]
        return cls(there[0], there[1], there[2], there[3], slot_list, rows, scales, offsets)

    @classmethod
    def from_pairs(
        cls, pairs: Iterable[tuple[int, int, float]], device: torch.device | str = "cpu"
    ) -> LoraSegments | None:
        """Sort pairs, in any order, into segments by ascending slot; None if there are none. Slot -1 (a base row) is
        left out; the scales of a slot that is named twice for one row add up."""
        merged: dict[tuple[int, int], float] = {}
        for row, slot, scale in pairs:
            if slot >= 0:
                merged[slot, row] = merged.get((slot, row), 0.0) + scale
        ordered = sorted(merged)
        if not ordered:
            return None
        slots = sorted({slot for slot, _ in ordered})
        offsets = np.searchsorted([slot for slot, _ in ordered], [*slots, slots[-1] + 1]).astype(np.int32)
        rows = np.array([row for _, row in ordered], np.int32)
        return cls.from_arrays(rows, np.array([merged[key] for key in ordered], np.float32), slots, offsets, device)

    def select(self, kept: torch.Tensor) -> LoraSegments | None:
        """The segments over the rows ``x[kept]`` (int64, ascending), in the same order: pairs of other rows dropped,
        rows renumbered; None if no pair is left."""
        rows = kept.cpu().numpy()
        places = np.searchsorted(rows, self.host_rows)
        found = np.append(rows, -1)[places] == self.host_rows
        before = np.append(0, np.cumsum(found))[self.host_offsets]  # pairs kept in front of each segment
        filled = before[1:] > before[:-1]
        if not filled.any():
            return None
        return LoraSegments.from_arrays(
            places[found].astype(np.int32),
            self.host_scales[found],
            np.array(self.slot_list)[filled].tolist(),
            np.append(before[:-1][filled], before[-1]).astype(np.int32),
            self.rows.device,
        )
