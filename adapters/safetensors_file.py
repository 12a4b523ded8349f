"""The safetensors format, read from a buffer that is already in memory.

The safetensors library would map the file instead, and its tensors would then *be* the file: rewritten in place, it
would change the weights of a version that is being served. Here a file is read once, and the digest and the tensors
come from the same bytes. Copies are made by torch, which lets other threads run meanwhile; the library's in-memory
reader holds Python's lock for the whole of a big adapter, and with it the step loop.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

_HEADER_LIMIT: Final = 100_000_000  # the library's own

_ITEM_BYTES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4,
    "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

TORCH_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes adapters may have, by their safetensors names."""


class SafetensorsCorrupt(ValueError):
    """The bytes are not a well-formed safetensors file; the message says where."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header. ``start`` and ``nbytes`` locate it in the whole buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self, buffer: bytearray) -> torch.Tensor:
        """A copy of the tensor, contiguous, on the CPU. Its dtype must be one of ``TORCH_DTYPES``."""
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=TORCH_DTYPES[self.dtype])
        # As bytes first: the format does not promise that an offset is a multiple of the item size. Copied by numpy:
        # torch would wake a second team of OpenMP threads for it, beside the one that is computing a step.
        raw = torch.from_numpy(np.frombuffer(buffer, np.uint8, self.nbytes, self.start).copy())
        return raw.view(TORCH_DTYPES[self.dtype]).reshape(self.shape)


def read_header(buffer: bytes | bytearray) -> list[TensorEntry]:
    """The tensors of a safetensors file in the order of their data.

    Raises SafetensorsCorrupt unless the tensors have distinct names and tile the data exactly: a truncated file, an
    overlap or a hole never loads.
    """
    if len(buffer) < 8:
        raise SafetensorsCorrupt(f"it has {len(buffer)} bytes, fewer than the 8 that begin every safetensors file")
    size = int.from_bytes(buffer[:8], "little")
    if size > min(_HEADER_LIMIT, len(buffer) - 8):
        raise SafetensorsCorrupt(f"its header should have {size} bytes, and the file has {len(buffer)}")
    try:
        header = json.loads(bytes(buffer[8 : 8 + size]), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise SafetensorsCorrupt(f"its header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise SafetensorsCorrupt("its header is not an object")
    entries = [_entry(name, value, 8 + size) for name, value in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    end = 8 + size
    for entry in entries:
        if entry.start != end:
            raise SafetensorsCorrupt(f"tensor {entry.name} begins at byte {entry.start}, expected {end}")
        end += entry.nbytes
    if end != len(buffer):
        raise SafetensorsCorrupt(f"its tensors end at byte {end}, and the file has {len(buffer)} (truncated?)")
    return entries


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} occurs twice")
    return result


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            dtype in _ITEM_BYTES and all(type(n) is int and n >= 0 for n in shape) and 0 <= begin <= end
        ):
            if math.prod(shape) * _ITEM_BYTES[dtype] != end - begin:
                raise SafetensorsCorrupt(f"tensor {name}: {end - begin} bytes are not a {dtype} of shape {shape}")
            return TensorEntry(name, dtype, tuple(shape), data_start + begin, end - begin)
        case _:
            raise SafetensorsCorrupt(f"tensor {name} has a malformed header entry: {json.dumps(value):.200}")
