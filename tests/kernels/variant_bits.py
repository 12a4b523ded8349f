"""What a CPU kernels' variant computes from seeded inputs, in a process of its own: ``variant_bits.py NAME FILE``, or
``variant_bits.py NAME FILE WITHOUT``: products of bytes alone, as on a processor that has no ``WITHOUT``.

A process has one variant, whichever it first uses. The file then has the results by name, and what the self-test found.
The variant need not be one that this processor is offered: LLVM splits vectors that are wider than its registers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from manylora.kernels import cpu
from manylora.kernels.lora import BatchedLora, SiteAdapters
from manylora.kernels.lora_page import INTEGERS
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.lora_weights import LoraPair, LoraVectors, LoraWeights, TableRows
from manylora.kernels.nf4_code import NF4_CODE
from manylora.kernels.nf4_tensor import Nf4Tensor
from manylora.kernels.ops import AttentionShape, Ops, PagedSequences
from manylora.kernels.sites import SITES, LoraShapes

ROWS = (1, 2, 3, 4, 5, 8, 9, 15, 17, 26, 98)
"""Around the ends of each micro-kernel's and group's, and more than a block of rows."""
SHAPES = (
    AttentionShape(9, 3, 64), AttentionShape(4, 4, 128, window=20), AttentionShape(8, 1, 32),
    AttentionShape(6, 2, 16, window=5), AttentionShape(10, 2, 48), AttentionShape(4, 2, 256, softcap=3.0),
)  # fmt: skip
Results = Iterator[tuple[str, torch.Tensor]]


class Inputs:
    def __init__(self) -> None:
        self._random = torch.Generator().manual_seed(77)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._random)

    def nf4(self, n: int, k: int, blocksize: int) -> Nf4Tensor:
        codes = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, generator=self._random)
        absmax = torch.rand(n * k // blocksize, generator=self._random) + 0.1
        return Nf4Tensor(codes, absmax, torch.tensor(NF4_CODE), shape=(n, k), blocksize=blocksize)


def linears(ops: Ops, make: Inputs) -> Results:
    """Tiles that are no multiple of any number that is taken at once, depths that end within a panel."""
    for n, k, block in ((16, 64, 64), (176, 576, 64), (112, 384, 128), (48, 96, 32), (80, 320, 64)):
        weight = ops.prepare_linear([make.nf4(n, k, block)], None)
        yield f"NF4 {n} {k}, unpacked", ops.dense(weight)
        bf16 = ops.prepare_dense(make.normal(n, k).bfloat16(), None)
        for rows in ROWS:
            x, stream = make.normal(rows, k), make.normal(rows, n)
            for name, one in (("NF4", weight), ("bf16", bf16)):
                yield f"{name} {n} {k}, {rows} rows", ops.linear(x, one)
                yield f"{name} {n} {k}, {rows} rows onto", ops.linear(x, one, add_to=stream.clone())
            if ops.exact_inputs:
                positions = (torch.arange(ops.exact_inputs) * 5 + 3 * rows) % k
                exact = ops.linear(x, ops.exactly(weight, positions), add_to=stream.clone())
                yield f"NF4 {n} {k}, {rows} rows, some positions exact", exact
    table = ops.prepare_embedding(make.normal(1003, 100).bfloat16(), head=True)
    yield "embedding", ops.embed(torch.arange(1003), table)
    whole = ops.prepare_embedding(make.normal(1003, 96).bfloat16(), head=True)
    for rows in (1, 4, 7, 8, 21, 26):
        yield f"logits of {rows}", ops.logits(make.normal(rows, 100), table)
        yield f"logits of {rows} in whole spans", ops.logits(make.normal(rows, 96), whole)
        if ops.exact_inputs:
            exact = ops.exactly(whole, (torch.arange(ops.exact_inputs) * 5 + 3 * rows) % 96)
            yield f"logits of {rows}, some positions exact", ops.logits(make.normal(rows, 96), exact)


def elementwise(ops: Ops, make: Inputs) -> Results:
    for width in (8, 24, 64, 200, 576):
        yield f"norm of {width}", ops.rms_norm(3 * make.normal(5, width), make.normal(width), 1e-5)
        heads = make.normal(3, 4 * width)
        ops.head_norm_(heads, make.normal(width), 1e-5)
        yield f"norm of heads of {width}", heads
        yield f"SiLU of {width}", ops.silu_mul(20 * make.normal(5, 2 * width))


def attentions(ops: Ops, make: Inputs) -> Results:
    for shape in SHAPES:
        width = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
        cache = ops.new_kv_cache(1, 40, shape)[0]
        for tensor in cache:
            tensor.view(torch.uint8).fill_(255)  # a page may hold anything of its last owner: NaN, or NaN scales
        angles = torch.outer(torch.arange(400.0), 0.9 ** torch.arange(shape.head_dim // 2))
        rope = angles.cos().contiguous(), angles.sin().contiguous()
        tables = torch.arange(40, dtype=torch.int32).flip(0).view(2, 20).contiguous()
        for piece, parts in enumerate((((0, 0, 100), (1, 0, 17)), ((0, 100, 290), (1, 17, 18)), ((0, 290, 291),))):
            counts = torch.tensor([0, *(last - first for _, first, last in parts)])
            sequences = PagedSequences(
                starts=counts.cumsum(0).int(),
                contexts=torch.tensor([last for *_, last in parts]).int(),
                tables=tables[[i for i, *_ in parts]].contiguous(),
                positions=torch.cat([torch.arange(first, last) for _, first, last in parts]).int(),
            )
            qkv = 2 * make.normal(int(counts.sum()), width)
            yield f"attention {shape}, {piece}", ops.attention(qkv, rope, cache, sequences, shape)


def adapters(ops: Ops, make: Inputs) -> Results:
    """Segments of 1, 2, 3, 5 and 9 rows, ranks below and above a page, one of them with gains and biases."""
    for held in (torch.float32, torch.bfloat16, *INTEGERS):
        for what, result in _adapters_in(held, ops, make):
            yield f"{what}, held in {held}", result


def _adapters_in(held: torch.dtype, ops: Ops, make: Inputs) -> Results:
    features = {"q": 96, "k": 96, "v": 96, "o": 128, "gate": 96, "up": 96, "down": 224, "embed": 320, "lm_head": 96}
    outputs = {"q": 128, "k": 48, "v": 16, "o": 96, "gate": 224, "up": 224, "down": 96, "embed": 96, "lm_head": 320}
    shapes = LoraShapes(1, features, outputs)
    pool = LoraPool(shapes, max_slots=5, max_pages=12, max_rank=48, page_dtype=held, table_bytes=1 << 28)
    for slot, rank in enumerate((4, 16, 20, 33, 8)):
        pairs, vectors = {}, {}
        for p in ("q", "k", "v", "o", "gate", "up", "down"):
            pairs[p, 0] = LoraPair(make.normal(rank, features[p]), make.normal(outputs[p], rank), 0.5)
            if slot == 2:
                vectors[p, 0] = LoraVectors(1 + make.normal(outputs[p]), make.normal(outputs[p]))
        rows = {"lm_head": TableRows(torch.arange(5, 44), make.normal(39, 96))} if slot == 0 else {}
        pool.write(slot, LoraWeights(pairs, vectors, tables=rows))
    lora = BatchedLora(pool, "cpu")
    counts, routed, row = (1, 2, 3, 5, 9), [], 0
    for slot, count in enumerate(counts):
        routed += [(row + i, slot, 0.5 + slot) for i in range(count)]
        row += count
    step = lora.route(LoraSegments.from_pairs(routed), row)  # type: ignore[arg-type]
    for site in SITES:
        if site in ("embed", "lm_head"):
            continue
        k, n = features[SITES[site][0]], shapes.site_offsets(site)[-1]
        weight = ops.prepare_linear([make.nf4(n, k, 32)], None)
        x, stream = make.normal(row, k), make.normal(row, n)
        for name, onto in (("alone", None), ("onto", stream)):
            yield (
                f"adapters at {site}, {name}",
                ops.linear(x, weight, add_to=onto, adapters=SiteAdapters(lora, step, site, 0)),
            )
    for count in (1, 3, 12):
        table = pool.tables_of(0)["lm_head"]
        yield f"replaced logits of {count}", lora.kernel.table_product(make.normal(count, 96), table)


def main(name: str, file: str) -> None:
    cpu.choose(next(variant for variant in cpu.VARIANTS if variant.name == name))
    # They take the variant that was chosen.
    from manylora.kernels.cpu.ops import NumbaOps
    from manylora.kernels.cpu.self_test import self_test
    from tests.kernels.test_cpu_self_test import SMOL, shapes

    ops: Any = NumbaOps()
    found: dict[str, torch.Tensor] = {}
    for threads in (1, 3):
        torch.set_num_threads(threads)
        make = Inputs()
        for of in (linears, elementwise, attentions, adapters):
            for what, result in of(ops, make):
                found[f"{what}; {threads} threads"] = result.clone()
        for of in (linears, attentions):
            for what, result in of(NumbaOps("fp32"), make):
                found[f"exact {what}; {threads} threads"] = result.clone()
        for what, result in linears(NumbaOps("int8"), Inputs()):
            found[f"bytes {what}; {threads} threads"] = result.clone()
    faults = {str(one): list(map(str, self_test(ops, one))) for one in (shapes(), shapes("tiny", window=5, **SMOL))}
    torch.save({"results": found, "faults": faults, "variant": cpu.in_use().name}, file)


def bytes_without(name: str, file: str, feature: str) -> None:
    """As ``main``'s "bytes"; the kernels are to be compiled into a folder of their own, as they are other ones."""
    features = cpu.host_has
    cpu.host_has = lambda asked: asked != feature and features(asked)
    cpu.choose(next(variant for variant in cpu.VARIANTS if variant.name == name))
    from manylora.kernels.cpu.ops import NumbaOps
    from manylora.kernels.cpu.target import HAS_BYTE_PRODUCTS

    assert not HAS_BYTE_PRODUCTS
    results = {f"bytes {what}": result.clone() for what, result in linears(NumbaOps("int8"), Inputs())}
    torch.save({"results": results}, file)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        bytes_without(*sys.argv[1:])
    else:
        main(*sys.argv[1:])
