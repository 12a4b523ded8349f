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

HEADER_LIMIT: Final = 4 << 20
"""Bytes. The largest adapter of the largest base has some ten thousand tensors, of about 150 bytes each; the library's
own limit of 100 MB would hold Python's lock for seconds."""
_MAX_NAME: Final = 512
_MAX_DIMS: Final = 8
_MAX_SIZE: Final = 1 << 48  # so that no product of sizes becomes a number of millions of digits

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


def read_header(buffer: bytes | bytearray, max_tensors: int | None = None) -> list[TensorEntry]:
    """The tensors of a safetensors file in the order of their data. A file of more than ``max_tensors`` is not read.

    Raises SafetensorsCorrupt unless the tensors have distinct names and tile the data exactly: a truncated file, an
    overlap or a hole never loads.
    """
    if len(buffer) < 8:
        raise SafetensorsCorrupt(f"it has {len(buffer)} bytes, fewer than the 8 that begin every safetensors file")
    size = int.from_bytes(buffer[:8], "little")
    if size > len(buffer) - 8:
        raise SafetensorsCorrupt(f"its header should have {size} bytes, and the file has {len(buffer)}")
    if size > HEADER_LIMIT:
        raise SafetensorsCorrupt(f"its header has {size} bytes, more than the {HEADER_LIMIT} that are read")
    try:
        header = json.loads(bytes(buffer[8 : 8 + size]), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise SafetensorsCorrupt(f"its header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise SafetensorsCorrupt("its header is not an object")
    if max_tensors is not None and len(header) > max_tensors + 1:  # __metadata__ is none
        raise SafetensorsCorrupt(f"it lists {len(header)} tensors, more than the {max_tensors} that could be served")
    for name in header:
        if len(name) > _MAX_NAME or any("\ud800" <= char <= "\udfff" for char in name):  # half a surrogate pair
            raise SafetensorsCorrupt(f"a tensor's name is not text of at most {_MAX_NAME} characters: {name!a:.99}")
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
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!a:.99} occurs twice")
            seen.add(name)
    return result


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            dtype in _ITEM_BYTES
            and len(shape) <= _MAX_DIMS
            and all(type(n) is int and 0 <= n <= _MAX_SIZE for n in shape)
            and 0 <= begin <= end <= _MAX_SIZE
        ):
            if math.prod(shape) * _ITEM_BYTES[dtype] != end - begin:
                raise SafetensorsCorrupt(f"tensor {name}: {end - begin} bytes are not a {dtype} of shape {shape}")
            return TensorEntry(name, dtype, tuple(shape), data_start + begin, end - begin)
        case _:
            raise SafetensorsCorrupt(f"tensor {name} has a malformed header entry")
