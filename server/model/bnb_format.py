"""NF4 weights as bitsandbytes stores them in safetensors: quantising, encoding and decoding one weight.

The keys beside ``….weight`` and the JSON in ``quant_state`` are those of bitsandbytes' ``QuantState.as_dict``, which
transformers writes and reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import bitsandbytes.functional as bnb
import torch

from manylora.kernels.nf4_code import NF4_CODE
from manylora.kernels.nf4_tensor import NestedAbsmax, Nf4Tensor
from manylora.server.model.layout import NESTED_PARTS

BLOCKSIZE: Final = 64
NESTED_BLOCKSIZE: Final = 256

_CHUNK: Final = 1 << 24
"""Elements quantised at a time: bitsandbytes' CPU path makes six fp32-sized temporaries of what it is given."""

_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def torch_dtype(name: str) -> torch.dtype:
    """``bfloat16``, ``float16`` or ``float32`` as torch's type."""
    return _DTYPES[name]


def quantize(weight: torch.Tensor, *, nested: bool = True) -> Nf4Tensor:
    """Quantise ``weight`` ``[N, K]`` (bf16, fp16 or fp32) to NF4 in blocks of 64.

    Bit-equal to ``bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)`` on the
    same device. Raises ValueError when the weight holds a NaN or an infinity.
    """
    n, k = weight.shape
    flat = weight.contiguous().view(-1)
    packed, absmax = [], []
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        codes, state = bnb.quantize_4bit(chunk, blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=False)
        packed.append(codes.view(-1))
        absmax.append(state.absmax)
    scales = torch.cat(absmax)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("it holds values that are not finite")
    return Nf4Tensor(
        packed=torch.cat(packed),
        absmax=nest(scales) if nested else scales,
        quant_map=torch.tensor(NF4_CODE, device=weight.device),
        shape=(n, k),
        blocksize=BLOCKSIZE,
        dtype=weight.dtype,
    )


def nest(absmax: torch.Tensor) -> NestedAbsmax:
    """Quantise scales, fp32 ``[blocks]``, as ``quantize_4bit(compress_statistics=True)`` does."""
    offset = absmax.mean()
    codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    # The code table is bitsandbytes' own, shared between all weights; a private copy is safe to save and to keep.
    return NestedAbsmax(
        codes=codes, code=state.code.clone(), absmax=state.absmax, offset=offset.item(), blocksize=NESTED_BLOCKSIZE
    )


def encode(name: str, weight: Nf4Tensor) -> dict[str, torch.Tensor]:
    """The safetensors entries of ``weight`` under ``name`` (``….weight``)."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.blocksize,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    entries = {name: weight.packed.view(-1, 1), f"{name}.quant_map": weight.quant_map}
    if isinstance(weight.absmax, NestedAbsmax):
        nested = weight.absmax
        state |= {"nested_blocksize": nested.blocksize, "nested_dtype": "float32", "nested_offset": nested.offset}
        entries |= {
            f"{name}.absmax": nested.codes,
            f"{name}.nested_absmax": nested.absmax,
            f"{name}.nested_quant_map": nested.code,
        }
    else:
        entries[f"{name}.absmax"] = weight.absmax
    text = json.dumps(state).encode()
    entries[f"{name}.quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return entries


def decode(
    name: str, shape: tuple[int, int], names: Mapping[str, object], get: Callable[[str], torch.Tensor]
) -> Nf4Tensor:
    """The weight stored under ``name``, which the config says is ``shape`` ``(N, K)``.

    ``names`` tells which entries exist, ``get`` reads one. Raises ValueError saying what does not fit.
    """
    state = _state(get(f"{name}.quant_state.bitsandbytes__nf4"))
    if tuple(state["shape"]) != shape:
        raise ValueError(f"its stored shape is {state['shape']}, the config says {list(shape)}")
    blocksize = state["blocksize"]
    if shape[1] % blocksize:
        raise ValueError(f"rows of {shape[1]} are not whole blocks of {blocksize}, which the kernels need")
    quant_map = get(f"{name}.quant_map")
    if quant_map.shape != (16,) or not torch.allclose(quant_map.float(), torch.tensor(NF4_CODE), rtol=0, atol=1e-6):
        raise ValueError("its quant_map is not that of NF4")
    absmax: torch.Tensor | NestedAbsmax
    scales = absmax = get(f"{name}.absmax").view(-1)
    if any(f"{name}.{part}" in names for part in NESTED_PARTS):
        if "nested_offset" not in state:
            raise ValueError("its scales are nested, but its quant_state has no nested_offset")
        codes, scales = scales, get(f"{name}.nested_absmax").view(-1)
        absmax = NestedAbsmax(
            codes=codes,
            code=get(f"{name}.nested_quant_map"),
            absmax=scales,
            offset=float(state["nested_offset"]),
            blocksize=state["nested_blocksize"],
        )
    packed = get(name).contiguous().view(-1)
    weight = Nf4Tensor(
        # bnb_4bit_quant_storage only changes the type through which the same bytes are seen.
        packed=packed.view(torch.uint8),
        absmax=absmax,
        quant_map=quant_map,
        shape=shape,
        blocksize=blocksize,
        dtype=_DTYPES[state["dtype"]],
    )
    if not bool(torch.isfinite(scales).all()) or not math.isfinite(state.get("nested_offset", 0.0)):
        raise ValueError("its scales are not finite")
    return weight


def _state(tensor: torch.Tensor) -> dict[str, Any]:
    """The JSON object in a ``quant_state`` tensor, its fields checked."""
    if tensor.dtype != torch.uint8:
        raise ValueError(f"its quant_state is {tensor.dtype}, not bytes")
    try:
        state = json.loads(bytes(tensor.view(-1).tolist()))
    except ValueError as error:
        raise ValueError(f"its quant_state is not JSON ({error})") from error
    if not isinstance(state, dict) or state.get("quant_type") != "nf4":
        raise ValueError("its quant_state is not that of an NF4 weight")
    shape, nested = state.get("shape"), "nested_offset" in state
    if (
        not isinstance(shape, list)
        or not all(isinstance(size, int) for size in shape)
        or state.get("blocksize") not in (32, 64, 128, 256, 512, 1024, 2048, 4096)
        or state.get("dtype") not in _DTYPES
        or (nested and not isinstance(state["nested_offset"], int | float))
        or (nested and not isinstance(state.get("nested_blocksize"), int))
    ):
        raise ValueError(f"its quant_state is not understood: {state}")
    return state
