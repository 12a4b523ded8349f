"""Rows of the embedding or of the output layer that an adapter replaces, in the form in which a device holds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from manylora.kernels.lora_weights import TableRows

TABLE_BYTES: Final = "table bytes"
"""The kind of "page" that tables are counted in."""

_TILE: Final = 16


@dataclass(frozen=True)
class TableForm:
    """How the rows of one table are stored. ``vocab``: rows of the base's own table; ``dtype``: what the rows are
    computed in; ``head``: they make logits, so they are padded to whole tiles (a GPU's kernel would be compiled anew,
    while serving, for another number of rows than a multiple of 16); ``tiled``: for the CPU's product kernels, see
    ``DeviceTable``."""

    vocab: int
    dtype: torch.dtype
    head: bool
    tiled: bool

    def stored_dtype(self, table: TableRows) -> torch.dtype:
        """bf16 rows stay what they are beside fp32 activations: widening is exact, and they are half as large."""
        keeps = self.dtype == torch.float32 and table.rows.dtype == torch.bfloat16
        return torch.bfloat16 if keeps else self.dtype

    def nbytes(self, table: TableRows) -> int:
        """What ``put`` will take on the device."""
        count, hidden = table.rows.shape
        rows = -(-count // _TILE) * _TILE if self.head else count
        ids = 0 if count == self.vocab else count * 8
        return ids + rows * hidden * self.stored_dtype(table).itemsize

    def put(self, table: TableRows, device: torch.device, ready: Callable[[], None]) -> DeviceTable:
        """A copy on the device, on the current stream; ``ready`` is called when its memory is taken, before that is
        written to."""
        count = table.ids.numel()
        rows = table.rows.to(self.stored_dtype(table))
        if self.head:
            rows = _tiles(rows) if self.tiled else _padded(rows)
        there = torch.empty(rows.shape, dtype=rows.dtype, device=device)
        ids = None if count == self.vocab else torch.empty(count, dtype=torch.int64, device=device)
        ready()
        there.copy_(rows)
        if ids is not None:
            ids.copy_(table.ids)
        return DeviceTable(count, ids, there, self.tiled)


@dataclass(frozen=True)
class DeviceTable:
    """``count`` rows that stand for the base's.

    ``ids`` int64 ``[count]``, ascending: the tokens they are of; None if they are of all tokens. ``rows`` ``[count,
    hidden]``, with rows of zeros up to a multiple of 16 if they make logits; if ``tiled`` ``[ceil(count / 16), hidden,
    16]``, in the order of ``cpu.bf16_linear.pack_bf16`` if they are bf16, else with output i of a tile at place i.
    """

    count: int
    ids: torch.Tensor | None
    rows: torch.Tensor
    tiled: bool

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + (0 if self.ids is None else self.ids.nbytes)

    def find(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of int64 ids ``[T]``: the row of each, and whether it has one (else the row is any)."""
        if self.ids is None:
            return token_ids, torch.ones_like(token_ids, dtype=torch.bool)
        at = torch.searchsorted(self.ids, token_ids).clamp_(max=self.count - 1)
        return at, self.ids[at] == token_ids

    def plain(self) -> torch.Tensor:
        """The rows as ``[count or more, hidden]``; a copy of a tiled table."""
        if not self.tiled:
            return self.rows
        if self.rows.dtype == torch.bfloat16:
            from manylora.kernels.cpu.bf16_linear import unpack_bf16  # numba is there, or the table would not be tiled

            return unpack_bf16(self.rows)
        return self.rows.permute(0, 2, 1).reshape(-1, self.rows.shape[1]).contiguous()

    def store_logits_(self, y: torch.Tensor, rows: torch.Tensor, logits: torch.Tensor) -> None:
        """Put ``logits`` ``[len(rows), >= count]`` where they belong in these rows (int64) of y ``[T, vocab]``."""
        logits = logits[:, : self.count].to(y.dtype)
        if self.ids is None:
            y[rows] = logits
        else:
            y[rows[:, None], self.ids[None, :]] = logits


def _tiles(rows: torch.Tensor) -> torch.Tensor:
    if rows.dtype == torch.bfloat16:
        from manylora.kernels.cpu.bf16_linear import pack_bf16  # numba, which only the CPU's kernels need

        return pack_bf16(rows)
    return _padded(rows).reshape(-1, _TILE, rows.shape[1]).permute(0, 2, 1).contiguous()


def _padded(rows: torch.Tensor) -> torch.Tensor:
    missing = -len(rows) % _TILE
    return torch.cat((rows, rows.new_zeros(missing, rows.shape[1]))) if missing else rows
