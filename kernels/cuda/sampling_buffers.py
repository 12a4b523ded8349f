"""What ``sampling.launch`` reads and writes: device memory that stays where it is, and its pinned mirror."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them would overflow."""

_Ints = npt.NDArray[np.int32]
_Floats = npt.NDArray[np.float32]


class Edits(NamedTuple):
    """Sparse changes of one row; arrays of one length, each token at most once.

    ``x = logit + bias``; then ``x / repetition`` if ``x > 0`` else ``x * repetition``; then ``x - frequency -
    presence``, all in fp32. Nothing: ``-0.0`` (adding ``0.0`` changes the sign of ``-0.0``), 1, 0, 0. A ban is a bias
    of -inf.
    """

    token: _Ints
    bias: _Floats
    repetition: _Floats
    frequency: _Floats
    presence: _Floats


class Row(NamedTuple):
    """How to draw one row's token: ``top_k`` <= 0, ``top_p`` >= 1 and ``min_p`` = 0 cut nothing off.

    ``point`` in [0, 1). A temperature under ``GREEDY_BELOW`` takes the first maximum, whatever the rest says.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    point: float = 0.0
    edits: Edits | None = None


@dataclass
class SamplingBuffers:
    """Memory for up to ``max_rows`` rows of ``vocab`` logits and ``max_edits`` edits in all of them.

    ``cap``: how many tokens a search may gather. ValueError for a vocabulary of more than 2**19 tokens, whose weights
    could overflow 63 bits. For one thread; between ``fill`` and the next one there must be a ``read``, for the copies
    to the device are asynchronous.
    """

    max_rows: int
    vocab: int
    device: torch.device | str = "cuda"
    max_edits: int = 65_536
    cap: int = 2048

    device_arrays: dict[str, torch.Tensor] = field(init=False, repr=False)
    """Per row ``scale reach top_k top_p point active`` and ``offsets`` of its edits; per edit ``edit_*``."""
    replaced: torch.Tensor = field(init=False, repr=False)
    kept_x: torch.Tensor = field(init=False, repr=False)
    kept_i: torch.Tensor = field(init=False, repr=False)
    token: torch.Tensor = field(init=False, repr=False)
    """int32 ``[max_rows]``; -1 for a row without one."""
    status: torch.Tensor = field(init=False, repr=False)
    """int32 ``[max_rows]``: 0, ``sampling.NOT_FINITE`` or ``sampling.NO_TOKEN``."""
    highest: torch.Tensor = field(init=False, repr=False)
    """fp32 ``[max_rows]``: the largest raw logit, NaN if there is one."""

    def __post_init__(self) -> None:
        if not 0 < self.vocab <= 2**19:
            raise ValueError(f"vocab must be in 1..{2**19}, got {self.vocab}")
        if self.max_rows < 1 or self.max_edits < 0 or self.cap < 1:
            raise ValueError(f"max_rows, max_edits and cap: got {self.max_rows}, {self.max_edits}, {self.cap}")
        device, rows, edits = torch.device(self.device), self.max_rows, self.max_edits
        pinned = device.type == "cuda"
        per_row: dict[str, tuple[Any, int]] = {
            "reach": (np.float64, rows),
            "top_p": (np.float64, rows),
            "point": (np.float64, rows),
            "scale": (np.float32, rows),
            "top_k": (np.int32, rows),
            "active": (np.int32, rows),
            "offsets": (np.int32, rows + 1),
        }
        per_edit: dict[str, tuple[Any, int]] = {
            "edit_token": (np.int32, edits),
            "edit_bias": (np.float32, edits),
            "edit_repetition": (np.float32, edits),
            "edit_frequency": (np.float32, edits),
            "edit_presence": (np.float32, edits),
        }
        # One block of memory for what is per row, so that it goes over in one copy.
        self._block, self._host_block, self.device_arrays, self._host = _carve(per_row, device, pinned)
        _, _, edit_arrays, edit_host = _carve(per_edit, device, pinned)
        self.device_arrays |= edit_arrays
        self._host |= edit_host
        self._host_edits = {name: torch.from_numpy(array) for name, array in edit_host.items()}
        self.replaced = torch.empty(max(edits, 1), dtype=torch.float32, device=device)
        self.kept_x = torch.empty((rows, self.cap), dtype=torch.float32, device=device)
        self.kept_i = torch.empty((rows, self.cap), dtype=torch.int32, device=device)
        self._results, self._host_results, results, self._host_result = _carve(
            {"token": (np.int32, rows), "status": (np.int32, rows), "highest": (np.float32, rows)}, device, pinned
        )
        self.token, self.status, self.highest = results["token"], results["status"], results["highest"]

    def fill(self, rows: Sequence[Row | None]) -> None:
        """Sets the parameters of the first rows; ``None`` and the rows after them are inactive (their token is -1).

        Asynchronous for the device. ValueError for more rows or edits than there is room for.
        """
        edits = [row.edits if row is not None else None for row in rows]
        ends = np.cumsum([0] + [0 if one is None else len(one.token) for one in edits])
        if len(rows) > self.max_rows or ends[-1] > self.max_edits:
            raise ValueError(
                f"at most {self.max_rows} rows with {self.max_edits} edits fit, got {len(rows)} with {ends[-1]}"
            )
        host, n = self._host, len(rows)
        some = [Row() if row is None else row for row in rows]
        host["scale"][:n] = [
            0.0 if row.temperature < GREEDY_BELOW else math.log2(math.e) / row.temperature for row in some
        ]
        host["reach"][:n] = [row.temperature * -math.log(row.min_p) if row.min_p > 0 else math.inf for row in some]
        host["top_k"][:n] = [min(max(row.top_k, 0), self.vocab) for row in some]
        host["top_p"][:n] = [row.top_p for row in some]
        host["point"][:n] = [row.point for row in some]
        host["active"][:n] = [row is not None for row in rows]
        host["active"][n:] = 0
        host["offsets"][: n + 1] = ends
        host["offsets"][n + 1 :] = ends[-1]
        self._block.copy_(self._host_block, non_blocking=True)
        n_edits = int(ends[-1])
        if n_edits:
            for one, start in zip(edits, ends, strict=False):
                if one is not None:
                    for name, values in zip(Edits._fields, one, strict=True):
                        host[f"edit_{name}"][start : start + len(one.token)] = values
            for name, source in self._host_edits.items():
                self.device_arrays[name][:n_edits].copy_(source[:n_edits], non_blocking=True)

    def read(self, rows: int) -> tuple[_Ints, _Ints, _Floats]:
        """Tokens, statuses and largest raw logits of the first rows, once the device has them. Copies."""
        self._host_results.copy_(self._results)
        found = self._host_result
        return found["token"][:rows].copy(), found["status"][:rows].copy(), found["highest"][:rows].copy()


def _carve(
    fields: dict[str, tuple[Any, int]], device: torch.device, pinned: bool
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]:
    """One block on the device, one on the host, and arrays within them, each at a multiple of 16 bytes."""
    sizes = {name: -(-np.dtype(kind).itemsize * count // 16) * 16 for name, (kind, count) in fields.items()}
    block = torch.zeros(sum(sizes.values()), dtype=torch.uint8, device=device)
    host_block = torch.zeros(sum(sizes.values()), dtype=torch.uint8, pin_memory=pinned)
    arrays: dict[str, torch.Tensor] = {}
    host: dict[str, Any] = {}
    start = 0
    for name, (kind, count) in fields.items():
        stop = start + np.dtype(kind).itemsize * count
        host[name] = host_block[start:stop].numpy().view(kind)
        arrays[name] = block[start:stop].view(torch.from_numpy(np.empty(0, kind)).dtype)
        start += sizes[name]
    return block, host_block, arrays, host
