"""The fused NF4 linear layer and what it is compared with, on one weight: launches to be timed, each checked first."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
import torch.nn.functional as F
from gpu_timing import LAUNCHES, Card, Launch, Timer, check, cold_copies, poison
from triton.errors import TritonError

from manylora.kernels.cuda.configs import Configs
from manylora.kernels.cuda.linear import LinearKernels
from manylora.kernels.cuda.nf4_words import BLOCK, Nf4Words, pack
from manylora.kernels.cuda.scratch import Scratch
from manylora.kernels.nf4_tensor import NestedAbsmax, Nf4Tensor
from manylora.server.model.synthetic import synthetic_nf4

_NESTED_BLOCK = 256


@dataclass(frozen=True)
class Shape:
    """A fused layer: projections of ``parts`` outputs side by side, ``k`` inputs."""

    name: str
    parts: tuple[int, ...]
    k: int

    @property
    def n(self) -> int:
        return sum(self.parts)

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"


SHAPES: Final = (
    Shape("gate_up", (14336, 14336), 4096),
    Shape("down", (4096,), 14336),
    Shape("qkv", (4096, 1024, 1024), 4096),
    Shape("o", (4096,), 4096),
    Shape("gate", (14336,), 4096),
)
"""Llama-3.1-8B's fused sites, and one half of gate_up as servers without fusion run it; N x K names them."""


def nf4_bytes(n: int, k: int, nested: bool) -> int:
    """Bytes of a weight as the format stores it: codes and scales, without the few tables of a constant size.

    The number that every speed is reckoned from, whoever's copy is read: ours has 8 bytes a row more.
    """
    blocks = n * k // BLOCK
    return n * k // 2 + (blocks + 4 * -(-blocks // _NESTED_BLOCK) if nested else 4 * blocks)


@dataclass(frozen=True)
class Bench:
    """What all measurements need. On the CPU (tests) ``dtype`` is float32."""

    card: Card
    timer: Timer
    configs: Configs
    device: torch.device
    dtype: torch.dtype
    launches: int = LAUNCHES

    @property
    def dtype_name(self) -> str:
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.dtype, "fp32")

    def kernels(self) -> LinearKernels:
        """With scratch memory of its own."""
        wide = self.dtype == torch.float32
        return LinearKernels(self.configs, Scratch(self.device), fast=not wide, wide=wide)

    def inputs(self, m: int, k: int, seed: int = 0) -> torch.Tensor:
        random = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(m, k, device=self.device, generator=random).to(self.dtype)


class Weights:
    """One random weight, in the forms that the systems take, each in as many copies as keep the cache cold."""

    def __init__(self, bench: Bench, shape: Shape, nested: bool) -> None:
        self.shape, self.nested, self._bench = shape, nested, bench
        random = torch.Generator(bench.device).manual_seed(1)
        self.tensor = synthetic_nf4(shape.n, shape.k, random, nested=nested)
        self.words = pack([self.tensor], bench.dtype)
        self.nbytes = nf4_bytes(shape.n, shape.k, nested)
        self.copies = cold_copies(self.nbytes, bench.card.l2_bytes)
        self.dense_copies = cold_copies(shape.n * shape.k * bench.dtype.itemsize, bench.card.l2_bytes)

    def all_words(self) -> list[Nf4Words]:
        return [self.words, *(copy_of_words(self.words) for _ in range(self.copies - 1))]

    def all_tensors(self) -> list[Nf4Tensor]:
        return [self.tensor, *(_copy_of_tensor(self.tensor) for _ in range(self.copies - 1))]

    def all_dense(self) -> list[torch.Tensor]:
        dense = self.words.dequantize(self._bench.dtype)
        return [dense, *(dense.clone() for _ in range(self.dense_copies - 1))]

    def parts(self, tensor: Nf4Tensor) -> list[Nf4Tensor]:
        """The projections by themselves: views of the rows."""
        found, row = [], 0
        for rows in self.shape.parts:
            found.append(rows_of(tensor, row, row + rows))
            row += rows
        return found


def copy_of_words(words: Nf4Words) -> Nf4Words:
    """All that grows with the weight; the tables are hot whatever one does."""
    return replace(
        words,
        words=words.words.clone(),
        scales=words.scales.clone(),
        outer=words.outer.clone(),
        first=words.first.clone(),
        offset=words.offset.clone(),
    )


def _copy_of_tensor(tensor: Nf4Tensor) -> Nf4Tensor:
    absmax = tensor.absmax
    copied = (
        replace(absmax, codes=absmax.codes.clone(), absmax=absmax.absmax.clone())
        if isinstance(absmax, NestedAbsmax)
        else absmax.clone()
    )
    return replace(tensor, packed=tensor.packed.clone(), absmax=copied)


def rows_of(tensor: Nf4Tensor, first: int, last: int) -> Nf4Tensor:
    """Rows ``first .. last - 1``, without a copy. ValueError where a nested block crosses the cut."""
    k = tensor.shape[1]
    begin, end = first * k // BLOCK, last * k // BLOCK
    absmax: torch.Tensor | NestedAbsmax
    if isinstance(tensor.absmax, NestedAbsmax):
        if begin % _NESTED_BLOCK:
            raise ValueError(f"row {first} of {tensor.shape} lies within a nested block")
        outer = tensor.absmax.absmax[begin // _NESTED_BLOCK : -(-end // _NESTED_BLOCK)]
        absmax = replace(tensor.absmax, codes=tensor.absmax.codes[begin:end], absmax=outer)
    else:
        absmax = tensor.absmax[begin:end]
    return replace(tensor, packed=tensor.packed[first * k // 2 : last * k // 2], absmax=absmax, shape=(last - first, k))


Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class System:
    """Something that multiplies. ``products`` makes a product for each copy of a weight, ``x [M, K] -> y [M, N]``.

    ``slack``: what its arithmetic may cost beyond one rounding of the result, in units of sum |x| |w|. ``ours``: it
    multiplies with the values of our look-up (in float16 one of the 16 is its lower neighbour). ``dense``: it keeps the
    weight in 16 bits, which are then the bytes of the weight as stored.
    """

    name: str
    products: Callable[[Bench, Weights], list[Product]]
    slack: float
    ours: bool = True
    dense: bool = False
    absent: Callable[[], str | None] = lambda: None


def _ours(bench: Bench, weights: Weights) -> list[Product]:
    kernels = bench.kernels()
    return [lambda x, words=words: kernels.fused(x, words, None, None, None) for words in weights.all_words()]


def _dequantized(bench: Bench, weights: Weights) -> list[Product]:
    kernels = bench.kernels()
    return [lambda x, words=words: F.linear(x, kernels.dequantize(words, bench.dtype)) for words in weights.all_words()]


def _dense(bench: Bench, weights: Weights) -> list[Product]:
    return [lambda x, w=w: F.linear(x, w) for w in weights.all_dense()]


def bitsandbytes_absent() -> str | None:
    """Why bitsandbytes' fused NF4 product cannot be compared with; None if it can."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    try:
        import bitsandbytes

        torch.ops.bitsandbytes.gemm_4bit  # noqa: B018 - looked up: an op that is not there raises
    except (ImportError, OSError, RuntimeError) as error:
        return f"bitsandbytes cannot be imported: {error}"
    except AttributeError:
        return f"bitsandbytes {bitsandbytes.__version__} has no gemm_4bit (it came with 0.50)"
    return None


def _bitsandbytes_product(tensor: Nf4Tensor) -> Product:
    nested, shape = tensor.absmax, list(tensor.shape)
    packed = tensor.packed.view(-1, 1)
    if isinstance(nested, NestedAbsmax):
        offset = torch.tensor(nested.offset, device=tensor.device)
        return lambda x: torch.ops.bitsandbytes.gemm_4bit(
            x, packed, shape, nested.absmax, BLOCK, "nf4",
            absmax_8bit=nested.codes, absmax_code=nested.code, absmax_offset=offset,
        )  # fmt: skip
    return lambda x: torch.ops.bitsandbytes.gemm_4bit(x, packed, shape, nested, BLOCK, "nf4")


def _bitsandbytes(bench: Bench, weights: Weights) -> list[Product]:
    return [_bitsandbytes_product(tensor) for tensor in weights.all_tensors()]


def _bitsandbytes_separate(bench: Bench, weights: Weights) -> list[Product]:
    def product(tensor: Nf4Tensor) -> Product:
        parts = [_bitsandbytes_product(part) for part in weights.parts(tensor)]
        # Not put side by side: a model without fusion uses them apart.
        return lambda x: [part(x) for part in parts]

    return [product(tensor) for tensor in weights.all_tensors()]


OURS: Final = "manylora"
SYSTEMS: Final = (
    # The matrix units add fp32 with a few bits less; 2^-16 leaves room for that and for 14336 additions.
    System(OURS, _ours, 2.0**-16),
    # bitsandbytes rounds value, scale, product and partial sums to 16 bits, at the smallest M.
    System("bitsandbytes", _bitsandbytes, 2.0**-6, ours=False, absent=bitsandbytes_absent),
    System("bitsandbytes, separate", _bitsandbytes_separate, 2.0**-6, ours=False, absent=bitsandbytes_absent),
    # The weight rounded to 16 bits, and cuBLAS' partial sums too.
    System("dequantize + cuBLAS", _dequantized, 2.0**-8),
    System("cuBLAS, 16-bit weight", _dense, 2.0**-8, dense=True),
)


def exact_product(x: torch.Tensor, dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x @ W.T`` and ``|x| @ |W|.T`` in fp64, a slice of W ``[N, K]`` at a time."""
    wide, products, magnitudes = x.double(), [], []
    for part in dense.split(4096):
        w = part.double()
        products.append(wide @ w.T)
        magnitudes.append(wide.abs() @ w.abs_().T)
    return torch.cat(products, 1), torch.cat(magnitudes, 1)


def prove(
    bench: Bench,
    weights: Weights,
    system: System,
    products: Sequence[Product],
    exact: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Raise WrongResult unless the first and the last copy give ``exact_product``, in memory that held NaN before."""
    expected, magnitude = exact
    m, (n, k) = len(expected), (weights.shape.n, weights.shape.k)
    x = bench.inputs(m, k)
    for product in (products[0], products[-1]):
        poison(m, n, bench.dtype, bench.device)
        y = product(x)
        y = torch.cat(y, 1) if isinstance(y, list) else y
        check(f"{system.name}, {weights.shape}, M {m}", y, expected, system.slack * magnitude)


def launches_of(bench: Bench, x: torch.Tensor, products: Sequence[Product]) -> list[Launch]:
    """At least ``bench.launches`` of them, each copy as often as any other."""
    rounds = -(-bench.launches // len(products))
    return [lambda product=product: product(x) for product in products] * rounds


class LinearCases:
    """Measures a weight's systems side by side; keeps the products of the last weight, which are costly to make."""

    def __init__(self, bench: Bench, systems: Sequence[System] = SYSTEMS) -> None:
        self._bench, self._systems = bench, systems
        self._key: tuple[Shape, bool] | None = None
        self._weights: Weights | None = None
        self._products: Mapping[str, list[Product]] = {}
        self.refused: list[str] = []

    def run(self, shape: Shape, nested: bool, m: int) -> list[dict[str, object]]:
        """JSON lines: one for each system, with a time, or with the reason why there is none."""
        bench, lines, timed = self._bench, [], []
        weights = self._load(shape, nested)
        head = {
            "kind": "linear",
            "dtype": bench.dtype_name,
            "n": shape.n,
            "k": shape.k,
            "layer": shape.name,
            "nested": nested,
            "m": m,
        }
        x = bench.inputs(m, shape.k)
        exact: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}
        for system in self._systems:
            if len(shape.parts) == 1 and system.products is _bitsandbytes_separate:
                continue  # the same as together
            if (reason := system.absent()) is not None:
                lines.append({**head, "system": system.name, "absent": reason})
                continue
            try:
                if system.name not in self._products:
                    self._products = {**self._products, system.name: system.products(bench, weights)}
                if system.ours not in exact:
                    dense = weights.words.dequantize() if system.ours else weights.tensor.dequantize()
                    exact[system.ours] = exact_product(x, dense)
                prove(bench, weights, system, self._products[system.name], exact[system.ours])
            except (RuntimeError, NotImplementedError, TypeError, TritonError) as error:
                # A wrong product of ours ends in the exit code, someone else's only in the results.
                lines.append({**head, "system": system.name, "absent": f"refused: {error}"})
                if system.ours:
                    self.refused.append(str(error))
                continue
            timed.append((system, launches_of(bench, x, self._products[system.name])))
        timings = bench.timer.compare([launches for _, launches in timed])
        for (system, launches), timing in zip(timed, timings, strict=True):
            nbytes = shape.n * shape.k * bench.dtype.itemsize if system.dense else weights.nbytes
            seconds = timing.seconds / len(launches)
            gbps = nbytes / seconds / 1e9
            lines.append({
                **head, "system": system.name, "us": round(seconds * 1e6, 3), "spread": round(timing.spread, 3),
                "bytes": nbytes, "gbps": round(gbps, 1), "of_copy": round(gbps / bench.card.copy_gbps, 4),
            })  # fmt: skip
        return lines

    def _load(self, shape: Shape, nested: bool) -> Weights:
        if self._weights is None or self._key != (shape, nested):
            self._weights, self._products = None, {}  # first give the old ones' memory back
            self._key, self._weights = (shape, nested), Weights(self._bench, shape, nested)
        return self._weights

    def compile(self, shapes: Sequence[Shape], nested: bool, rows: Sequence[int]) -> list[dict[str, object]]:
        """Compile the variants of our kernel that these cases need, several at a time. No lines: triton keeps them."""
        bench, launches = self._bench, dict[tuple[object, ...], Launch]()
        for shape in shapes:
            words: Nf4Words | None = None
            for m in rows:
                tile, splits = bench.configs.tile(m), bench.configs.splits_of(shape.n, shape.k)
                key = (tile, splits, shape.k % (BLOCK * tile.nb) == 0)
                if key in launches:
                    continue
                if words is None:
                    random = torch.Generator(bench.device).manual_seed(1)
                    words = pack([synthetic_nf4(shape.n, shape.k, random, nested=nested)], bench.dtype)
                x = bench.inputs(m, shape.k)
                # Kernels of their own: threads must not share memory that grows.
                launches[key] = lambda x=x, words=words: bench.kernels().fused(x, words, None, None, None)
        bench.timer.compile(list(launches.values()))
        return []
