"""Each CPU kernel against torch, on the machine that is to serve: a processor, a compiler or a library that computes
something else than was tested elsewhere is found before anybody gets its answers.

Inputs are small and seeded; depths, heads and quantisation blocks are the model's own, numbers of outputs and rows are
odd ones, so that every way through a kernel's loops is taken: one row (two tiles at once, and a last one alone), a few,
a panel's, more than a block of them. Each product has inputs of its own: a kernel that does nothing must not find the
right result in memory that was used before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from manylora.kernels.cpu import Arithmetic, kv_levels, nf4_reference
from manylora.kernels.cpu.nf4_inner import SPAN
from manylora.kernels.lora import BatchedLora, SiteAdapters
from manylora.kernels.lora_page import INTEGERS
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.lora_weights import LoraPair, LoraVectors, LoraWeights, TableRows
from manylora.kernels.nf4_code import NF4_CODE
from manylora.kernels.nf4_tensor import Nf4Tensor
from manylora.kernels.ops import AttentionShape, Ops, PagedSequences
from manylora.kernels.reference import absolute, site_reference
from manylora.kernels.sites import SITES, LoraShapes
from manylora.kernels.torch_ops import TorchOps, rotate

_EPS = 2.0**-24
"""Half the distance from 1 to the next fp32 value: what rounding changes at most."""
_LIKELY = 8.0
"""A sum of n terms is off by less than ``_LIKELY * sqrt(n) * _EPS`` of the sum of the magnitudes, as long as rounding
errors are independent with mean zero (Higham and Mary 2019, theorem 2.4), but once in 10^13 values. The certain bound,
n instead of the root, passes a kernel that leaves out four terms of 14336."""
_OUTPUTS = 112
"""Outputs of a linear layer that is tested: seven tiles of 16, which no share of the threads divides evenly."""
_ROWS = (1, 2, 3, 4, 9, 98)
_EPSILON = 1e-5


@dataclass(frozen=True)
class Fault:
    """A kernel that does not compute what torch does, and how far it is off."""

    kernel: str
    problem: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.problem}"


@dataclass(frozen=True)
class ModelShapes:
    """What the model will ask of the kernels. ``linears``: ``(inputs, quantisation block)`` of its NF4 weights, each
    pair once; ``attention``: each kind of layer's, if they differ."""

    lora: LoraShapes
    linears: tuple[tuple[int, int], ...]
    attention: tuple[AttentionShape, ...]


class _Bad(Exception):
    """A result is off; the message says by how much."""


def self_test(ops: Ops, shapes: ModelShapes, arithmetic: Arithmetic = "int16") -> list[Fault]:
    """What is wrong with the CPU operations ``ops``, made for ``arithmetic``, and the CPU's adapter kernels; nothing,
    it is to be hoped."""
    faults: list[Fault] = []
    for kernel, check in _checks(_Inputs(), ops, TorchOps("cpu", torch.float32, resident=True), shapes, arithmetic):
        try:
            check()
        except _Bad as problem:
            faults.append(Fault(kernel, str(problem)))
        except Exception as error:  # noqa: BLE001 - whatever a kernel may raise is a reason to do without it
            faults.append(Fault(kernel, f"{type(error).__name__}: {error}"))
    return faults


def _checks(
    make: _Inputs, ops: Ops, plain: Ops, shapes: ModelShapes, arithmetic: Arithmetic
) -> Iterator[tuple[str, Callable[[], None]]]:
    lora = shapes.lora
    for k, block in shapes.linears:
        yield f"NF4 linear of {k} inputs", partial(_nf4_linear, make, ops, k, block, _INTEGERS[arithmetic])
    for k in dict.fromkeys(k for k, _ in shapes.linears):
        yield f"bf16 linear of {k} inputs", partial(_bf16_linear, make, ops, k)
    hidden = lora.in_features["q"]
    yield (
        "embedding and logits",
        partial(_tables, make, ops, plain, hidden, _INTEGERS[arithmetic]),
    )
    yield "largest logits", partial(_maxima, make, ops)
    yield "RMS norm", partial(_norm, make, ops, plain, hidden)
    yield "layer norm", partial(_layer_norm, make, ops, hidden)
    yield "SiLU", partial(_silu, make, ops, plain)
    yield "GELU", partial(_gelu, make, ops)
    yield "soft cap", partial(_softcap, make, ops, plain)
    yield "sum of two", partial(_sum, make, ops)
    for shape in dict.fromkeys(shapes.attention):
        yield f"norm of heads of {shape.head_dim}", partial(_head_norm, make, ops, plain, shape)
        yield f"attention ({shape})", partial(_attention, make, ops, plain, shape)
    for site in SITES:
        yield f"adapters at `{site}`", partial(_adapters, make, ops, lora, site)
    yield "adapters at `qkv` in bf16", partial(_adapters, make, ops, lora, "qkv", page_dtype=torch.bfloat16)
    for held in INTEGERS:
        name = str(held).removeprefix("torch.")
        yield f"adapters at `qkv` in {name}", partial(_adapters, make, ops, lora, "qkv", page_dtype=held)
    for dtype in (torch.float32, torch.bfloat16):
        yield f"replaced logits in {dtype}", partial(_replaced_logits, make, hidden, dtype)


class _Inputs:
    """Seeded tensors, new ones at each call."""

    def __init__(self) -> None:
        self._random = torch.Generator().manual_seed(1234)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._random)

    def nf4(self, n: int, k: int, blocksize: int) -> Nf4Tensor:
        return Nf4Tensor(
            packed=torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, generator=self._random),
            absmax=torch.rand(n * k // blocksize, generator=self._random) + 0.1,
            quant_map=torch.tensor(NF4_CODE),
            shape=(n, k),
            blocksize=blocksize,
        )


def _compare(what: str, got: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor | float) -> None:
    """Raise unless ``got`` is within ``bound`` everywhere; NaN never is."""
    error = (got.double() - expected.double()).abs()
    off = ~(error <= bound)
    if off.any():
        raise _Bad(
            f"{what}: {int(off.sum())} of {off.numel()} values differ from torch's by more than rounding can, "
            f"by up to {float(error.max()):.3g} of {float(expected.abs().max()):.3g}"
        )


def _run(ops: Ops, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The result of an operation that is queued and run by all threads, as within a step."""
    with ops.together():
        result = call()
        ops.flush()
        return result.clone()


_Product = Callable[[torch.Tensor], torch.Tensor]


def _sum_bound(depth: int) -> float:
    """Of the difference between two sums of ``depth`` terms, relative to the sum of the magnitudes; both are rounded,
    and so are the products."""
    return 2 * _LIKELY * math.sqrt(depth + 8) * _EPS


def _check_linear(
    ops: Ops,
    make: _Inputs,
    ours: Any,
    matrix: torch.Tensor,
    bias: torch.Tensor | None,
    terms: int,
    product: _Product | None = None,
    tested: Sequence[int] = _ROWS,
) -> None:
    """Each number of rows against fp64; then all together, which must have the same bits; then onto a residual.

    ``matrix`` ``[N, K]`` is what the kernel multiplies, ``product(x)`` what it makes of it, if not ``x @ matrix.T``; it
    adds ``terms`` terms in fp32.
    """
    n, k = matrix.shape
    matrix = matrix.double()

    def exact(x: torch.Tensor) -> torch.Tensor:
        return (x.double() @ matrix.T if product is None else product(x)) + (0 if bias is None else bias)

    def size(x: torch.Tensor) -> torch.Tensor:
        return x.double().abs() @ matrix.abs().T + (0 if bias is None else bias.abs())

    xs = [make.normal(rows, k) for rows in tested]
    results = [_run(ops, partial(ops.linear, x, ours)) for x in xs]
    for x, got in zip(xs, results, strict=True):
        _compare(f"{len(x)} rows", got, exact(x), _sum_bound(terms) * size(x))
    if not torch.equal(_run(ops, partial(ops.linear, torch.cat(xs), ours)), torch.cat(results)):
        raise _Bad("rows have other bits alone than among others")
    stream, x = make.normal(5, n), make.normal(5, k)
    expected = stream + exact(x)
    bound = _sum_bound(terms) * (size(x) + stream.abs())
    _compare("added to a residual", _run(ops, partial(ops.linear, x, ours, add_to=stream)), expected, bound)


_INTEGERS: Final[Mapping[Arithmetic, nf4_reference.Integers | None]] = {
    "int16": nf4_reference.WORDS,
    "int8": nf4_reference.BYTES,
    "fp32": None,
}


def _nf4_linear(make: _Inputs, ops: Ops, k: int, block: int, integers: nf4_reference.Integers | None) -> None:
    """In integers against the product of the rounded values: what rounding does is no fault, and would hide one."""
    weights, bias = [make.nf4(_OUTPUTS - 16, k, block), make.nf4(16, k, block)], make.normal(_OUTPUTS)
    matrix = torch.cat([w.dequantize() if integers is None else integers.rounded_weight(w) for w in weights])
    largest = torch.cat([w.absmax_fp32().reshape(w.shape[0], -1) for w in weights])
    terms, product = k, None
    if integers is not None:
        terms, product = k // SPAN, partial(integers.product, rounded=matrix, largest=largest)
    for added, tested in ((None, _ROWS), (bias, (1, 9))):
        _check_linear(ops, make, ops.prepare_linear(weights, added), matrix, added, terms, product, tested)
    if integers is not None and ops.exact_inputs:
        positions = torch.linspace(1, k - 1, ops.exact_inputs).long()  # of even and odd ones, and of several blocks
        exact = torch.cat([w.dequantize() for w in weights])
        product = partial(integers.product_but, rounded=matrix, largest=largest, positions=positions, exact=exact)
        ours = ops.exactly(ops.prepare_linear(weights, bias), positions)
        _check_linear(ops, make, ours, matrix, bias, terms + len(positions), product)


def _bf16_linear(make: _Inputs, ops: Ops, k: int) -> None:
    weight = make.normal(_OUTPUTS, k).bfloat16()
    _check_linear(ops, make, ops.prepare_dense(weight, None), weight, None, k)


def _tables(make: _Inputs, ops: Ops, plain: Ops, hidden: int, integers: nf4_reference.Integers | None) -> None:
    vocab = _OUTPUTS - 11  # no whole number of tiles
    table, ids = make.normal(vocab, hidden).bfloat16(), torch.tensor([0, 7, 8, 15, 16, vocab - 1])
    ours = ops.prepare_embedding(table, head=True)
    _compare("rows", ops.embed(ids, ours), table[ids].float(), 0.0)
    for rows in (1, 4, 7):
        x = make.normal(rows, hidden)
        size = (x.abs() @ table.float().abs().T).double()
        if integers is None or hidden % SPAN:
            exact = plain.logits(x, plain.prepare_embedding(table, head=True)).double()
        else:
            exact = integers.logits(x, table)
        _compare(f"logits of {rows} rows", _run(ops, partial(ops.logits, x, ours)), exact, _sum_bound(hidden) * size)
        if ops.exact_inputs and integers is not None and hidden % SPAN == 0:
            positions = torch.linspace(1, hidden - 1, ops.exact_inputs).long()
            got = _run(ops, partial(ops.logits, x, ops.exactly(ours, positions)))
            exact = integers.logits(x, table, positions.tolist())
            _compare(f"logits of {rows} rows, some positions exact", got, exact, _sum_bound(hidden) * size)


def _maxima(make: _Inputs, ops: Ops) -> None:
    from manylora.kernels.cpu.maxima import first_maxima  # numba, which this module's importers need not have

    rows = make.normal(9, 1200)
    rows[2] = rows[2].round()
    rows[3, 700:702] = math.nan

    with ops.together():
        found = first_maxima(rows)
        found.highest[:], found.places[:] = -1, -1  # a kernel that does nothing must not find the right result
        ops.flush()
    places = torch.from_numpy(rows.numpy().argmax(axis=1))
    _compare("places", torch.from_numpy(found.places), places, 0.0)
    values = rows[torch.arange(len(rows)), places]
    _compare("values", torch.from_numpy(found.highest).nan_to_num(9e9), values.nan_to_num(9e9), 0.0)


def _norm(make: _Inputs, ops: Ops, plain: Ops, width: int) -> None:
    for rows in (1, 37):
        x, weight = 3 * make.normal(rows, width), make.normal(width)
        got, exact = _run(ops, partial(ops.rms_norm, x, weight, _EPSILON)), plain.rms_norm(x, weight, _EPSILON)
        # A sum of positive terms; the root halves its error.
        _compare(f"{rows} rows", got, exact, _sum_bound(width) * exact.double().abs())


def _layer_norm(make: _Inputs, ops: Ops, width: int) -> None:
    for rows in (1, 37):
        x, weight, bias = 3 * make.normal(rows, width) + 1, make.normal(width), make.normal(width)
        got = _run(ops, partial(ops.layer_norm, x, weight, bias, _EPSILON))
        wide = x.double()
        scaled = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, correction=0, keepdim=True) + _EPSILON).sqrt()
        # Relative to what is added: the mean is off by its sum's bound, and so is each difference to it.
        size = scaled.abs() * weight.abs() + weight.abs() + bias.abs()
        _compare(f"{rows} rows", got, scaled * weight + bias, _sum_bound(width) * size)


def _head_norm(make: _Inputs, ops: Ops, plain: Ops, shape: AttentionShape) -> None:
    width = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
    ours, weight = make.normal(3, width), make.normal(shape.head_dim)
    exact = ours.clone()
    ops.head_norm_(ours[:, : shape.q_size], weight, _EPSILON)
    plain.head_norm_(exact[:, : shape.q_size], weight, _EPSILON)
    _compare("heads", ours, exact, _sum_bound(shape.head_dim) * exact.double().abs())


def _silu(make: _Inputs, ops: Ops, plain: Ops) -> None:
    for rows in (1, 9):
        gate_up = make.normal(rows, 2 * _OUTPUTS)
        gate_up[:, :_OUTPUTS] *= 20  # into both tails of the exponential
        got, exact = _run(ops, partial(ops.silu_mul, gate_up)), plain.silu_mul(gate_up)
        # The exponential is good to 2 units, and magnifies its argument's rounding (up to 88 half units of 2^-24);
        # below 1e-30 it is clamped, where the true value is smaller still.
        _compare(f"{rows} rows", got, exact, 100 * _EPS * exact.double().abs() + 1e-30)


def _gelu(make: _Inputs, ops: Ops) -> None:
    for rows in (1, 9):
        gate_up = make.normal(rows, 2 * _OUTPUTS)
        gate_up[:, :_OUTPUTS] *= 3  # into both tails
        got = _run(ops, partial(ops.gelu_mul, gate_up))
        x, up = gate_up.double().chunk(2, dim=-1)
        # The tanh form; written with tanh, as torch has it, it is 0 in the left tail even in fp64.
        exact = x * torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x**3)) * up
        # As SiLU, of an argument that is itself rounded four times.
        _compare(f"{rows} rows", got, exact, 500 * _EPS * exact.abs() + 1e-30)
        alone = _run(ops, partial(ops.gelu, gate_up[:, :_OUTPUTS]))
        _compare(f"{rows} rows without up", alone, exact / up, 500 * _EPS * (exact / up).abs() + 1e-30)


def _softcap(make: _Inputs, ops: Ops, plain: Ops) -> None:
    for rows, width in ((1, _OUTPUTS), (9, _OUTPUTS - 11)):
        x = 30 * make.normal(rows, width)
        exact = plain.softcap_(x.double(), 20.0)
        # tanh is good to 2 units and magnifies its argument's rounding by at most 1.
        _compare(f"{rows} rows", _run(ops, partial(ops.softcap_, x, 20.0)), exact, 8 * _EPS * exact.abs())


def _sum(make: _Inputs, ops: Ops) -> None:
    x, y = make.normal(9, _OUTPUTS), make.normal(9, _OUTPUTS)
    exact = x + y
    _compare("rows", _run(ops, partial(ops.add_, x, y)), exact, 0.0)


def _attention(make: _Inputs, ops: Ops, plain: Ops, shape: AttentionShape) -> None:
    """Two prompts at once, then a token more of each, and a chunk of a prompt that has begun. In integers against the
    attention to the rounded keys and values.

    Bound: a score, a sum of d products whose magnitudes add up to about 0.6 d, divided by sqrt(d), is off by
    ``_sum_bound(d) * 0.6 sqrt(d)``, a weight by as much of itself. Weights add up to one, values are below 5.
    """
    lengths, width = (37, 18), (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
    tables = torch.tensor([[5, 2, 4], [1, 3, 0]], dtype=torch.int32)
    angles = torch.outer(torch.arange(64.0), 0.9 ** torch.arange(shape.head_dim // 2))
    rope = angles.cos().contiguous(), angles.sin().contiguous()
    still = torch.ones_like(angles), torch.zeros_like(angles)
    caches = [one.new_kv_cache(1, 6, shape)[0] for one in (ops, plain)]
    for pages in caches[0]:
        pages.view(torch.uint8).fill_(255)  # a page may hold anything of its last owner: NaN, as values and as scales
    parts = (((0, 0, 20), (1, 0, 17)), ((0, 20, 36), (1, 17, 18)), ((0, 36, 37),))
    for part in parts:
        qkv = make.normal(sum(last - first for _, first, last in part), width)
        counts = torch.tensor([0, *(last - first for _, first, last in part)])
        sequences = PagedSequences(
            starts=counts.cumsum(0).int(),
            contexts=torch.tensor([last for *_, last in part], dtype=torch.int32),
            tables=tables[[i for i, *_ in part]].contiguous(),
            positions=torch.cat([torch.arange(first, last) for _, first, last in part]).int(),
        )
        held = _as_held(qkv, rope, sequences.positions, shape, ops)
        got, exact = (
            _run(one, partial(one.attention, given, angle, cache, sequences, shape))
            for one, given, angle, cache in zip((ops, plain), (qkv, held), (rope, still), caches, strict=True)
        )
        bound = 5 * (0.6 * shape.head_dim**0.5 * _sum_bound(shape.head_dim) + _sum_bound(max(lengths)))
        _compare(f"{len(part)} sequences from {part[0][1]} on", got, exact, bound)


def _as_held(
    qkv: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], positions: torch.Tensor, shape: AttentionShape, ops: Ops
) -> torch.Tensor:
    """Queries and keys rotated, keys and values as the pages of ``ops`` hold them."""
    parts = torch.split(qkv, [shape.q_size, shape.kv_size, shape.kv_size], dim=1)
    q, k, v = (part.reshape(len(qkv), -1, shape.head_dim) for part in parts)
    q, k = rotate(q, rope, positions.long()), rotate(k, rope, positions.long())
    if ops.kv_dtype == torch.int16:
        k, v = kv_levels.rounded(k).float(), kv_levels.rounded(v).float()
    return torch.cat([part.reshape(len(qkv), -1) for part in (q, k, v)], dim=1)


def _small(shapes: LoraShapes, site: str) -> LoraShapes:
    """One layer with the site's inputs and a few outputs; what is not of the site is as small as can be."""
    own = SITES[site]
    outputs = dict(zip(own, (_OUTPUTS, 48, 16), strict=False))
    inputs = {p: shapes.in_features[p] if p in own else 16 for p in shapes.in_features}
    return LoraShapes(1, inputs, {p: outputs.get(p, 16) for p in shapes.out_features})


def _adapters(
    make: _Inputs, ops: Ops, model: LoraShapes, site: str, *, page_dtype: torch.dtype = torch.float32
) -> None:
    """A site of three adapters of ranks below, at and above a page, one of them with gains and biases, beside base
    rows, against fp64; the base's product is a bf16 layer's.

    Bound: K terms of the product, K of the shrink, at most 32 of the expand, and what three adapters add.
    """
    shapes = _small(model, site)
    k, n = shapes.in_features[SITES[site][0]], shapes.site_offsets(site)[-1]
    adapters: dict[int, LoraWeights] = {}
    pool = LoraPool(shapes, max_slots=3, max_pages=4, max_rank=32, page_dtype=page_dtype)
    for slot, rank in enumerate((8, 16, 20)):
        pairs, vectors = {}, {}
        for p in SITES[site]:
            own = shapes.out_features[p]
            # Of the pages' type, so that holding them rounds nothing.
            a, b = make.normal(rank, k) / k**0.5, make.normal(own, rank)
            pairs[p, 0] = LoraPair(_held_as(a, page_dtype), _held_as(b.T, page_dtype).T, 0.5)
            if slot == 2:
                vectors[p, 0] = LoraVectors(1 + 0.3 * make.normal(own), make.normal(own))
        adapters[slot] = LoraWeights(pairs, vectors)
        pool.write(slot, adapters[slot])
    # Segments of one row, of a few, and of more than the micro-kernel takes at once; rows 1 and 7 have two adapters.
    users = ((0, (1,)), (1, (0, 2, 3, 7)), (2, (1, *range(7, 15))))
    pairs_of_rows = [(row, slot, 1.0 + slot) for slot, rows in users for row in rows]
    segments = LoraSegments.from_pairs(pairs_of_rows)
    weight = make.normal(n, k).bfloat16() / k**0.5
    prepared, lora = ops.prepare_dense(weight, None), BatchedLora(pool, "cpu")
    for onto in (False, True) if site != "lm_head" else (False,):
        x, residual = make.normal(16, k), make.normal(16, n) if onto else torch.zeros(16, n)
        routed = lora.route(segments, 16)  # type: ignore[arg-type]
        if site == "lm_head":
            got = ops.linear(x, prepared)
            lora.add_(got, x, routed, site, 0)
        else:
            of_site = SiteAdapters(lora, routed, site, 0)
            add_to = residual.clone() if onto else None
            got = _run(ops, partial(ops.linear, x, prepared, add_to=add_to, adapters=of_site))
        exact, size = (
            site_reference(change(residual) + base, base, change(x), own, pairs_of_rows, shapes, site, 0)
            for change, base, own in (
                (torch.Tensor.double, x.double() @ weight.double().T, adapters),
                (torch.Tensor.abs, (x.abs() @ weight.float().abs().T).double(), _absolute(adapters)),
            )
        )
        _compare("onto a residual" if onto else "alone", got, exact, 2 * _sum_bound(2 * k + 32) * size)


def _held_as(ranks: torch.Tensor, page_dtype: torch.dtype) -> torch.Tensor:
    """Near ``ranks`` ``[R, n]``, values that a page of the type holds as they are."""
    if page_dtype not in INTEGERS:
        return ranks.to(page_dtype)
    largest = INTEGERS[page_dtype]
    whole = torch.round(ranks * ((largest + 1) / 8)).clamp(1 - largest, largest - 1)
    whole[:, 0] = largest  # of each rank: a power of two is what one stands for
    return whole / ((largest + 1) / 2)


def _absolute(adapters: Mapping[int, LoraWeights]) -> dict[int, LoraWeights]:
    return {slot: absolute(weights) for slot, weights in adapters.items()}


def _replaced_logits(make: _Inputs, hidden: int, dtype: torch.dtype) -> None:
    features = {p: hidden if p != "embed" else _OUTPUTS for p in ("q", "k", "v", "o", "gate", "up", "down", "lm_head")}
    shapes = LoraShapes(1, {**features, "embed": _OUTPUTS}, {**dict.fromkeys(features, _OUTPUTS), "embed": hidden})
    pool = LoraPool(shapes, max_slots=1, max_pages=1, max_rank=16, table_bytes=1 << 28)
    rows = make.normal(19, hidden).to(dtype)
    pool.write(0, LoraWeights({}, tables={"lm_head": TableRows(torch.arange(3, 22), rows)}))
    table = pool.tables_of(0)["lm_head"]
    for count in (1, 7):
        x = make.normal(count, hidden)
        size = (x.abs() @ rows.float().abs().T).double()
        got = BatchedLora(pool, "cpu").kernel.table_product(x, table)[:, :19]
        _compare(f"{count} rows", got, x @ rows.float().T, _sum_bound(hidden) * size)
