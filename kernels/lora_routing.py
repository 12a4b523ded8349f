"""The work lists of the CUDA kernels for a step's adapters: made on the host, copied to the device in one piece.

One int32 buffer holds all: counts of each site, then the places of the pairs, then slot and scale at each place, then
lists of varying length. Everything up to the lists lies at fixed offsets, and the counts say where a site's lists
begin, so that a CUDA graph can be captured with one buffer and replayed with other contents; only what is used is
copied.

- A pair's *place* is ``level * stride_level + row``, where a row's first adapter is at level 0, its second at level 1.
- **entries** (shrink): ``[slot, column of h / 16, first pair, last pair (exclusive), page of A]``, for each block of at
  most ``rows_per_block`` pairs of a segment and each page of each projection.
- **pieces** (expand), sorted by projection: ``[slot, level, column of h / 16, page of B (-1: none), projection, first
  row, last row (inclusive), 1 if the slot's vectors are added here]``, for each segment, level and page.
- counts of a site: ``[entries, bounds of the pieces of projection 0, 1, 2 (4 numbers), offset of the entries in the
  lists, offset of the pieces, 0]``.

Pages are looked up here, from the pool's own books, so no kernel has to follow a table; and so is which slots have
vectors at all, so that no row pays for those of others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np
import torch

from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_segments import Ints, LoraSegments
from manylora.kernels.lora_step import StepAdapters, VectorRows
from manylora.kernels.sites import SITES

ENTRY: Final = 5
PIECE: Final = 8
COUNTS: Final = 8
_SITES: Final = tuple(SITES)


@dataclass(frozen=True)
class LoraRouting:
    """Views of one device buffer, as the kernels take them; ``counts[site]`` int32 ``[8]``.

    ``max_entries``: at most so many in any site's list. ``step``: what they were made from; None in a
    `StaticRouting`, of which ``apart`` has the sites that were computed by other means than the fused kernel, and
    ``with_vectors`` those where an adapter has gains or biases now.
    """

    buffer: torch.Tensor
    counts: Mapping[str, torch.Tensor]
    places: torch.Tensor
    slot_at: torch.Tensor
    scale_at: torch.Tensor
    lists: torch.Tensor
    stride_level: int
    levels: int
    max_entries: int
    step: StepAdapters | None = None
    apart: set[str] = field(default_factory=set)
    with_vectors: set[str] = field(default_factory=set)

    def vector_rows(self, site: str, layer: int) -> VectorRows | None:
        """See ``kernels.lora.Routed``; for sites that the fused kernel does not compute.

        RuntimeError in a `StaticRouting` with vectors there: what a graph captured cannot add them, see its ``fits``.
        """
        if self.step is not None:
            return self.step.vector_rows(site, layer)
        self.apart.add(site)
        if site in self.with_vectors:
            raise RuntimeError(f"gains and biases at `{site}` cannot be computed in a step of static memory")
        return None

    @classmethod
    def views(
        cls, buffer: torch.Tensor, n_pairs: int, rows: int, levels: int, max_entries: int, step: StepAdapters | None
    ) -> LoraRouting:
        """Cut up a buffer that is laid out for ``n_pairs``, ``rows`` and ``levels``."""
        at = _Layout(n_pairs, rows, levels)
        return cls(
            buffer=buffer,
            counts={name: buffer[i * COUNTS : (i + 1) * COUNTS] for i, name in enumerate(_SITES)},
            places=buffer[at.places : at.slot_at],
            slot_at=buffer[at.slot_at : at.scale_at],
            scale_at=buffer[at.scale_at : at.lists].view(torch.float32),
            lists=buffer[at.lists :],
            stride_level=rows,
            levels=levels,
            max_entries=max_entries,
            step=step,
        )


@dataclass(frozen=True)
class _Layout:
    n_pairs: int
    rows: int
    levels: int

    @property
    def places(self) -> int:
        return COUNTS * len(_SITES)

    @property
    def slot_at(self) -> int:
        return self.places + _aligned(self.n_pairs)

    @property
    def scale_at(self) -> int:
        return self.slot_at + _aligned(self.levels * self.rows)

    @property
    def lists(self) -> int:
        return self.scale_at + _aligned(self.levels * self.rows)


def route(segments: LoraSegments, pool: LoraPool, n_rows: int, *, rows_per_block: int) -> LoraRouting:
    """The lists of one step over ``n_rows`` rows, in a buffer of their own on the pool's device."""
    levels = _levels(segments)
    depth = int(levels.max()) + 1
    array, most = _lists(segments, levels, pool, _Layout(len(levels), n_rows, depth), rows_per_block)
    buffer = torch.from_numpy(array).to(pool.device)
    return LoraRouting.views(buffer, len(levels), n_rows, depth, most, StepAdapters(segments, pool))


class StaticRouting:
    """A buffer for steps of at most ``max_rows`` rows with at most ``levels`` adapters each, at a fixed address.

    ``fill`` copies a step's lists in, from pinned memory; not at all while the composition of the batch is unchanged.
    """

    def __init__(self, pool: LoraPool, *, max_rows: int, rows_per_block: int, levels: int = 1) -> None:
        self._pool, self._rows_per_block = pool, rows_per_block
        self._layout = _Layout(max_rows * levels, max_rows, levels)
        projections = sum(len(projections) for projections in SITES.values())
        widest = max(len(projections) for projections in SITES.values())
        # A page is met once by each block of rows of its segment. The pages bound the first block of each segment, the
        # further blocks are bounded by the rows.
        blocks = max_rows * levels // rows_per_block * pool.pages_per_slot
        self._max_entries = widest * (pool.max_pages + blocks)
        # At each level a slot's pages are met once, and a slot without pages, but with vectors, once.
        pieces = projections * (pool.max_pages + pool.max_slots) * levels
        size = self._layout.lists + projections * (pool.max_pages + blocks) * ENTRY + pieces * PIECE
        on_device = pool.device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=on_device)
        buffer = torch.zeros(size, dtype=torch.int32, device=pool.device)
        self.routing = LoraRouting.views(buffer, self._layout.n_pairs, max_rows, levels, self._max_entries, step=None)
        self.routing.apart.add("lm_head")  # its product is no NF4 weight's
        self._key: object = None

    def fits(self, segments: LoraSegments) -> bool:
        """Whether a step of these is computed in full from the lists alone: no row has more adapters than there are
        levels, none replaces rows of a table or touches the embedding, and gains and biases are at sites only that
        the fused kernel computes."""
        if int(np.bincount(segments.host_rows).max()) > self._layout.levels:
            return False
        for contents in map(self._pool.contents, segments.slot_list):
            if contents.tables or contents.touches("embed"):
                return False
            if contents.vectors and any(contents.has_vectors(site) for site in self.routing.apart):
                return False
        return True

    def fill(self, segments: LoraSegments) -> None:
        """Take over a step's segments."""
        bits = (segments.host_rows.tobytes(), segments.host_scales.tobytes(), segments.host_offsets.tobytes())
        key = (bits, segments.slot_list, self._pool.version)
        if key == self._key:
            return
        contents = list(map(self._pool.contents, segments.slot_list))
        self.routing.with_vectors.clear()
        self.routing.with_vectors.update(site for site in SITES if any(one.has_vectors(site) for one in contents))
        array, _ = _lists(segments, _levels(segments), self._pool, self._layout, self._rows_per_block)
        # The last copy out of the pinned memory has long been done: each step ends with a synchronisation.
        self._host[: len(array)] = torch.from_numpy(array)
        self.routing.buffer[: len(array)].copy_(self._host[: len(array)], non_blocking=True)
        self._key = key


def _levels(segments: LoraSegments) -> Ints:
    """Of each pair, how many pairs of its row come before it."""
    rows = segments.host_rows
    levels = np.zeros(len(rows), np.int32)
    if len(segments.slot_list) > 1:
        order = np.argsort(rows, kind="stable")
        ranked = rows[order]
        starts = np.searchsorted(ranked, ranked, side="left")
        levels[order] = np.arange(len(rows)) - starts
    return levels


def _lists(
    segments: LoraSegments, levels: Ints, pool: LoraPool, layout: _Layout, rows_per_block: int
) -> tuple[Ints, int]:
    """The buffer's contents, and the length of the longest list of entries."""
    rows, bounds = segments.host_rows, segments.host_offsets.tolist()
    head = np.zeros(layout.lists, np.int32)
    places = levels * layout.rows + rows
    head[layout.places : layout.places + len(places)] = places
    slot_at = head[layout.slot_at : layout.scale_at]
    slot_at[:] = -1
    slot_at[places] = np.repeat(np.array(segments.slot_list, np.int32), np.diff(segments.host_offsets))
    head[layout.scale_at : layout.lists].view(np.float32)[places] = segments.host_scales

    contents = [pool.contents(slot) for slot in segments.slot_list]
    held = [one.pages for one in contents]
    spans = [_spans(rows[first:last], levels[first:last]) for first, last in pairwise(bounds)]
    lists: list[int] = []
    most = 0
    for site, projections in enumerate(SITES.values()):
        entries: list[int] = []
        pieces: list[int] = []
        piece_bounds = [0]
        for j, projection in enumerate(projections):
            for s, slot in enumerate(segments.slot_list):
                pages = held[s].get(projection, [])
                first_column = j * pool.pages_per_slot
                for i, page in enumerate(pages):
                    for first in range(bounds[s], bounds[s + 1], rows_per_block):
                        last = min(first + rows_per_block, bounds[s + 1])
                        entries += (slot, first_column + i, first, last, page)
                has_vectors = projection in contents[s].vectors
                for level, lowest, highest in spans[s]:
                    for i, page in enumerate(pages or ([-1] if has_vectors else [])):
                        pieces += (slot, level, first_column + i, page, j, lowest, highest, has_vectors and i == 0)
            piece_bounds.append(len(pieces) // PIECE)
        piece_bounds += [piece_bounds[-1]] * (4 - len(piece_bounds))
        count = len(entries) // ENTRY
        most = max(most, count)
        head[site * COUNTS : (site + 1) * COUNTS] = (
            count, *piece_bounds, len(lists), len(lists) + len(entries), 0,
        )  # fmt: skip
        lists += entries + pieces
    return np.concatenate((head, np.array(lists, np.int32))), most


def _spans(rows: Ints, levels: Ints) -> list[tuple[int, int, int]]:
    """(level, first row, last row) of a segment, for each level it has pairs at."""
    found = np.unique(levels).tolist()
    return [(level, int(rows[levels == level].min()), int(rows[levels == level].max())) for level in found]


def _aligned(count: int) -> int:
    """Rounded up to 64 bytes."""
    return -(-count // 16) * 16
