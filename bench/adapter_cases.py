"""What adapters cost: the linear layers of one decode step, with and without them, beside the floor of their bytes.

A replay is a whole step's linears: qkv, o, gate_up and down of every layer, in order. As many distinct layers as keep
the cache cold stand for all of them, in turn; an adapter's pages are its own in each. Rows are sorted by adapter, as
the scheduler sorts them, and every adapter has all seven projections.

Three variants of a step: ``none`` (no adapters), ``fused`` (the shrink and the expand within the linear's one launch)
and ``unfused`` (the adapter-free linear, then the two LoRA kernels by themselves).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from gpu_timing import Launch, check, cold_copies, poison
from nf4_cases import Bench, copy_of_words, exact_product, nf4_bytes

from manylora.kernels.cuda.linear import LinearAdapters, LinearKernels
from manylora.kernels.cuda.lora_op import TritonLora
from manylora.kernels.cuda.nf4_words import Nf4Words, pack
from manylora.kernels.cuda.scratch import Scratch
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_routing import LoraRouting
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.lora_weights import LoraPair, LoraWeights
from manylora.kernels.reference import lora_reference, pool_matrices
from manylora.kernels.sites import LAYER_PROJECTIONS, RANK_PAGE, SITES, LoraShapes
from manylora.server.model.families import ModelSpec
from manylora.server.model.synthetic import synthetic_nf4

LAYER_SITES: Final = ("qkv", "o", "gate_up", "down")
RANK: Final = 16
_SCALING = 0.1
_SLACK = 2.0**-16
_DELTA_SLACK = 2.0**-8  # h is rounded to 16 bits: half of this, relative


def linear_bytes(shapes: LoraShapes, nested: bool) -> int:
    """Of all layers' projections, as the format stores them."""
    sizes = [nf4_bytes(shapes.out_features[p], shapes.in_features[p], nested) for p in LAYER_PROJECTIONS]
    return shapes.n_layers * sum(sizes)


def adapter_bytes(shapes: LoraShapes, rank: int, itemsize: int = 2) -> int:
    """Of one adapter on all seven projections of all layers: its A and B, in whole pages as they are read."""
    padded = -(-rank // RANK_PAGE) * RANK_PAGE
    widths = sum(shapes.in_features[p] + shapes.out_features[p] for p in LAYER_PROJECTIONS)
    return shapes.n_layers * widths * padded * itemsize


def distinct_adapters(m: int) -> list[int]:
    """1, a quarter of the rows, one for each row."""
    return sorted({1, max(1, m // 4), m})


class AdapterCases:
    """Makes the layers and ``slots`` adapters of ``spec`` once. Its vocabulary may be small: there is no head here."""

    def __init__(self, bench: Bench, spec: ModelSpec, *, slots: int, rank: int = RANK, nested: bool = True) -> None:
        if rank % RANK_PAGE:
            raise ValueError(f"pages are filled at random, so the rank must be a multiple of {RANK_PAGE}, got {rank}")
        self._bench, self._rank, self._nested = bench, rank, nested
        self.shapes = spec.lora_shapes()  # of the whole model: what a step is reckoned from
        layer_bytes = linear_bytes(replace(self.shapes, n_layers=1), nested)
        self._layers = min(spec.n_layers, cold_copies(layer_bytes, bench.card.l2_bytes))
        self._pool = _random_pool(bench, replace(self.shapes, n_layers=self._layers), slots, rank)
        scratch = Scratch(bench.device)
        wide = bench.dtype == torch.float32
        self._kernels = LinearKernels(bench.configs, scratch, fast=not wide, wide=wide)
        self._lora = TritonLora(self._pool, scratch)
        random = torch.Generator(bench.device).manual_seed(2)
        self._words: list[dict[str, Nf4Words]] = [{}]
        for site in LAYER_SITES:
            parts = [
                synthetic_nf4(self.shapes.out_features[p], self.shapes.in_features[p], random, nested=nested)
                for p in SITES[site]
            ]
            self._words[0][site] = pack(parts, bench.dtype)
        for _ in range(1, self._layers):
            self._words.append({site: copy_of_words(words) for site, words in self._words[0].items()})
        # One counter for each fused launch of a step, zeroed together, as in serving.
        self._waits = torch.zeros(self.shapes.n_layers * len(LAYER_SITES), dtype=torch.int32, device=bench.device)

    def compile(self, rows: Sequence[int]) -> list[dict[str, object]]:
        """Compile the fused variants that these batches need, several at a time. No lines: triton keeps them."""
        bench, launches = self._bench, dict[tuple[object, ...], Launch]()
        for m in rows:
            segments = LoraSegments.from_pairs([(row, 0, 1.0) for row in range(m)], bench.device)
            assert segments is not None
            routing, inputs = self._lora.route(segments, m), self._inputs(m)
            for i, site in enumerate(LAYER_SITES):

                def launch(
                    routing: LoraRouting = routing, x: torch.Tensor = inputs[site], site: str = site, i: int = i
                ) -> torch.Tensor:
                    # Scratch memory and counter of its own, since others run at the same time; at the same place within
                    # 16 bytes as in a step, because triton compiles anew for a pointer that is not aligned.
                    done = torch.zeros(len(LAYER_SITES), dtype=torch.int32, device=bench.device)[i : i + 1]
                    adapters = LinearAdapters(TritonLora(self._pool), routing, site, 0, done)
                    return bench.kernels().fused(x, self._words[0][site], None, None, adapters)

                launches[bench.configs.tile(m), site] = launch
        bench.timer.compile(list(launches.values()))
        return []

    def run(self, m: int) -> list[dict[str, object]]:
        """JSON lines for a batch of ``m`` rows: the adapter-free step, and both variants for each number of adapters.

        Raises WrongResult if any of the outputs is wrong.
        """
        bench, inputs = self._bench, self._inputs(m)
        systems: list[tuple[str, int, list[Launch]]] = [("none", 0, self._step(inputs, None, fused=True))]
        for adapters in distinct_adapters(m):
            pairs = [(row, row * adapters // m, 1.0) for row in range(m)]
            segments = LoraSegments.from_pairs(pairs, bench.device)
            assert segments is not None
            routing = self._lora.route(segments, m)
            self._prove(inputs, pairs, routing)
            systems.append(("fused", adapters, self._step(inputs, routing, fused=True)))
            systems.append(("unfused", adapters, self._step(inputs, routing, fused=False)))
        timings = bench.timer.compare([launches for _, _, launches in systems])
        base, of_base = timings[0].seconds, linear_bytes(self.shapes, self._nested)
        of_adapter = adapter_bytes(self.shapes, self._rank, bench.dtype.itemsize)
        lines = []
        for (variant, adapters, _), timing in zip(systems, timings, strict=True):
            floor = adapters * of_adapter / (bench.card.copy_gbps * 1e9)
            lines.append({
                "kind": "adapters", "dtype": bench.dtype_name, "m": m, "adapters": adapters, "variant": variant,
                "rank": self._rank, "nested": self._nested, "layers": self.shapes.n_layers,
                "step_ms": round(timing.seconds * 1e3, 4), "spread": round(timing.spread, 3),
                "base_step_ms": round(base * 1e3, 4), "overhead": round(timing.seconds / base - 1, 4),
                "base_bytes": of_base, "adapter_bytes": adapters * of_adapter, "floor_ms": round(floor * 1e3, 4),
                "floor_overhead": round(floor / base, 4),
            })  # fmt: skip
        return lines

    def _inputs(self, m: int) -> dict[str, torch.Tensor]:
        of_site = {site: self.shapes.in_features[SITES[site][0]] for site in LAYER_SITES}
        return {site: self._bench.inputs(m, k, seed=i) for i, (site, k) in enumerate(of_site.items())}

    def _step(self, inputs: dict[str, torch.Tensor], routing: LoraRouting | None, *, fused: bool) -> list[Launch]:
        """The launches of a step, and before them, if any of them waits, one that zeroes the counters."""
        step: list[Launch] = [self._waits.zero_] if fused and routing is not None else []
        for layer in range(self.shapes.n_layers):
            for i, site in enumerate(LAYER_SITES):
                wait = layer * len(LAYER_SITES) + i
                step.append(
                    lambda site=site, layer=layer, wait=wait: self._linear(
                        inputs[site], site, layer % self._layers, wait, routing, fused=fused
                    )
                )
        return step

    def _linear(
        self, x: torch.Tensor, site: str, layer: int, wait: int, routing: LoraRouting | None, *, fused: bool
    ) -> torch.Tensor:
        words = self._words[layer][site]
        if routing is None or not fused:
            y = self._kernels.fused(x, words, None, None, None)
            if routing is not None:
                self._lora.add_(y, x, routing, site, layer)
            return y
        done = self._waits[wait : wait + 1]
        return self._kernels.fused(x, words, None, None, LinearAdapters(self._lora, routing, site, layer, done))

    def _prove(
        self, inputs: dict[str, torch.Tensor], pairs: Sequence[tuple[int, int, float]], routing: LoraRouting
    ) -> None:
        """Every site, in the last of the layers, both variants, against fp64; WrongResult if an element is off."""
        layer, adapters = self._layers - 1, len({slot for _, slot, _ in pairs})
        self._waits.zero_()
        for i, site in enumerate(LAYER_SITES):
            x, words = inputs[site], self._words[layer][site]
            base, magnitude = exact_product(x, words.dequantize())
            exact = lora_reference(base, x, self._pool, pairs, site, layer)
            slack = _SLACK * magnitude + _DELTA_SLACK * self._delta_magnitude(x, pairs, site, layer)
            for variant in ("fused", "unfused"):
                poison(*base.shape, self._bench.dtype, self._bench.device)
                y = self._linear(x, site, layer, i, routing, fused=variant == "fused")
                check(f"{site} {variant}, M {len(x)}, {adapters} adapters", y, exact, slack)
                # The second variant rounds y once more on its way.
                slack = slack + torch.finfo(self._bench.dtype).eps * base.abs()

    def _delta_magnitude(
        self, x: torch.Tensor, pairs: Sequence[tuple[int, int, float]], site: str, layer: int
    ) -> torch.Tensor:
        """``|h| @ |B|`` of every row: what a rounding of h is multiplied with."""
        columns = self.shapes.site_offsets(site)
        out = torch.zeros(len(x), columns[-1], dtype=torch.float64, device=x.device)
        for row, slot, _ in pairs:
            for j, projection in enumerate(SITES[site]):
                matrices = pool_matrices(self._pool, projection, slot, layer)
                assert matrices is not None
                a, b, scaling = matrices
                h = (x[row].double() @ a.double()) * scaling
                out[row, columns[j] : columns[j + 1]] = h.abs() @ b.double().abs()
        return out


def _random_pool(bench: Bench, shapes: LoraShapes, slots: int, rank: int) -> LoraPool:
    """Every slot taken by an adapter with pages of its own, of values of its own; no gains and biases, as the peers'
    kernels have none."""
    pages = -(-rank // RANK_PAGE)
    pool = LoraPool(
        shapes, max_slots=slots, max_pages=slots * pages, max_rank=rank, dtype=bench.dtype, device=bench.device,
        vectors=False,
    )  # fmt: skip
    nothing = {
        p: LoraPair(torch.zeros(rank, shapes.in_features[p]), torch.zeros(shapes.out_features[p], rank), _SCALING)
        for p in LAYER_PROJECTIONS
    }
    pairs = {(p, layer): nothing[p] for p in LAYER_PROJECTIONS for layer in range(shapes.n_layers)}
    for slot in range(slots):
        pool.write(slot, LoraWeights(pairs))
    # Filled on the device: 64 adapters of random numbers would take the host longer than all measurements.
    random = torch.Generator(bench.device).manual_seed(3)
    for site in LAYER_SITES:
        store, k = pool.sites[site], shapes.in_features[SITES[site][0]]
        store.a.normal_(0, k**-0.5, generator=random)
        store.b.normal_(0, rank**-0.5, generator=random)
    return pool
