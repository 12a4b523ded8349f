"""A step's adapters beside their low-rank pairs: which rows have gains and biases where, and which have rows of tables
replaced; and what those do, in torch.

Semantics, over the pairs (row, slot, c) of a site, with ``base`` the linear layer's product without bias and without
residual::

    y[row] += c * ((gain[slot] - 1) * base[row] + bias[slot])

Rows that are replaced come first, and only at c = 1: ``y[row] = table row``, for the embedding that of the row's token,
for lm_head ``y[row, ids] = rows @ x[row]``. What other adapters of the row add is added to that; ``base`` stays the
base's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from manylora.kernels.lora_pool import LoraPool, SiteStore
from manylora.kernels.lora_segments import Floats, Ints, LoraSegments
from manylora.kernels.lora_tables import DeviceTable
from manylora.kernels.reference import pool_matrices

_CHUNK = 512
"""Rows computed at a time: bounds the fp32 values that lie about, 60 MiB for the widest site of a Llama."""


@dataclass(frozen=True)
class VectorRows:
    """The rows one of whose adapters has a gain or a bias at a site of a layer.

    ``rows`` int64 ``[R]`` on the pool's device, ascending. The pairs of row i are ``bounds[i] .. bounds[i + 1] - 1`` of
    ``slots`` and ``scales``, in the order of the step's segments; all on the host, int32 and fp32. ``slot_list``: all
    of the slots, in that order.
    """

    rows: torch.Tensor
    host_rows: Ints
    bounds: Ints
    slots: Ints
    scales: Floats
    slot_list: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.host_rows)

    @cached_property
    def by_slot(self) -> tuple[tuple[int, torch.Tensor, torch.Tensor], ...]:
        """``(slot, which of the rows, their scales)``, slot by slot; int64 and fp32 on the device."""
        index = np.repeat(np.arange(self.count), np.diff(self.bounds))
        found = []
        for slot in self.slot_list:
            own = self.slots == slot
            members = torch.from_numpy(index[own]).to(self.rows.device)
            found.append((slot, members, torch.from_numpy(self.scales[own]).to(self.rows.device)))
        return tuple(found)


class StepAdapters:
    """A step's segments with what their slots hold, as the pool's books say when it is made."""

    def __init__(self, segments: LoraSegments, pool: LoraPool) -> None:
        self.segments = segments
        self._pool = pool
        self._contents = {slot: pool.contents(slot) for slot in segments.slot_list}
        self._some_vectors = any(contents.vectors for contents in self._contents.values())
        self._tables = frozenset(p for contents in self._contents.values() for p in contents.tables)
        self._at: dict[tuple[str, int], VectorRows | None] = {}
        self._of_slots: dict[tuple[int, ...], VectorRows] = {}

    @property
    def step(self) -> StepAdapters:
        return self

    def has_tables(self, projection: str) -> bool:
        """Whether any adapter replaces rows of ``embed`` or ``lm_head``."""
        return projection in self._tables

    def vector_rows(self, site: str, layer: int) -> VectorRows | None:
        """The rows with a gain or a bias there; None if there are none."""
        if not self._some_vectors:
            return None
        if (site, layer) not in self._at:
            slots = tuple(slot for slot, contents in self._contents.items() if contents.has_vectors(site, layer))
            if slots and slots not in self._of_slots:
                self._of_slots[slots] = self._rows_of(slots)
            self._at[site, layer] = self._of_slots[slots] if slots else None
        return self._at[site, layer]

    def _rows_of(self, slots: tuple[int, ...]) -> VectorRows:
        segments = self.segments
        of_pair = np.repeat(np.array(segments.slot_list, np.int32), np.diff(segments.host_offsets))
        own = np.isin(of_pair, slots)
        rows, of_pair, scales = segments.host_rows[own], of_pair[own], segments.host_scales[own]
        order = np.argsort(rows, kind="stable")  # within a row the segments stay in their order
        host_rows, first = np.unique(rows[order], return_index=True)
        return VectorRows(
            torch.from_numpy(host_rows.astype(np.int64)).to(self._pool.device),
            host_rows.astype(np.int32),
            np.append(first, len(rows)).astype(np.int32),
            of_pair[order],
            scales[order],
            slots,
        )

    def replaced(self, projection: str) -> Iterator[tuple[torch.Tensor, DeviceTable]]:
        """``(rows, table)`` of each adapter that replaces rows of ``embed`` or ``lm_head``; rows int64.

        ValueError if one is not at scale 1, or a row has two of them: there is no telling what that would mean.
        """
        segments, seen = self.segments, np.empty(0, np.int32)
        bounds = segments.host_offsets.tolist()
        for s, (slot, contents) in enumerate(self._contents.items()):
            if projection not in contents.tables:
                continue
            rows, scales = (array[bounds[s] : bounds[s + 1]] for array in (segments.host_rows, segments.host_scales))
            if (scales != 1).any():
                raise ValueError(
                    f"the adapter in slot {slot} replaces rows of `{projection}` and is computed at scale 1 only, "
                    f"got {float(scales[scales != 1][0]):g}"
                )
            if np.isin(rows, seen).any():
                raise ValueError(f"a row has two adapters that replace rows of `{projection}`, one in slot {slot}")
            seen = np.concatenate((seen, rows))
            yield segments.rows[bounds[s] : bounds[s + 1]].long(), self._pool.tables_of(slot)[projection]


def add_vectors_(y: torch.Tensor, base: torch.Tensor, vectors: VectorRows, store: SiteStore, layer: int) -> None:
    """Add gains and biases to ``y`` ``[T, N]`` in place, in fp32; ``base`` ``[R, N]``: of the rows with vectors."""
    for slot, members, scales in vectors.by_slot:
        gain, bias = store.gain[slot, layer] - 1, store.bias[slot, layer]
        for first in range(0, len(members), _CHUNK):
            some, factors = members[first : first + _CHUNK], scales[first : first + _CHUNK, None]
            rows = vectors.rows[some]
            delta = factors * (gain * base[some].float() + bias)
            y[rows] = (y[rows].float() + delta).to(y.dtype)


def replace_logits_(
    y: torch.Tensor,
    x: torch.Tensor,
    step: StepAdapters,
    product: Callable[[torch.Tensor, DeviceTable], torch.Tensor],
) -> None:
    """Put the logits of replaced rows into ``y`` ``[T, vocab]``; ``product(x, table)``: ``x @ rows.T``, fp32."""
    for rows, table in step.replaced("lm_head"):
        table.store_logits_(y, rows, product(x[rows], table))


def embed_adapters_(y: torch.Tensor, token_ids: torch.Tensor, step: StepAdapters, pool: LoraPool) -> None:
    """The embedding's part of an adapter: ``y`` ``[T, hidden]`` holds the base's rows of the tokens, int64 ``[T]``.

    A one-hot input makes the shrink a gather, so this is torch on every device.
    """
    vectors = step.vector_rows("embed", 0)
    base = None if vectors is None else y[vectors.rows]
    for rows, table in step.replaced("embed"):
        at, is_there = table.find(token_ids[rows])
        y[rows] = torch.where(is_there[:, None], table.rows[at].to(y.dtype), y[rows])
    if vectors is not None and base is not None:
        add_vectors_(y, base, vectors, pool.sites["embed"], 0)
    segments = step.segments
    bounds = segments.host_offsets.tolist()
    for s, slot in enumerate(segments.slot_list):
        matrices = pool_matrices(pool, "embed", slot, 0)
        if matrices is None:
            continue
        a, b, scaling = matrices
        members = segments.rows[bounds[s] : bounds[s + 1]].long()
        factors = segments.scales[bounds[s] : bounds[s + 1], None] * scaling
        # One product per row: a row's result must not depend on how many rows its segment has.
        hidden = a[token_ids[members]].float() * factors
        y[members] += (hidden[:, :, None] * b.float()[None]).sum(1).to(y.dtype)
