"""The decoder's operations as numba kernels: fp32 activations, exact or rounded NF4 products, independent rows."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from manylora.kernels.cpu import (
    Arithmetic,
    attention,
    bf16_linear,
    bytes_inner,
    elementwise,
    head_bytes,
    head_words,
    lora_vectors,
    nf4_bytes,
    nf4_exact,
    nf4_linear,
    nf4_packing,
)
from manylora.kernels.cpu.emit import TILE
from manylora.kernels.cpu.lora import CpuLora
from manylora.kernels.cpu.nf4_inner import SPAN
from manylora.kernels.cpu.replay import Recordings
from manylora.kernels.cpu.scratch import Scratch
from manylora.kernels.cpu.threads import flush, queued
from manylora.kernels.lora import SiteAdapters
from manylora.kernels.nf4_code import NF4_CODE
from manylora.kernels.nf4_tensor import Nf4Tensor
from manylora.kernels.ops import AttentionShape, PagedSequences


@lru_cache(maxsize=64)
def _bits(value: float) -> int:
    """Bit pattern of an fp32 value: kernel arguments are integers."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


@dataclass(frozen=True)
class PackedLinear:
    """NF4 in tiles of 16 outputs; see ``nf4_packing``. ``borrowed``: the bytes are another's. ``exact``: see
    ``nf4_bytes.exact_table``."""

    packed: torch.Tensor
    absmax: torch.Tensor
    blocksize: int
    bias: torch.Tensor | None
    out_features: int
    borrowed: bool = False
    exact: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        exact = 0 if self.exact is None else self.exact.nbytes
        return 0 if self.borrowed else self.packed.nbytes + self.absmax.nbytes + exact


@dataclass(frozen=True)
class DenseLinear:
    """bf16 in tiles of 16 outputs; see ``bf16_linear.pack_bf16``. ``borrowed``: the bytes are another's."""

    tiles: torch.Tensor
    bias: torch.Tensor | None
    borrowed: bool = False

    @property
    def out_features(self) -> int:
        return self.tiles.shape[0] * TILE

    @property
    def nbytes(self) -> int:
        return 0 if self.borrowed else self.tiles.nbytes


@dataclass(frozen=True)
class StackedLinear:
    """Linear layers of equal input side by side, each computed by itself; their own biases do not count."""

    parts: tuple[PackedLinear | DenseLinear, ...]
    bias: torch.Tensor | None

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


AnyLinear = PackedLinear | DenseLinear | StackedLinear


@dataclass(frozen=True)
class PackedTable:
    """A table of ``vocab`` entries as what it is for needs it.

    Embeddings, and whoever merges: bf16 ``rows``, or, if it makes logits too, ``tiles`` of 16 entries. Logits: those
    tiles, in whole numbers if there are the ``largest`` of each entry (``head_words``), or 8-bit ``codes``
    (``head_bytes``), of which some positions may be ``exact``."""

    vocab: int
    rows: torch.Tensor | None = None
    tiles: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    largest: torch.Tensor | None = None
    exact: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.rows, self.tiles, self.codes, self.largest, self.exact) if t is not None)


def unsupported(weight: Nf4Tensor) -> str | None:
    """Why a weight cannot be packed for these kernels, or None."""
    n, k = weight.shape
    if n % TILE:
        return f"its {n} outputs are no multiple of {TILE}"
    if weight.blocksize % SPAN:
        return f"its quantisation block of {weight.blocksize} is no multiple of {SPAN}"
    if k % weight.blocksize:
        return f"its {k} inputs are no multiple of the quantisation block of {weight.blocksize}"
    if not torch.equal(weight.quant_map.cpu(), torch.tensor(NF4_CODE)):
        return "its code is not the standard NF4 code"
    return None


def _flat(parts: Sequence[AnyLinear]) -> list[PackedLinear | DenseLinear]:
    flat: list[PackedLinear | DenseLinear] = []
    for part in parts:
        flat += part.parts if isinstance(part, StackedLinear) else [part]
    return flat


class NumbaOps:
    """See ``kernels.ops.Ops``. A row's result is bit-identical whatever rows are beside it and however it is cut.

    ``arithmetic``: of products with NF4 weights, see ``kernels.cpu.Arithmetic``.
    """

    name = "numba"
    dense_itemsize = 2

    def __init__(self, arithmetic: Arithmetic = "int16") -> None:
        self.arithmetic = arithmetic
        self._order = nf4_packing.FOR_BYTES if arithmetic == "int8" else nf4_packing.FOR_WORDS
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.kv_dtype = torch.float32 if arithmetic == "fp32" else torch.int16
        self.coded_head = arithmetic == "int8"
        self.exact_inputs = bytes_inner.EXACT if arithmetic == "int8" else 0
        self._scratch = Scratch()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        with self._scratch.scope(), queued():
            yield

    def flush(self) -> None:
        flush()

    def recordings(self) -> Recordings:
        return Recordings()

    def prepare_linear(self, weights: Sequence[Nf4Tensor], bias: torch.Tensor | None) -> PackedLinear:
        packed, absmax = [], []
        for weight in weights:
            reason = unsupported(weight)
            if reason is not None:
                raise ValueError(f"an NF4 weight {list(weight.shape)} cannot be packed: {reason}")
            n, k = weight.shape
            packed.append(nf4_packing.pack_nf4(weight.packed, n, k, self._order))
            absmax.append(nf4_packing.pack_absmax(weight.absmax_fp32(), n))
        return PackedLinear(
            torch.cat(packed) if len(packed) > 1 else packed[0],
            torch.cat(absmax) if len(absmax) > 1 else absmax[0],
            weights[0].blocksize,
            None if bias is None else bias.float().contiguous(),
            sum(weight.shape[0] for weight in weights),
        )

    def prepare_dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> DenseLinear:
        if weight.shape[0] % TILE:
            raise ValueError(f"a weight {list(weight.shape)} cannot be packed: its outputs are no multiple of {TILE}")
        return DenseLinear(bf16_linear.pack_bf16(weight), None if bias is None else bias.float().contiguous())

    def rows(self, weight: AnyLinear, first: int, last: int) -> AnyLinear:
        if first % TILE or last % TILE:
            raise ValueError(f"rows {first} to {last} are not whole tiles of {TILE}")
        tiles = slice(first // TILE, last // TILE)
        if isinstance(weight, PackedLinear):
            packed, absmax = weight.packed[tiles], weight.absmax[tiles]
            return PackedLinear(packed, absmax, weight.blocksize, None, last - first, borrowed=True, exact=weight.exact)
        if isinstance(weight, DenseLinear):
            return DenseLinear(weight.tiles[tiles], None, borrowed=True)
        within, at = [], 0
        for part in weight.parts:
            begin, end = max(first - at, 0), min(last - at, part.out_features)
            if begin < end:
                within.append(self.rows(part, begin, end))
            at += part.out_features
        return StackedLinear(tuple(_flat(within)), None)

    def stack(self, parts: Sequence[AnyLinear], bias: torch.Tensor | None) -> AnyLinear:
        bias = None if bias is None else bias.float().contiguous()
        flat = _flat(parts)
        packed = [part for part in flat if isinstance(part, PackedLinear)]
        tiles = [part.tiles for part in flat if isinstance(part, DenseLinear)]
        if not packed:
            return DenseLinear(torch.cat(tiles), bias)
        if tiles or len({part.blocksize for part in packed}) > 1:
            return StackedLinear(tuple(flat), bias)
        return PackedLinear(
            torch.cat([part.packed for part in packed]),
            torch.cat([part.absmax for part in packed]),
            packed[0].blocksize,
            bias,
            sum(part.out_features for part in packed),
        )

    def exactly(self, weight: Any, positions: torch.Tensor) -> Any:
        if isinstance(weight, PackedTable) and weight.codes is not None:
            assert weight.tiles is not None
            assert weight.largest is not None
            largest, exact = head_bytes.exact_columns(weight.tiles, weight.largest, positions)
            return replace(weight, largest=largest, exact=exact)
        if isinstance(weight, StackedLinear):
            return replace(weight, parts=tuple(self.exactly(part, positions) for part in weight.parts))
        if not isinstance(weight, PackedLinear) or self.exact_inputs == 0:
            return weight
        depth = weight.packed.shape[1] * nf4_packing.GROUP
        return replace(weight, exact=nf4_bytes.exact_table(positions, depth, weight.blocksize))

    def dense(self, weight: AnyLinear) -> torch.Tensor:
        if isinstance(weight, PackedLinear):
            return nf4_packing.unpack_nf4(weight.packed, weight.absmax, weight.blocksize, self._order)
        if isinstance(weight, DenseLinear):
            return bf16_linear.unpack_bf16(weight.tiles)
        return torch.cat([self.dense(part) for part in weight.parts])

    def linear(
        self,
        x: torch.Tensor,
        weight: AnyLinear,
        *,
        add_to: torch.Tensor | None = None,
        adapters: SiteAdapters | None = None,
    ) -> torch.Tensor:
        out = self._scratch.empty(x.shape[0], weight.out_features) if add_to is None else add_to
        if weight.bias is not None:
            elementwise.put_bias(weight.bias, out, add=add_to is not None)
        accumulate = add_to is not None or weight.bias is not None
        vectors = None if adapters is None else adapters.vector_rows()
        if adapters is not None and vectors is None and self._takes_halves(weight, adapters):
            self._multiply_with_pairs(x, weight, out, adapters, accumulate=accumulate)
            return out
        held = None
        if vectors is not None and accumulate:
            held = self._scratch.empty(vectors.count, weight.out_features)
            lora_vectors.set_aside(out, vectors, held)
        self._multiply(x, weight, out, accumulate=accumulate)
        if adapters is not None:
            base = None
            if vectors is not None:
                base = self._scratch.empty(vectors.count, weight.out_features)
                lora_vectors.take_products(out, vectors, held, base)
            if not adapters.lora.queues:
                flush()
            adapters.add_(out, x, base)
        return out

    def _takes_halves(self, weight: AnyLinear, adapters: SiteAdapters) -> bool:
        if self.arithmetic == "fp32" or not isinstance(weight, PackedLinear):
            return False
        return isinstance(adapters.lora.kernel, CpuLora)

    def _multiply_with_pairs(
        self, x: torch.Tensor, weight: AnyLinear, out: torch.Tensor, adapters: SiteAdapters, *, accumulate: bool
    ) -> None:
        """``out (+)= x @ W.T`` plus the adapters' pairs, whose two halves run beside the product's: each part of the
        output is added to as soon as it is made, and what only reads x runs at once."""
        adapters.lora.check(out, x, adapters.site)
        lora, step = adapters.lora.kernel, adapters.routed(x.shape[0])
        assert isinstance(lora, CpuLora)
        groups = (bytes_inner if self.arithmetic == "int8" else nf4_linear).groups_of(x.shape[0])
        begun = lora.shrink(out, x, step, adapters.site, adapters.layer, groups=groups)
        self._multiply(x, weight, out, accumulate=accumulate, follows=True)
        lora.expand_(begun, follows=True)

    def _multiply(
        self,
        x: torch.Tensor,
        weight: AnyLinear,
        out: torch.Tensor,
        *,
        accumulate: bool,
        follows: bool = False,
    ) -> None:
        """``out (+)= x @ W.T``; ``follows``: see ``nf4_linear.nf4_linear``, for weights that it multiplies."""
        if isinstance(weight, StackedLinear):
            at = 0
            for part in weight.parts:
                self._multiply(x, part, out[:, at : at + part.out_features], accumulate=accumulate)
                at += part.out_features
        elif isinstance(weight, DenseLinear):
            bf16_linear.bf16_linear(x, weight.tiles, out, accumulate=accumulate)
        elif self.arithmetic == "fp32":
            nf4_exact.exact_nf4_linear(
                x, weight.packed, weight.absmax, weight.blocksize, out, accumulate=accumulate
            )  # fmt: skip
        else:
            width = bytes_inner.work_width if self.arithmetic == "int8" else nf4_linear.work_width
            with self._scratch.scope():
                work = self._scratch.empty(x.shape[0], width(x.shape[1]))
                of_weight = weight.packed, weight.absmax, weight.blocksize
                if self.arithmetic == "int8":
                    nf4_bytes.nf4_bytes_linear(
                        x, *of_weight, out, work, exact=weight.exact, accumulate=accumulate, follows=follows
                    )
                else:
                    nf4_linear.nf4_linear(x, *of_weight, out, work, accumulate=accumulate, follows=follows)

    def prepare_embedding(self, weight: torch.Tensor, *, head: bool) -> PackedTable:
        vocab, width = weight.shape
        if not head:
            return PackedTable(vocab, rows=weight)
        tiles = bf16_linear.pack_bf16(weight)
        if self.arithmetic == "fp32" or width % SPAN:
            return PackedTable(vocab, tiles=tiles)
        if self.arithmetic == "int16":
            return PackedTable(vocab, tiles=tiles, largest=head_words.head_maxima(weight))
        codes, largest = head_bytes.pack_head(weight)
        return PackedTable(vocab, tiles=tiles, codes=codes, largest=largest)

    def embed(self, token_ids: torch.Tensor, weight: PackedTable) -> torch.Tensor:
        if weight.rows is not None:
            return weight.rows[token_ids].float()
        assert weight.tiles is not None
        return bf16_linear.gather_bf16(token_ids, weight.tiles)

    def logits(self, x: torch.Tensor, weight: PackedTable) -> torch.Tensor:
        if weight.tiles is None:
            raise ValueError("this table was not prepared to make logits")
        m, k = x.shape
        out = self._scratch.empty(m, weight.tiles.shape[0] * TILE)
        with self._scratch.scope():
            if weight.largest is None:
                bf16_linear.bf16_linear(x, weight.tiles, out)
            elif weight.codes is None:
                work = self._scratch.empty(m, nf4_linear.work_width(k))
                head_words.head_linear(x, weight.tiles, weight.largest, out, work)
            else:
                work = self._scratch.empty(m, bytes_inner.work_width(k))
                head_bytes.head_bytes_linear(x, weight.codes, weight.largest, out, work, weight.exact)
        return out[:, : weight.vocab]

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        out = self._scratch.empty(*x.shape)
        elementwise.rms_norm(x, weight, _bits(epsilon), out)
        return out

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
        out = self._scratch.empty(*x.shape)
        elementwise.layer_norm(x, weight, bias, _bits(epsilon), out)
        return out

    def head_norm_(self, heads: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
        elementwise.rms_norm(heads, weight, _bits(epsilon), heads)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        out = self._scratch.empty(gate_up.shape[0], gate_up.shape[1] // 2)
        elementwise.silu_mul(gate_up, out)
        return out

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        out = self._scratch.empty(gate_up.shape[0], gate_up.shape[1] // 2)
        elementwise.gelu_mul(gate_up, out)
        return out

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        out = self._scratch.empty(*x.shape)
        elementwise.gelu(x, out)
        return out

    def add_(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        elementwise.add(x, y)
        return x

    def softcap_(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        elementwise.softcap(x, _bits(1 / cap), _bits(cap))
        return x

    def new_kv_cache(
        self, n_layers: int, n_pages: int, shape: AttentionShape
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if shape.head_dim % TILE:
            raise ValueError(f"head_dim {shape.head_dim} is no multiple of {TILE}")
        of_layer = (n_pages, shape.n_kv_heads, shape.head_dim, self.kv_dtype)
        return [attention.new_pages(*of_layer) for _ in range(n_layers)]

    def attention(
        self,
        qkv: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        cache: tuple[torch.Tensor, torch.Tensor],
        sequences: PagedSequences,
        shape: AttentionShape,
    ) -> torch.Tensor:
        out = self._scratch.empty(qkv.shape[0], shape.q_size)
        scale, cap = shape.score_scale, shape.softcap
        attention.paged_attention(
            qkv, out, *rope, *cache, sequences.starts, sequences.contexts, sequences.tables, sequences.positions,
            shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.window, _bits(1.0 if cap else scale),
            _bits(scale / cap if cap else 0.0), _bits(cap),
        )  # fmt: skip
        return out
