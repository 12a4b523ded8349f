"""One weight matrix in NF4, held exactly as bitsandbytes stores it.

The layout (bitsandbytes 0.50, ``functional.py: quantize_4bit`` and ``QuantState``): the row-major ``[N, K]`` matrix is
flattened and cut into blocks of ``blocksize`` elements. Each element is a 4-bit index into ``quant_map``; element 2j
is the *high* nibble of byte j. Each block has one fp32 scale, ``absmax``; with nested ("double") quantisation the
scales are themselves coded in 8 bits: ``absmax[i] = code[codes[i]] * absmax2[i // 256] + offset``.

No bitsandbytes here: the server reads and writes the format through the loader, and computes with this class alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NestedAbsmax:
    """Block scales that are themselves quantised: ``absmax[i] = code[codes[i]] * absmax[i // blocksize] + offset``.

    ``codes`` uint8 ``[blocks]``; ``code`` fp32 ``[256]``; ``absmax`` fp32 ``[ceil(blocks / blocksize)]``; ``offset``
    an fp32 value (the mean of the scales); ``blocksize`` 256 as bitsandbytes writes it.
    """

    codes: torch.Tensor
    code: torch.Tensor
    absmax: torch.Tensor
    offset: float
    blocksize: int = 256

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 1:
            raise ValueError(f"nested codes must be uint8 [blocks], got {_describe(self.codes)}")
        if self.code.dtype != torch.float32 or tuple(self.code.shape) != (256,):
            raise ValueError(f"the nested code must be float32 [256], got {_describe(self.code)}")
        scales = -(-self.codes.numel() // self.blocksize)
        if self.absmax.dtype != torch.float32 or tuple(self.absmax.shape) != (scales,):
            raise ValueError(f"the nested absmax must be float32 [{scales}], got {_describe(self.absmax)}")

    def expand(self) -> torch.Tensor:
        """The block scales, fp32 ``[blocks]``.

        Product and sum are rounded separately, as bitsandbytes does (``dequantize_blockwise``, then ``+= offset``):
        a fused multiply-add would differ in the last bit.
        """
        blocks = self.codes.numel()
        scale = self.absmax.repeat_interleave(self.blocksize)[:blocks]
        return self.code[self.codes.int()].mul_(scale).add_(self.offset)

    def to(self, device: torch.device | str) -> NestedAbsmax:
        return NestedAbsmax(
            codes=self.codes.to(device),
            code=self.code.to(device),
            absmax=self.absmax.to(device),
            offset=self.offset,
            blocksize=self.blocksize,
        )

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.code.nbytes + self.absmax.nbytes


@dataclass(frozen=True)
class Nf4Tensor:
    """A weight ``[N, K]`` in NF4. Frozen: nothing writes into its tensors; merging works on a dequantised copy.

    ``packed`` uint8 ``[N * K / 2]``; ``absmax`` either fp32 ``[blocks]`` or a `NestedAbsmax`, with
    ``blocks = ceil(N * K / blocksize)``; ``quant_map`` fp32 ``[16]``; ``shape`` ``(N, K)``; ``dtype`` the 16/32-bit
    type the weight had before quantisation, which is the type bitsandbytes dequantises to.

    Raises ValueError when these do not fit together.
    """

    packed: torch.Tensor
    absmax: torch.Tensor | NestedAbsmax
    quant_map: torch.Tensor
    shape: tuple[int, int]
    blocksize: int = 64
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        n, k = self.shape
        if n <= 0 or k <= 0 or n * k % 2:
            raise ValueError(f"an NF4 weight needs an even, positive number of elements, got shape {self.shape}")
        if self.packed.dtype != torch.uint8 or tuple(self.packed.shape) != (n * k // 2,):
            raise ValueError(f"packed must be uint8 [{n * k // 2}] for {self.shape}, got {_describe(self.packed)}")
        if self.quant_map.dtype != torch.float32 or tuple(self.quant_map.shape) != (16,):
            raise ValueError(f"quant_map must be float32 [16], got {_describe(self.quant_map)}")
        if isinstance(self.absmax, NestedAbsmax):
            got, ok = self.absmax.codes, True
        else:
            got, ok = self.absmax, self.absmax.dtype == torch.float32
        if not ok or tuple(got.shape) != (self.n_blocks,):
            raise ValueError(
                f"absmax must hold {self.n_blocks} scales for {self.shape} in blocks of {self.blocksize}, "
                f"got {_describe(got)}"
            )

    @property
    def n_blocks(self) -> int:
        """Number of quantisation blocks; only the last may be partial."""
        return -(-self.shape[0] * self.shape[1] // self.blocksize)

    @property
    def nested(self) -> bool:
        """Whether the block scales are quantised as well."""
        return isinstance(self.absmax, NestedAbsmax)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes held, scales and tables included."""
        return self.packed.nbytes + self.absmax.nbytes + self.quant_map.nbytes

    def absmax_fp32(self) -> torch.Tensor:
        """The block scales, fp32 ``[blocks]``, un-nested where they were nested."""
        return self.absmax.expand() if isinstance(self.absmax, NestedAbsmax) else self.absmax

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight ``[N, K]``: ``quant_map[index] * absmax[block]`` in fp32, rounded once to ``dtype``.

        In fp32 this is bit-equal to ``bitsandbytes.functional.dequantize_4bit``.
        """
        n, k = self.shape
        # One look-up per byte gives both of its elements: half the index traffic of splitting the nibbles first.
        byte = torch.arange(256, device=self.device)
        pairs = torch.stack((self.quant_map[byte >> 4], self.quant_map[byte & 15]), dim=1)
        flat = pairs.index_select(0, self.packed.int()).view(-1)
        absmax = self.absmax_fp32()
        whole = n * k // self.blocksize
        flat[: whole * self.blocksize].view(whole, self.blocksize).mul_(absmax[:whole, None])
        if whole < self.n_blocks:
            flat[whole * self.blocksize :].mul_(absmax[whole])
        return flat.view(n, k).to(dtype)

    def rows(self, first: int, last: int) -> Nf4Tensor:
        """Rows ``first .. last - 1`` as a weight of their own, in memory of their own: the very same values.

        Scales stay nested where the cut lies between two of their blocks, else they are written out in fp32. Raises
        ValueError if rows are not whole quantisation blocks.
        """
        n, k = self.shape
        if not 0 <= first < last <= n or k % self.blocksize:
            raise ValueError(f"rows {first} to {last} cannot be cut out of {self.shape}, blocks of {self.blocksize}")
        blocks = slice(first * k // self.blocksize, last * k // self.blocksize)
        absmax: torch.Tensor | NestedAbsmax
        if isinstance(self.absmax, NestedAbsmax) and blocks.start % self.absmax.blocksize == 0:
            nested, step = self.absmax, self.absmax.blocksize
            scales = nested.absmax[blocks.start // step : -(-blocks.stop // step)]
            absmax = NestedAbsmax(nested.codes[blocks].clone(), nested.code, scales.clone(), nested.offset, step)
        else:
            absmax = self.absmax_fp32()[blocks].clone()
        packed = self.packed[first * k // 2 : last * k // 2].clone()
        return Nf4Tensor(packed, absmax, self.quant_map, (last - first, k), self.blocksize, self.dtype)

    def to(self, device: torch.device | str) -> Nf4Tensor:
        """The same weight on ``device``; itself if it is there already."""
        if self.device == torch.device(device):
            return self
        return Nf4Tensor(
            packed=self.packed.to(device),
            absmax=self.absmax.to(device),
            quant_map=self.quant_map.to(device),
            shape=self.shape,
            blocksize=self.blocksize,
            dtype=self.dtype,
        )


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
