"""Launch configurations: tiles by rows of the batch, splits of K by shape of the weight, from a data file.

``configs.json`` holds, for each architecture, what ``make gpu-check --tune`` wrote, or what the compiler's figures
and the bandwidth arithmetic suggest (its ``source`` says which). An architecture that is not in it gets those of the
nearest older one, an unknown shape a computed number of splits.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

import torch

ROW_TILES = (16, 32, 64)
"""Rows that a tile can have: BM of the linear kernel."""

_MIN_BLOCKS_PER_SPLIT = 8
"""Below 8 blocks of 64 a program spends most of its time on starting and on the exchange of planes."""


@dataclass(frozen=True)
class TileConfig:
    """How the linear kernel is launched for up to ``bm`` rows."""

    bm: int
    bn: int
    nb: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """Of a thread; None leaves it to the compiler. Set where a few fewer let a processor hold another program."""


@dataclass(frozen=True)
class Configs:
    """Of one architecture. ``dense_above``: more rows than this are multiplied with dequantised weights."""

    arch: str
    source: str
    tiles: Mapping[int, TileConfig]
    splits: Mapping[str, int]
    dense_above: int
    programs: int

    def tile(self, rows: int) -> TileConfig:
        """For a batch of ``rows``."""
        return self.tiles[next((bm for bm in ROW_TILES if rows <= bm), ROW_TILES[-1])]

    def splits_of(self, n: int, k: int) -> int:
        """Into how many shares K is cut for a weight ``[n, k]``: whatever the number of rows, because the order of
        summation depends on it and a row's bits must not depend on the batch.

        Without a tuned value: enough programs to keep a GPU of ``programs`` busy, each with at least 8 blocks of 64.
        """
        if (tuned := self.splits.get(f"{n}x{k}")) is not None:
            return tuned
        tiles = -(-n // self.tiles[ROW_TILES[0]].bn)
        return max(1, min(-(-self.programs // tiles), k // 64 // _MIN_BLOCKS_PER_SPLIT))


def parse(data: Mapping[str, object]) -> dict[str, Configs]:
    """The contents of ``configs.json``. ValueError names the architecture and what is wrong with it."""
    found = {}
    for arch, entry in data.items():
        if not isinstance(entry, dict):
            raise ValueError(f"configs.json: {arch}: expected an object")
        try:
            tiles = {int(bm): TileConfig(int(bm), **fields) for bm, fields in entry["tiles"].items()}
            if sorted(tiles) != list(ROW_TILES):
                raise ValueError(f"tiles for {sorted(tiles)} rows, not {list(ROW_TILES)}")
            for tile in tiles.values():
                if tile.bn % 16 or tile.nb not in (1, 2, 4) or tile.num_warps not in (1, 2, 4, 8, 16):
                    raise ValueError(f"{tile} cannot be launched")
            splits = {str(shape): int(count) for shape, count in entry["splits"].items()}
            if any(count < 1 for count in splits.values()):
                raise ValueError("splits must be 1 or more")
            found[arch] = Configs(
                arch, str(entry["source"]), tiles, splits, int(entry["dense_above"]), int(entry["programs"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"configs.json: {arch}: {error!r}") from error
    return found


@functools.cache
def shipped() -> dict[str, Configs]:
    """All that are shipped, by architecture (``sm_80``, ``sm_90``)."""
    text = resources.files(__package__).joinpath("configs.json").read_text(encoding="utf-8")
    return parse(json.loads(text))


def configs_for(device: torch.device) -> Configs:
    """Of a device; without a GPU (the interpreter) the first."""
    known = shipped()
    if device.type != "cuda":
        return known[min(known)]
    major, minor = torch.cuda.get_device_capability(device)
    older = [arch for arch in known if int(arch.removeprefix("sm_")) <= 10 * major + minor]
    return known[max(older, default=min(known), key=lambda arch: int(arch.removeprefix("sm_")))]
