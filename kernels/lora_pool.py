"""Device storage of the adapters that are resident: pages of 16 ranks, and the tables that say whose they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from manylora.kernels.cpu import available as cpu_kernels_available
from manylora.kernels.host_memory import untouched_zeros
from manylora.kernels.lora_books import POOL_SITES, SlotContents
from manylora.kernels.lora_page import INTEGERS, fill_page, too_coarse
from manylora.kernels.lora_tables import TABLE_BYTES, DeviceTable, TableForm
from manylora.kernels.lora_weights import LoraWeights, TableRows
from manylora.kernels.sites import PROJECTIONS, RANK_PAGE, LoraShapes

MAX_RANK: Final = 256


class PoolFull(RuntimeError):
    """There are not enough free pages for an adapter; the message says of what and how many."""


_BITS: Final = {
    torch.float32: (torch.int32, "u4", 0x7FFFFFFF),
    torch.bfloat16: (torch.int16, "u2", 0x7FFF),
    torch.float16: (torch.int16, "u2", 0x7FFF),
}
"""Of a float type: its bits as torch and as numpy have them, and which of them are the magnitude's."""


def _highest(values: torch.Tensor) -> float:
    """The largest magnitude of values on the CPU; NaN if one is, 0 if there is none.

    Not by torch, which would wake a second team of threads for it, beside the one that computes a step: the bits of
    floats without their signs are in the order of the magnitudes, those of NaN above all.
    """
    if values.numel() == 0:
        return 0.0
    if values.dtype not in _BITS:
        return float(values.abs().max())
    signed, unsigned, magnitude = _BITS[values.dtype]
    bits = values.detach().contiguous().view(signed).numpy()
    highest = max(int(bits.max()), int(bits.view(unsigned).max()) & magnitude)
    return float(torch.tensor(highest, dtype=signed).view(values.dtype))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return untouched_zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class SiteStore:
    """What a pool holds for one site of J projections, in the order of ``SITES``; per projection, see ``LoraPool``.

    ``a`` ``[J, pages, L, K, 16]``; ``b`` flat: projection j's ``[pages, L, 16, N_j]`` from element ``16 * L * pages *
    columns[j]`` on; ``page_table`` ``[J, slots, max_rank / 16]``; ``ranks`` and ``scaling`` ``[J, slots, L]``.
    ``columns``: where the projections start in the site's output, and its width. ``gain`` and ``bias`` fp32 ``[slots,
    L, N]``, empty in a pool without vectors: all layers of a slot are written if it has vectors at the site (1 and 0
    where it has none); those of other slots hold anything, and must not be read.
    """

    a: torch.Tensor
    b: torch.Tensor
    page_table: torch.Tensor
    ranks: torch.Tensor
    scaling: torch.Tensor
    gain: torch.Tensor
    bias: torch.Tensor
    columns: tuple[int, ...]


_NOTHING: Final = SlotContents()


class LoraPool:
    """Pages of adapters on one device, ``RANK_PAGE`` ranks each, in slots.

    For each projection ``p`` of K inputs, N outputs and L layers:

    - ``a[p]`` ``[pages, L, K, 16]`` and ``b[p]`` ``[pages, L, 16, N]``: a page holds 16 ranks of one adapter for all
      layers; A is transposed, so that both halves are read along their rows. Of integers, which only the CPU's kernels
      read, ``b[p]`` is ``[pages, L, N / 16, 16, 16]`` if N is a multiple of 16: what is multiplied at once lies
      together. ``rows_of_b`` reads either;
    - ``page_table[p]`` int32 ``[slots, max_rank / 16]``: the pages of a slot, -1 where it has none;
    - ``ranks[p]`` int32 ``[slots, L]`` (0: the slot has no delta there) and ``scaling[p]`` fp32 ``[slots, L]``.

    These are views of ``sites[name]``, where the projections of a fused site lie side by side; ``embed`` is a site of
    its own. An adapter of rank r on a projection takes ``ceil(r / 16)`` pages *of that projection*, whatever others
    take. ``write`` may run on other threads than the reader's, several at once for different slots: it touches only
    free pages and its own slot.

    ``dtype``: what the adapters are computed in; ``page_dtype``: what A and B are held in, the same unless given. As
    ``int16`` or ``int8``, each rank's values are whole numbers, and ``page_scales[p]`` fp32 ``[pages, L, 16]`` has what
    one of A times one of B stands for.
    ``vectors``: keep room for a gain and a bias in every slot: 8 bytes for each output of each layer (11 MB a slot for
    a Llama of 8 billion). On the CPU the system commits it only where an adapter that has some is written; on other
    devices it is taken at once, and the fused kernel is compiled with them. Without, adapters that have some are
    refused.
    ``table_bytes``: how much may be held of replaced rows (`TableRows`), all slots together; taken as it is needed.
    """

    def __init__(
        self,
        shapes: LoraShapes,
        *,
        max_slots: int,
        max_pages: int,
        max_rank: int = MAX_RANK,
        dtype: torch.dtype = torch.float32,
        page_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        vectors: bool = True,
        table_bytes: int = 0,
    ) -> None:
        if max_slots < 1 or max_pages < 1 or not 1 <= max_rank <= MAX_RANK or table_bytes < 0:
            raise ValueError(
                f"a LoRA pool needs at least one slot and page, a rank of 1..{MAX_RANK} and no negative bytes, got "
                f"max_slots={max_slots}, max_pages={max_pages}, max_rank={max_rank}, table_bytes={table_bytes}"
            )
        self.shapes, self.max_slots, self.max_pages, self.max_rank = shapes, max_slots, max_pages, max_rank
        self.dtype, self.device, self.vectors, self.table_bytes = dtype, torch.device(device), vectors, table_bytes
        self.page_dtype = dtype if page_dtype is None else page_dtype
        self.pages_per_slot = -(-max_rank // RANK_PAGE)
        self.a: dict[str, torch.Tensor] = {}
        self.b: dict[str, torch.Tensor] = {}
        self.page_scales: dict[str, torch.Tensor] = {}
        self.page_table: dict[str, torch.Tensor] = {}
        self.ranks: dict[str, torch.Tensor] = {}
        self.scaling: dict[str, torch.Tensor] = {}
        self.sites: dict[str, SiteStore] = {}
        for name, projections in POOL_SITES.items():
            self._add_site(name, projections)
        self._forms = {
            "embed": TableForm(shapes.in_features["embed"], dtype, head=False, tiled=False),
            "lm_head": TableForm(shapes.out_features["lm_head"], dtype, head=True, tiled=self.suits_cpu_kernels),
        }
        self._lock = threading.Lock()
        self._free = {p: list(range(max_pages - 1, -1, -1)) for p in PROJECTIONS}
        self._free_table_bytes = table_bytes
        self._held: dict[int, SlotContents] = {}
        self._tables: dict[int, Mapping[str, DeviceTable]] = {}
        self._uploads: Any = None
        self._cleared: Any = None
        if self.device.type == "cuda":
            self._uploads, self._cleared = torch.cuda.Stream(self.device), torch.cuda.Event()  # type: ignore[no-untyped-call]
            # The first upload waits for the zeros above, and for whatever had their memory before.
            self._cleared.record()
        self.version = 0
        """Counts writes and clears, so that what was derived from the tables can be kept until they change."""

    def _add_site(self, name: str, projections: tuple[str, ...]) -> None:
        shapes, device, count = self.shapes, self.device, len(projections)
        layers, k = shapes.layers_of(projections[0]), shapes.in_features[projections[0]]
        columns = [0]
        for p in projections:
            columns.append(columns[-1] + shapes.out_features[p])
        width, row = columns[-1], self.max_pages * layers * RANK_PAGE
        vectors = (self.max_slots, layers, width) if self.vectors else (0,)
        store = SiteStore(
            a=_zeros((count, self.max_pages, layers, k, RANK_PAGE), self.page_dtype, device),
            b=_zeros((row * width,), self.page_dtype, device),
            page_table=torch.full((count, self.max_slots, self.pages_per_slot), -1, dtype=torch.int32, device=device),
            ranks=torch.zeros((count, self.max_slots, layers), dtype=torch.int32, device=device),
            scaling=torch.zeros((count, self.max_slots, layers), dtype=torch.float32, device=device),
            gain=_zeros(vectors, torch.float32, device),
            bias=_zeros(vectors, torch.float32, device),
            columns=tuple(columns),
        )
        self.sites[name] = store
        for j, p in enumerate(projections):
            self.a[p], self.page_table[p], self.ranks[p] = store.a[j], store.page_table[j], store.ranks[j]
            self.scaling[p] = store.scaling[j]
            part, n = store.b[row * columns[j] : row * columns[j + 1]], shapes.out_features[p]
            tiled = self.page_dtype in INTEGERS and n % RANK_PAGE == 0
            shape = (n // RANK_PAGE, RANK_PAGE, RANK_PAGE) if tiled else (RANK_PAGE, n)
            self.b[p] = part.view(self.max_pages, layers, *shape)
            if self.page_dtype in INTEGERS:
                self.page_scales[p] = torch.zeros(self.max_pages, layers, RANK_PAGE, device=device)

    @property
    def suits_cpu_kernels(self) -> bool:
        """Whether the numba kernels can compute with this pool."""
        if self.device.type != "cpu" or self.dtype != torch.float32 or not cpu_kernels_available():
            return False
        readable = self.page_dtype in (torch.float32, torch.bfloat16, *INTEGERS)
        return readable and all(n % RANK_PAGE == 0 for p, n in self.shapes.out_features.items() if p != "embed")

    # --- what there is room for ----------------------------------------------------------------------------------

    def pages_needed(self, weights: LoraWeights) -> dict[str, int]:
        """What an adapter takes: pages of each projection that it touches, by its largest rank there, and the bytes of
        its tables under ``"table bytes"``."""
        ranks: dict[str, int] = {}
        for (projection, _), pair in weights.pairs.items():
            ranks[projection] = max(ranks.get(projection, 0), pair.rank)
        needed = {p: -(-rank // RANK_PAGE) for p, rank in ranks.items()}
        if weights.tables:
            needed[TABLE_BYTES] = sum(self._forms[p].nbytes(table) for p, table in weights.tables.items())
        return needed

    def fits(self, weights: LoraWeights) -> str | None:
        """Why the adapter could never be resident, or None if it could."""
        if weights.max_rank > self.max_rank:
            return f"its rank {weights.max_rank} is above the server's --max-rank {self.max_rank}"
        if weights.vectors and not self.vectors:
            return "it has gains or biases (DoRA, trained biases), and this server keeps no room for them"
        for projection, table in weights.tables.items():
            last, vocab = int(table.ids[-1]) if table.ids.numel() else -1, self._forms[projection].vocab
            if last >= vocab:
                return f"it replaces row {last} of `{projection}`, the base has {vocab}"
        needed = self.pages_needed(weights)
        if (n_bytes := needed.pop(TABLE_BYTES, 0)) > self.table_bytes:
            names = " and ".join(f"`{projection}`" for projection in weights.tables)
            return (
                f"its own rows of {names} need {n_bytes} bytes on the device, the server keeps "
                f"{self.table_bytes} for such (raise --table-memory)"
            )
        for projection, pages in needed.items():
            if pages > self.max_pages:
                return f"it needs {pages} pages of `{projection}`, the pool has {self.max_pages}"
        return None

    def overflows(self, weights: LoraWeights) -> str | None:
        """Why the adapter cannot be held in the pool's types (float16 ends at 65504, int8 is coarse), or None."""
        parts: list[tuple[str, str, float, torch.dtype]] = []
        for (projection, layer), pair in weights.pairs.items():
            where = f"`{projection}` of layer {layer}"
            of_a, of_b = _highest(pair.a), _highest(pair.b)
            parts += [(where, "A", of_a, self.page_dtype), (where, "B", of_b, self.page_dtype)]
            parts.append((where, "the scale", abs(pair.scale), torch.float32))
            if self.page_dtype in INTEGERS:
                parts.append((where, "A times B", of_a * of_b, torch.float32))
        for (projection, layer), vectors in weights.vectors.items():
            for name, vector in (("the gain", vectors.gain), ("the bias", vectors.bias)):
                if vector is not None:
                    parts.append((f"`{projection}` of layer {layer}", name, _highest(vector), torch.float32))
        for projection, table in weights.tables.items():
            dtype = self._forms[projection].stored_dtype(table)
            parts.append((f"`{projection}`", "its rows", _highest(table.rows), dtype))
        for where, name, highest, dtype in parts:
            most = torch.finfo(torch.float32 if dtype in INTEGERS else dtype).max
            if not highest <= most:  # NaN is no number that it holds either
                return f"{where}: {name} has values above {most:g}, more than {dtype} holds"
        return too_coarse(weights, self.page_dtype)

    def has_room(self, weights: LoraWeights) -> bool:
        """Whether ``write`` would find its pages now."""
        free = self.free_pages()
        return all(free[kind] >= n for kind, n in self.pages_needed(weights).items())

    def free_pages(self) -> dict[str, int]:
        """Free pages of each projection, and free ``"table bytes"``."""
        with self._lock:
            return self._count_free()

    def _count_free(self) -> dict[str, int]:
        return {p: len(pages) for p, pages in self._free.items()} | {TABLE_BYTES: self._free_table_bytes}

    @property
    def nbytes(self) -> int:
        """Bytes of the pages, gains, biases and tables that are taken."""
        with self._lock:
            free, held = self._count_free(), tuple(self._held.values())
        total = self.table_bytes - free[TABLE_BYTES]
        for p in PROJECTIONS:
            scales = self.page_scales[p][0].nbytes if p in self.page_scales else 0
            total += (self.max_pages - free[p]) * (self.a[p][0].nbytes + self.b[p][0].nbytes + scales)
        for contents in held:
            total += sum(2 * store.gain[0].nbytes for name, store in self.sites.items() if contents.has_vectors(name))
        return total

    # --- writing and clearing ------------------------------------------------------------------------------------

    def write(self, slot: int, weights: LoraWeights) -> None:
        """Copy an adapter into an empty slot; it is computed with from the next step that names the slot.

        Raises PoolFull, with nothing changed, if pages are missing; ValueError for a slot that is taken, and for
        vectors in a pool without. After any other error the slot holds its pages until it is cleared.
        """
        needed = self.pages_needed(weights)
        if weights.vectors and not self.vectors:
            raise ValueError("this pool was made without room for gains and biases (vectors=True)")
        layers: dict[str, set[int]] = {}
        for p, layer in weights.vectors:
            layers.setdefault(p, set()).add(layer)
        with self._lock:
            if slot in self._held:
                raise ValueError(f"slot {slot} holds an adapter; clear it first")
            for kind, free in self._count_free().items():
                if needed.get(kind, 0) > free:
                    what, total = (
                        (kind, self.table_bytes) if kind == TABLE_BYTES else (f"pages of `{kind}`", self.max_pages)
                    )
                    raise PoolFull(f"{needed[kind]} {what} are needed, {free} of {total} are free")
            table_bytes = needed.pop(TABLE_BYTES, 0)
            self._free_table_bytes -= table_bytes
            held = {p: [self._free[p].pop() for _ in range(n)] for p, n in needed.items()}
            self._held[slot] = SlotContents(
                held, {p: frozenset(of) for p, of in layers.items()}, frozenset(weights.tables), table_bytes
            )
        if self._uploads is None:
            self._fill(slot, held, weights, lambda: None)
        else:
            # On a stream of its own, so that no step waits for the copies; the slot is named only after this returns.
            with torch.cuda.stream(self._uploads):
                self._fill(slot, held, weights, self._wait_for_clears)
            self._uploads.synchronize()
        with self._lock:
            self.version += 1

    def _wait_for_clears(self) -> None:
        # A slot that was just cleared was cleared, and last read, on another stream: that must come first. The lock,
        # because ``clear`` records this event anew at any time.
        with self._lock:
            self._uploads.wait_event(self._cleared)

    def _fill(self, slot: int, held: Mapping[str, list[int]], weights: LoraWeights, ready: Callable[[], None]) -> None:
        ready()
        for p, pages in held.items():
            layers = self.shapes.layers_of(p)
            for i, page in enumerate(pages):
                a, b = self.a[p][page], self.b[p][page]
                on_device = a.device.type != "cpu"
                if on_device:
                    to_a, to_b = a, b
                    a, b = (torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (to_a, to_b))
                scales = self.page_scales[p][page] if p in self.page_scales else None
                for layer in range(layers):
                    own = None if scales is None else scales[layer]
                    fill_page(a[layer], b[layer], own, weights.pairs.get((p, layer)), i * RANK_PAGE)
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
        self._fill_vectors(slot, weights)
        self._fill_tables(slot, weights.tables, ready)

    def _fill_vectors(self, slot: int, weights: LoraWeights) -> None:
        """All layers and columns of each site that has any: work lists on CUDA are the same for all layers."""
        touched = {p for p, _ in weights.vectors}
        for site, projections in POOL_SITES.items():
            if touched.isdisjoint(projections):
                continue
            store = self.sites[site]
            gain, bias = torch.ones(store.gain.shape[1:]), torch.zeros(store.bias.shape[1:])
            for j, p in enumerate(projections):
                columns = slice(store.columns[j], store.columns[j + 1])
                for layer in range(self.shapes.layers_of(p)):
                    if (vectors := weights.vectors.get((p, layer))) is not None:
                        for target, vector in ((gain, vectors.gain), (bias, vectors.bias)):
                            if vector is not None:
                                # reshape, or a vector of one element would be repeated
                                target[layer, columns] = vector.reshape(self.shapes.out_features[p]).float()
            store.gain[slot].copy_(gain)
            store.bias[slot].copy_(bias)

    def _fill_tables(self, slot: int, tables: Mapping[str, TableRows], ready: Callable[[], None]) -> None:
        """``ready`` once more for each table: its memory may be what a later ``clear`` has given back since."""
        if tables:
            made = {p: self._forms[p].put(table, self.device, ready) for p, table in tables.items()}
            with self._lock:
                self._tables[slot] = made

    def clear(self, slot: int) -> None:
        """Empty a slot and give its pages back; nothing happens if it is empty."""
        with self._lock:
            held = self._held.pop(slot, None)
            if held is None:
                return
            for p, pages in held.pages.items():
                self.ranks[p][slot] = 0
                self.scaling[p][slot] = 0
                self.page_table[p][slot] = -1
                self._free[p].extend(pages)
            if self._cleared is not None:
                self._cleared.record()
            # After the event: whoever gets a table's memory waits for it, and so for the steps that read the table.
            self._tables.pop(slot, None)
            self._free_table_bytes += held.table_bytes
            self.version += 1

    # --- the books -----------------------------------------------------------------------------------------------

    def contents(self, slot: int) -> SlotContents:
        """What a slot holds; nothing if it is empty."""
        with self._lock:
            return self._held.get(slot, _NOTHING)

    def pages_of(self, slot: int) -> Mapping[str, list[int]]:
        """The pages that a slot holds of each projection; empty if it holds none."""
        return self.contents(slot).pages

    def tables_of(self, slot: int) -> Mapping[str, DeviceTable]:
        """The rows of ``embed`` and ``lm_head`` that the slot's adapter replaces."""
        with self._lock:
            return self._tables.get(slot, {})

    def check_integrity(self) -> None:
        """Raise RuntimeError, with the numbers, unless every page is either free or held by exactly one slot, and the
        tables take what was booked for them."""
        with self._lock:
            for p in PROJECTIONS:
                held = [page for slot in self._held.values() for page in slot.pages.get(p, ())]
                everything = sorted(held + self._free[p])
                if everything != list(range(self.max_pages)):
                    raise RuntimeError(
                        f"LoRA pool, `{p}`: {len(held)} held + {len(self._free[p])} free pages are not the "
                        f"{self.max_pages} there are, each once"
                    )
            booked = sum(contents.table_bytes for contents in self._held.values())
            if booked + self._free_table_bytes != self.table_bytes:
                raise RuntimeError(
                    f"LoRA pool, tables: {booked} bytes held + {self._free_table_bytes} free are not the "
                    f"{self.table_bytes} there are"
                )
            for slot, tables in self._tables.items():
                n_bytes = sum(table.nbytes for table in tables.values())
                of_slot = self._held.get(slot, _NOTHING).table_bytes
                if n_bytes != of_slot:
                    raise RuntimeError(f"LoRA pool, slot {slot}: tables of {n_bytes} bytes, booked {of_slot}")
