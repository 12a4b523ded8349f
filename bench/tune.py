"""Launch configurations by measurement: what ``bench/gpu_kernels.py --tune`` writes into kernels/cuda/configs.json.

The number of splits of K decides the order of summation, and a row's bits must not depend on the batch. So it is chosen
once for each weight shape, by the geometric mean of the times over M in ``SPLIT_ROWS``; the tile of each row count is
then chosen by the geometric mean over all shapes. Splits, tiles, and splits again with the new tiles: what a tile of
other height leaves of the grid changes how many splits fill the GPU.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from gpu_timing import ROOT, Launch, check
from nf4_cases import Bench, Product, Shape, Weights, exact_product, launches_of
from triton.errors import TritonError

from manylora.kernels.cuda.configs import ROW_TILES, Configs, TileConfig, parse
from manylora.kernels.cuda.nf4_words import BLOCK

CONFIGS: Final = ROOT / "kernels" / "cuda" / "configs.json"
SPLIT_ROWS: Final = (1, 8, 16, 32)
TILE_ROWS: Final[Mapping[int, tuple[int, ...]]] = {16: (1, 8, 16), 32: (32,), 64: (64, 128)}
# (BN, 64-blocks an iteration, warps, stages). Left out is what the compiler's figures already rule out: fewer than 16
# rows of W a warp, which decode twice, and tiles that spill.
_NARROW = ((64, 4, 4, 3), (64, 2, 4, 4), (128, 4, 4, 3), (128, 2, 4, 4), (128, 4, 8, 3), (128, 2, 8, 4), (256, 2, 8, 3))
TILES: Final[Mapping[int, tuple[TileConfig, ...]]] = {
    bm: tuple(TileConfig(bm, *fields) for fields in candidates)
    for bm, candidates in {
        16: _NARROW,
        32: _NARROW,
        64: ((64, 2, 4, 3), (128, 2, 8, 3), (128, 2, 8, 4), (128, 4, 8, 3), (128, 1, 8, 4), (256, 2, 16, 3)),
    }.items()
}  # fmt: skip
_FEWEST_BLOCKS = 4
_SPLITS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16)
_SLACK = 2.0**-16

Key = tuple[Shape, int, TileConfig, int]


def split_candidates(shape: Shape, bn: int, processors: int) -> list[int]:
    """Numbers of splits that leave each share at least 4 blocks of 64, and a grid of half to 12 programs a processor;
    if none does, the nearest."""
    tiles, blocks = -(-shape.n // bn), shape.k // BLOCK
    possible = [splits for splits in _SPLITS if splits == 1 or blocks // splits >= _FEWEST_BLOCKS]
    sensible = [splits for splits in possible if processors / 2 <= tiles * splits <= 12 * processors]
    return sensible or [min(possible, key=lambda splits: abs(tiles * splits - 2 * processors))]


class OutOfTime(Exception):
    """The budget is spent; what has been chosen so far stands."""


class Tuner:
    """Measures configurations of the linear kernel, each once. ``deadline``: of ``time.monotonic()``."""

    def __init__(
        self, bench: Bench, shapes: Sequence[Shape], processors: int, deadline: float, say: Callable[[str], None]
    ) -> None:
        self._bench, self._shapes, self._processors = bench, shapes, processors
        self._deadline, self._say = deadline, say
        self._seconds: dict[Key, float] = {}
        self.tiles: dict[int, TileConfig] = dict(bench.configs.tiles)
        self.splits: dict[Shape, int] = {shape: bench.configs.splits_of(shape.n, shape.k) for shape in shapes}
        self.tuned: set[Shape] = set()
        self.complete = False

    def tune(self) -> Configs:
        """The best found before the deadline."""
        try:
            self._choose_splits()
            before = {bm: self.tiles[bm].bn for bm in (16, 32)}
            self._choose_tiles()
            if before != {bm: self.tiles[bm].bn for bm in (16, 32)}:
                self._choose_splits()
            self.complete = True
        except OutOfTime:
            self._say("the time is over: what has been chosen so far is kept")
        splits = {**self._bench.configs.splits, **{str(shape): self.splits[shape] for shape in self.tuned}}
        return replace(self._bench.configs, tiles=self.tiles, splits=splits)

    def _choose_splits(self) -> None:
        for shape in self._shapes:
            bn = self._tile(SPLIT_ROWS[0]).bn
            candidates = sorted({self.splits[shape], *split_candidates(shape, bn, self._processors)})
            keys = {splits: [(shape, m, self._tile(m), splits) for m in SPLIT_ROWS] for splits in candidates}
            best = self._best(shape, keys)
            if best is not None:
                self.splits[shape] = best
                self.tuned.add(shape)
                self._say(f"{shape}: {best} splits, {self._mean(keys[best]) * 1e6:.2f} µs over M {SPLIT_ROWS}")

    def _choose_tiles(self) -> None:
        for bm, rows in TILE_ROWS.items():
            candidates = dict.fromkeys((self.tiles[bm], *TILES[bm]))
            keys = {tile: [(s, m, tile, self.splits[s]) for s in self._shapes for m in rows] for tile in candidates}
            for shape in self._shapes:  # a weight at a time is in memory
                self._measure(shape, [key for each in keys.values() for key in each if key[0] == shape])
            means = {tile: self._mean(each) for tile, each in keys.items()}
            best = min(means, key=means.__getitem__)
            if math.isfinite(means[best]):
                self.tiles[bm] = best
                self._say(f"up to {bm} rows: {best}, {means[best] * 1e6:.2f} µs over M {rows} and all shapes")

    def _best(self, shape: Shape, keys: Mapping[int, Sequence[Key]]) -> int | None:
        self._measure(shape, [key for each in keys.values() for key in each])
        means = {candidate: self._mean(each) for candidate, each in keys.items()}
        best = min(means, key=means.__getitem__)
        return best if math.isfinite(means[best]) else None

    def _tile(self, m: int) -> TileConfig:
        return self.tiles[next((bm for bm in ROW_TILES if m <= bm), ROW_TILES[-1])]

    def _mean(self, keys: Sequence[Key]) -> float:
        """Geometric: a microsecond counts for more where there are few."""
        return math.exp(sum(math.log(self._seconds[key]) for key in keys) / len(keys))

    def _measure(self, shape: Shape, keys: Sequence[Key]) -> None:
        """Fill ``_seconds``, with infinity for what cannot be launched; OutOfTime between two row counts."""
        wanted = [key for key in dict.fromkeys(keys) if key not in self._seconds]
        if not wanted:
            return
        bench = self._bench
        weights = Weights(bench, shape, nested=True)
        variants = {(tile, splits): m for _, m, tile, splits in wanted}
        bench.timer.compile([self._one(weights, m, tile, splits) for (tile, splits), m in variants.items()])
        copies, dense = weights.all_words(), weights.words.dequantize()
        for m in sorted({key[1] for key in wanted}):
            if time.monotonic() > self._deadline:
                raise OutOfTime
            x = bench.inputs(m, shape.k)
            expected, magnitude = exact_product(x, dense)
            timed: list[tuple[Key, list[Launch]]] = []
            for key in (key for key in wanted if key[1] == m):
                kernels, tile, splits = bench.kernels(), key[2], key[3]
                products: list[Product] = [
                    lambda x, words=words, kernels=kernels, tile=tile, splits=splits: kernels.fused(
                        x, words, None, None, None, tile=tile, splits=splits
                    )
                    for words in copies
                ]
                try:
                    y = products[0](x)
                except (RuntimeError, TritonError) as error:  # out of shared memory or registers; not compiled
                    self._say(f"{shape}: {tile}, {splits} splits cannot be launched: {error}")
                    self._seconds[key] = math.inf
                    continue
                # A wrong result ends the tuning: something is broken that no configuration should break.
                check(f"{shape}, M {m}, {tile}, {splits} splits", y, expected, _SLACK * magnitude)
                timed.append((key, launches_of(bench, x, products)))
            timings = bench.timer.compare([launches for _, launches in timed])
            for (key, launches), timing in zip(timed, timings, strict=True):
                self._seconds[key] = timing.seconds / len(launches)

    def _one(self, weights: Weights, m: int, tile: TileConfig, splits: int) -> Launch:
        bench, x = self._bench, self._bench.inputs(m, weights.shape.k)
        return lambda: bench.kernels().fused(x, weights.words, None, None, None, tile=tile, splits=splits)


def tune(
    bench: Bench, shapes: Sequence[Shape], *, processors: int, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """The entry of this architecture for configs.json, measured for at most about ``seconds``.

    Raises WrongResult if a configuration gives a wrong product.
    """
    tuner = Tuner(bench, shapes, processors, time.monotonic() + seconds, say)
    found = tuner.tune()
    extent = "" if tuner.complete else f", ended after {seconds:.0f} s with {len(tuner.tuned)} of {len(shapes)} shapes"
    return entry(
        found, f"measured on {bench.card.gpu}, {time.strftime('%Y-%m-%d')}, bench/gpu_kernels.py --tune{extent}"
    )


def entry(configs: Configs, source: str) -> dict[str, Any]:
    """As in configs.json."""
    return {
        "source": source,
        "programs": configs.programs,
        "dense_above": configs.dense_above,
        "tiles": {
            str(bm): {
                name: value for name, value in dataclasses.asdict(tile).items() if name != "bm" and value is not None
            }
            for bm, tile in sorted(configs.tiles.items())
        },
        "splits": dict(sorted(configs.splits.items())),
    }


def write(path: Path, arch: str, new: Mapping[str, Any]) -> None:
    """Put an architecture's entry into a file, beside the others; ValueError, and nothing written, if it is no good."""
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    data[arch] = new
    parse(data)
    part = path.with_suffix(".part")
    part.write_text(_text(data), encoding="utf-8")
    os.replace(part, path)


def _text(data: Mapping[str, Mapping[str, Any]]) -> str:
    """JSON with a tile and a table of splits on a line each, as the file is written by hand."""
    entries = []
    for arch, fields in data.items():
        tiles = ",\n".join(f'      "{bm}": {json.dumps(tile)}' for bm, tile in fields["tiles"].items())
        plain = [f'    "{key}": {json.dumps(value)}' for key, value in fields.items() if key != "tiles"]
        plain.insert(len(plain) - 1, f'    "tiles": {{\n{tiles}\n    }}')
        entries.append(f'  "{arch}": {{\n' + ",\n".join(plain) + "\n  }")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
