"""Which rows of a batch use which adapter, sorted so that a kernel meets each adapter once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoraSegments:
    """Pairs (row, slot, scale) sorted by slot: pairs ``offsets[s] .. offsets[s + 1] - 1`` belong to slot ``slots[s]``.

    ``rows`` int32 ``[P]`` (ascending within a segment), ``scales`` fp32 ``[P]``, ``slots`` int32 ``[S]`` (ascending,
    distinct), ``offsets`` int32 ``[S + 1]``; all on the pool's device. ``slot_list`` is ``slots`` on the host.
    """

    rows: torch.Tensor
    scales: torch.Tensor
    slots: torch.Tensor
    offsets: torch.Tensor
    slot_list: tuple[int, ...]

    @classmethod
    def from_pairs(
        cls, pairs: Iterable[tuple[int, int, float]], device: torch.device | str = "cpu"
    ) -> LoraSegments | None:
        """Sort pairs, in any order, into segments; None if there are none. Slot -1 (a base row) is left out."""
        ordered = sorted((slot, row, scale) for row, slot, scale in pairs if slot >= 0)
        if not ordered:
            return None
        slots: list[int] = []
        offsets: list[int] = []
        for i, (slot, _, _) in enumerate(ordered):
            if not slots or slots[-1] != slot:
                slots.append(slot)
                offsets.append(i)
        offsets.append(len(ordered))
        return cls(
            rows=torch.tensor([row for _, row, _ in ordered], dtype=torch.int32, device=device),
            scales=torch.tensor([scale for _, _, scale in ordered], dtype=torch.float32, device=device),
            slots=torch.tensor(slots, dtype=torch.int32, device=device),
            offsets=torch.tensor(offsets, dtype=torch.int32, device=device),
            slot_list=tuple(slots),
        )

    def select(self, kept: torch.Tensor) -> LoraSegments | None:
        """The segments over the rows ``x[kept]`` (int64, ascending): pairs of other rows dropped, rows renumbered."""
        renumbered = {row: i for i, row in enumerate(kept.tolist())}
        bounds, rows, scales = self.offsets.tolist(), self.rows.tolist(), self.scales.tolist()
        pairs = [
            (renumbered[rows[i]], slot, scales[i])
            for s, slot in enumerate(self.slot_list)
            for i in range(bounds[s], bounds[s + 1])
            if rows[i] in renumbered
        ]
        return LoraSegments.from_pairs(pairs, self.rows.device)
