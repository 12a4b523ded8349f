"""The kernels' own layout of NF4 weights: nothing lost, and the byte-permute look-up exact for every input.

The PTX is run by a small emulator here (bit operations only), so that what the GPU will execute is checked without one.
"""

from __future__ import annotations

import random

import pytest
import torch

from manylora.kernels.cuda.nf4_lookup import DTYPES, decode_asm, nf4_lookup
from manylora.kernels.cuda.nf4_words import pack
from manylora.kernels.nf4_code import NF4_CODE
from manylora.kernels.nf4_tensor import NestedAbsmax, Nf4Tensor


def weight(n: int, k: int, seed: int, *, nested: bool = False, blocksize: int = 64) -> Nf4Tensor:
    """Random codes; scales of both signs of magnitude, nested ones with a code of their own."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-n * k // blocksize)
    absmax: torch.Tensor | NestedAbsmax = torch.rand(blocks, generator=generator) + 0.1
    if nested:
        absmax = NestedAbsmax(
            codes=torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator),
            code=torch.linspace(-1, 1, 256),
            absmax=torch.rand(-(-blocks // 256), generator=generator) * 0.4 + 0.1,
            offset=0.7 + seed / 100,
        )
    return Nf4Tensor(
        packed=torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, generator=generator),
        absmax=absmax,
        quant_map=torch.tensor(NF4_CODE),
        shape=(n, k),
        blocksize=blocksize,
    )


def emulate(asm: str, word: int, lane: int) -> list[int]:
    """The four outputs of ``decode_asm``'s PTX for one input word."""
    registers: dict[str, int] = {"$4": word, "%laneid": lane}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in asm.splitlines():
        text = line.strip().rstrip(";")
        if text in ("{", "}") or text.startswith(".reg"):
            continue
        operation, _, operands = text.partition(" ")
        target, *sources = [part.strip() for part in operands.split(",")]
        a = [value(source) for source in sources]
        if operation == "mov.u32":
            result = a[0]
        elif operation == "mad.lo.u32":
            result = a[0] * a[1] + a[2]
        elif operation == "and.b32":
            result = a[0] & a[1]
        elif operation == "xor.b32":
            result = a[0] ^ a[1]
        elif operation == "shr.u32":
            result = a[0] >> a[1]
        elif operation == "prmt.b32":
            octets = (a[0] | a[1] << 32).to_bytes(8, "little")
            result = 0
            for i in range(4):
                selector = a[2] >> 4 * i & 15
                octet = octets[selector & 7]
                result |= (0xFF * (octet >> 7) if selector & 8 else octet) << 8 * i
        else:
            raise AssertionError(f"the emulator does not know {operation}")
        registers[target] = result & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_permutes_look_up_every_code_at_every_place(dtype: torch.dtype) -> None:
    lookup = nf4_lookup(dtype)
    asm = decode_asm(lookup)
    bits = [v & 0xFFFF for v in torch.tensor(lookup.values).to(dtype).view(torch.int16).tolist()]
    generator = random.Random(1)
    words = [generator.getrandbits(32) for _ in range(300)]
    words += [label << 4 * place for label in range(16) for place in range(8)]
    words += [high << 4 | low for high in range(16) for low in range(16)]
    for word in words:
        expected = [bits[word >> 8 * i & 15] | bits[word >> 8 * i + 4 & 15] << 16 for i in range(4)]
        assert emulate(asm, word, generator.randrange(32)) == expected, f"{word:#010x}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_the_nearest_but_for_one(dtype: torch.dtype) -> None:
    """bfloat16: every code rounded to nearest. float16: 1.0 is its lower neighbour."""
    lookup = nf4_lookup(dtype)
    for label, code in enumerate(lookup.order):
        nearest = torch.tensor(NF4_CODE[code]).to(dtype).item()
        if dtype == torch.float16 and NF4_CODE[code] == 1.0:
            nearest = 1 - 2.0**-11
        assert lookup.values[label] == nearest
    assert sorted(lookup.order) == list(range(16))
    assert [lookup.order[lookup.labels[code]] for code in range(16)] == list(range(16))


def test_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bfloat16, float16 or float32, got torch\.float64"):
        nf4_lookup(torch.float64)


@pytest.mark.parametrize("nested", [False, True])
def test_packing_loses_nothing(nested: bool) -> None:
    weights = [weight(40, 192, 1, nested=nested), weight(8, 192, 2, nested=nested), weight(24, 192, 3, nested=nested)]
    packed = pack(weights, torch.bfloat16)
    lookup = nf4_lookup(torch.bfloat16)
    assert packed.shape == (72, 192)
    assert packed.nested == nested
    order = torch.tensor(lookup.order)
    rows = 0
    for one in weights:
        n = one.shape[0]
        flat = one.packed
        codes = torch.stack((flat >> 4, flat & 15), dim=1).view(n, 192)
        assert torch.equal(order[packed.labels()[rows : rows + n].long()], codes.long())
        assert torch.equal(packed.scales_fp32()[rows : rows + n], one.absmax_fp32().view(n, 3))
        rows += n
    original = sum(one.packed.nbytes for one in weights)
    assert packed.words.nbytes == original


def test_scales_nested_differently_are_held_in_fp32() -> None:
    packed = pack([weight(8, 64, 1, nested=True), weight(8, 64, 2)], torch.bfloat16)
    assert not packed.nested
    assert torch.equal(packed.scales_fp32()[:8].flatten(), weight(8, 64, 1, nested=True).absmax_fp32())


def test_what_the_kernels_cannot_hold_is_said() -> None:
    with pytest.raises(ValueError, match=r"\(8, 96\): its input size 96 is no multiple of 64"):
        pack([weight(8, 96, 1)], torch.bfloat16)
    with pytest.raises(ValueError, match="its blocks are of 128 weights"):
        pack([weight(8, 128, 1, blocksize=128)], torch.bfloat16)
    with pytest.raises(ValueError, match=r"one input size, got \[64, 128\]"):
        pack([weight(8, 128, 1), weight(8, 64, 1)], torch.bfloat16)
