"""Device storage of the adapters that are resident: pages of 16 ranks, and the tables that say whose they are."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from manylora.kernels.lora_weights import LoraPair, LoraWeights
from manylora.kernels.sites import PROJECTIONS, RANK_PAGE, SITES, LoraShapes

MAX_RANK: Final = 256


class PoolFull(RuntimeError):
    """There are not enough free pages for an adapter; the message says of what and how many."""


def _fill_page(a: torch.Tensor, b: torch.Tensor, pair: LoraPair | None, first: int) -> None:
    """Ranks ``first .. first + 15`` of a pair into a layer's page ``a`` ``[K, 16]``, ``b`` ``[16, N]``; zeros
    beyond."""
    width = 0 if pair is None else max(0, min(RANK_PAGE, pair.rank - first))
    if pair is not None and width:
        a[:, :width] = pair.a[first : first + width].to(a.dtype).T
        b[:width] = pair.b[:, first : first + width].to(b.dtype).T
    if width < RANK_PAGE:
        a[:, width:] = 0
        b[width:] = 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # calloc'ed by numpy: the system commits a page of memory when it is first written, torch.zeros would at once.
    stand_in = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.float16: np.float16}[dtype]
    zeros = torch.from_numpy(np.zeros(shape, stand_in))
    return zeros.view(dtype) if zeros.dtype != dtype else zeros


@dataclass(frozen=True)
class SiteStore:
    """What a pool holds for one site of J projections, in the order of ``SITES``; per projection, see ``LoraPool``.

    ``a`` ``[J, pages, L, K, 16]``; ``b`` flat: projection j's ``[pages, L, 16, N_j]`` from element ``16 * L * pages *
    columns[j]`` on; ``page_table`` ``[J, slots, max_rank / 16]``; ``ranks`` and ``scaling`` ``[J, slots, L]``.
    ``columns``: where the projections start in the site's output, and its width. ``gain`` and ``bias`` fp32 ``[slots,
    L, N]``, empty in a pool without vectors.
    """

    a: torch.Tensor
    b: torch.Tensor
    page_table: torch.Tensor
    ranks: torch.Tensor
    scaling: torch.Tensor
    gain: torch.Tensor
    bias: torch.Tensor
    columns: tuple[int, ...]


class LoraPool:
    """Pages of adapters on one device, ``RANK_PAGE`` ranks each, in slots.

    For each projection ``p`` of K inputs, N outputs and L layers:

    - ``a[p]`` ``[pages, L, K, 16]`` and ``b[p]`` ``[pages, L, 16, N]``: a page holds 16 ranks of one adapter for all
      layers; A is transposed, so that both halves are read along their rows;
    - ``page_table[p]`` int32 ``[slots, max_rank / 16]``: the pages of a slot, -1 where it has none;
    - ``ranks[p]`` int32 ``[slots, L]`` (0: the slot has no delta there) and ``scaling[p]`` fp32 ``[slots, L]``.

    These are views of ``sites[name]``, where the projections of a fused site lie side by side; ``embed`` is a site of
    its own. An adapter of rank r on a projection takes ``ceil(r / 16)`` pages *of that projection*, whatever others
    take. ``vectors``: keep a gain and a bias for every slot too (``set_vectors``). ``write`` may run on another
    thread than the reader's: it touches only free pages and its own slot.
    """

    def __init__(
        self,
        shapes: LoraShapes,
        *,
        max_slots: int,
        max_pages: int,
        max_rank: int = MAX_RANK,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        vectors: bool = False,
    ) -> None:
        if max_slots < 1 or max_pages < 1 or not 1 <= max_rank <= MAX_RANK:
            raise ValueError(
                f"a LoRA pool needs at least one slot and page and a rank of 1..{MAX_RANK}, "
                f"got max_slots={max_slots}, max_pages={max_pages}, max_rank={max_rank}"
            )
        self.shapes, self.max_slots, self.max_pages, self.max_rank = shapes, max_slots, max_pages, max_rank
        self.dtype, self.device, self.vectors = dtype, torch.device(device), vectors
        self.pages_per_slot = -(-max_rank // RANK_PAGE)
        self.a: dict[str, torch.Tensor] = {}
        self.b: dict[str, torch.Tensor] = {}
        self.page_table: dict[str, torch.Tensor] = {}
        self.ranks: dict[str, torch.Tensor] = {}
        self.scaling: dict[str, torch.Tensor] = {}
        self.sites: dict[str, SiteStore] = {}
        for name, projections in {**SITES, "embed": ("embed",)}.items():
            self._add_site(name, projections)
        self._lock = threading.Lock()
        self._free = {p: list(range(max_pages - 1, -1, -1)) for p in PROJECTIONS}
        self._held: dict[int, dict[str, list[int]]] = {}
        self._uploads: Any = None
        self._cleared: Any = None
        if self.device.type == "cuda":
            self._uploads, self._cleared = torch.cuda.Stream(self.device), torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.version = 0
        """Counts writes and clears, so that what was derived from the tables can be kept until they change."""

    def _add_site(self, name: str, projections: tuple[str, ...]) -> None:
        shapes, device, count = self.shapes, self.device, len(projections)
        layers, k = shapes.layers_of(projections[0]), shapes.in_features[projections[0]]
        columns = [0]
        for p in projections:
            columns.append(columns[-1] + shapes.out_features[p])
        n, row = columns[-1], self.max_pages * layers * RANK_PAGE
        vectors = (self.max_slots, layers, n) if self.vectors else (0,)
        store = SiteStore(
            a=_zeros((count, self.max_pages, layers, k, RANK_PAGE), self.dtype, device),
            b=_zeros((row * n,), self.dtype, device),
            page_table=torch.full((count, self.max_slots, self.pages_per_slot), -1, dtype=torch.int32, device=device),
            ranks=torch.zeros((count, self.max_slots, layers), dtype=torch.int32, device=device),
            scaling=torch.zeros((count, self.max_slots, layers), dtype=torch.float32, device=device),
            gain=torch.ones(vectors, dtype=torch.float32, device=device),
            bias=torch.zeros(vectors, dtype=torch.float32, device=device),
            columns=tuple(columns),
        )
        self.sites[name] = store
        for j, p in enumerate(projections):
            self.a[p], self.page_table[p], self.ranks[p] = store.a[j], store.page_table[j], store.ranks[j]
            self.scaling[p] = store.scaling[j]
            part = store.b[row * columns[j] : row * columns[j + 1]]
            self.b[p] = part.view(self.max_pages, layers, RANK_PAGE, shapes.out_features[p])

    def pages_needed(self, weights: LoraWeights) -> dict[str, int]:
        """Pages an adapter takes of each projection it touches: by its largest rank there."""
        ranks: dict[str, int] = {}
        for (projection, _), pair in weights.pairs.items():
            ranks[projection] = max(ranks.get(projection, 0), pair.rank)
        return {p: -(-rank // RANK_PAGE) for p, rank in ranks.items()}

    def fits(self, weights: LoraWeights) -> str | None:
        """Why the adapter could never be resident, or None if it could."""
        rank = max((pair.rank for pair in weights.pairs.values()), default=0)
        if rank > self.max_rank:
            return f"its rank {rank} is above the server's --max-rank {self.max_rank}"
        for projection, pages in self.pages_needed(weights).items():
            if pages > self.max_pages:
                return f"it needs {pages} pages of `{projection}`, the pool has {self.max_pages}"
        return None

    def has_room(self, weights: LoraWeights) -> bool:
        """Whether ``write`` would find its pages now."""
        with self._lock:
            return all(len(self._free[p]) >= n for p, n in self.pages_needed(weights).items())

    def free_pages(self) -> dict[str, int]:
        """Free pages of each projection."""
        with self._lock:
            return {p: len(pages) for p, pages in self._free.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that are taken."""
        total = 0
        for p in PROJECTIONS:
            taken = self.max_pages - len(self._free[p])
            total += taken * (self.a[p][0].nbytes + self.b[p][0].nbytes)
        return total

    def write(self, slot: int, weights: LoraWeights) -> None:
        """Copy an adapter into an empty slot; it is computed with from the next step that names the slot.

        Raises PoolFull, with nothing changed, if pages are missing; ValueError for a slot that is taken.
        """
        needed = self.pages_needed(weights)
        with self._lock:
            if slot in self._held:
                raise ValueError(f"slot {slot} holds an adapter; clear it first")
            for p, n in needed.items():
                if len(self._free[p]) < n:
                    raise PoolFull(f"{n} pages of `{p}` are needed, {len(self._free[p])} of {self.max_pages} are free")
            held = {p: [self._free[p].pop() for _ in range(n)] for p, n in needed.items()}
            self._held[slot] = held
        if self._uploads is None:
            self._fill(slot, held, weights)
        else:
            # On a stream of its own, so that no step waits for the copies; the slot is named only after this returns.
            # A slot that was just cleared is cleared on the other stream: that must come first.
            self._uploads.wait_event(self._cleared)
            with torch.cuda.stream(self._uploads):
                self._fill(slot, held, weights)
            self._uploads.synchronize()
        self.version += 1

    def _fill(self, slot: int, held: Mapping[str, list[int]], weights: LoraWeights) -> None:
        for p, pages in held.items():
            layers = self.shapes.layers_of(p)
            for i, page in enumerate(pages):
                a, b = self.a[p][page], self.b[p][page]
                on_device = a.device.type != "cpu"
                if on_device:
                    to_a, to_b = a, b
                    a, b = (torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (to_a, to_b))
                for layer in range(layers):
                    _fill_page(a[layer], b[layer], weights.pairs.get((p, layer)), i * RANK_PAGE)
                if on_device:
                    to_a.copy_(a, non_blocking=True)
                    to_b.copy_(b, non_blocking=True)
            ranks, scaling = [0] * layers, [0.0] * layers
            for layer in range(layers):
                if (pair := weights.pairs.get((p, layer))) is not None:
                    ranks[layer], scaling[layer] = pair.rank, pair.scale
            self.page_table[p][slot, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            self.ranks[p][slot] = torch.tensor(ranks, dtype=torch.int32)
            self.scaling[p][slot] = torch.tensor(scaling)

    def set_vectors(self, slot: int, site: str, layer: int, gain: torch.Tensor, bias: torch.Tensor) -> None:
        """Give a slot that holds an adapter a gain and a bias (each ``[N]``) at a site; ``clear`` takes them away.

        See ``kernels.lora`` for what they do. ValueError in a pool without vectors.
        """
        if not self.vectors:
            raise ValueError("this pool was made without room for gains and biases (vectors=True)")
        self.sites[site].gain[slot, layer] = gain.to(self.device, torch.float32)
        self.sites[site].bias[slot, layer] = bias.to(self.device, torch.float32)

    def pages_of(self, slot: int) -> Mapping[str, list[int]]:
        """The pages that a slot holds of each projection; empty if it holds none."""
        with self._lock:
            return dict(self._held.get(slot, {}))

    def overflows(self, weights: LoraWeights) -> str | None:
        """Why the adapter cannot be held in the pool's type (float16 ends at 65504), or None."""
        highest = torch.finfo(self.dtype).max
        for (projection, layer), pair in weights.pairs.items():
            for name, matrix in (("A", pair.a), ("B", pair.b)):
                if matrix.numel() and float(matrix.abs().max()) > highest:
                    return (
                        f"`{projection}` of layer {layer}: {name} has values above "
                        f" {highest:g}, more than {self.dtype} holds"
                    )
        return None

    def clear(self, slot: int) -> None:
        """Empty a slot and give its pages back; nothing happens if it is empty."""
        with self._lock:
            held = self._held.pop(slot, None)
            if held is None:
                return
            for p, pages in held.items():
                self.ranks[p][slot] = 0
                self.scaling[p][slot] = 0
                self.page_table[p][slot] = -1
                self._free[p].extend(pages)
            if self.vectors:
                for store in self.sites.values():
                    store.gain[slot] = 1
                    store.bias[slot] = 0
            if self._cleared is not None:
                self._cleared.record()
        self.version += 1

    def check_integrity(self) -> None:
        """Raise RuntimeError, with the numbers, unless every page is either free or held by exactly one slot."""
        with self._lock:
            for p in PROJECTIONS:
                held = [page for slot in self._held.values() for page in slot.get(p, ())]
                everything = sorted(held + self._free[p])
                if everything != list(range(self.max_pages)):
                    raise RuntimeError(
                        f"LoRA pool, `{p}`: {len(held)} held + {len(self._free[p])} free pages are not the "
                        f"{self.max_pages} there are, each once"
                    )
