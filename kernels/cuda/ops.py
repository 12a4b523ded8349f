"""The decoder's operations as Triton kernels, for CUDA devices (and, on the CPU, in Triton's interpreter: tests).

Every operation of a decode step can be captured in a CUDA graph: no synchronisation, no allocation outside the
caching allocator, scratch memory at addresses that stay. Up to ``Configs.dense_above`` rows a row's bits do not
depend on the rows beside it; above, the linear layers are a library's products with dequantised weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from manylora.kernels.cuda import attention, elementwise
from manylora.kernels.cuda.configs import configs_for
from manylora.kernels.cuda.dense_linear import ROW_TILES, dense_linear
from manylora.kernels.cuda.linear import LinearAdapters, LinearKernels
from manylora.kernels.cuda.lora_op import TritonLora
from manylora.kernels.cuda.nf4_words import Nf4Words, join, pack, unsupported
from manylora.kernels.cuda.scratch import Scratch
from manylora.kernels.lora import SiteAdapters
from manylora.kernels.lora_routing import LoraRouting
from manylora.kernels.nf4_tensor import Nf4Tensor
from manylora.kernels.ops import AttentionShape, PagedSequences
from manylora.kernels.torch_ops import TorchLinear, TorchOps

_MAX_WAITS = 4096
_DENSE_CHUNK = 1 << 24
"""Weights dequantised at a time by ``dense``: torch makes four temporaries of 4 bytes a weight of them."""


@dataclass(frozen=True)
class CudaLinear:
    """A fused linear layer's weights; ``plain`` instead of ``words`` where these kernels cannot hold them.
    ``borrowed``: the bytes are another's."""

    words: Nf4Words | None
    plain: TorchLinear | None
    bias: torch.Tensor | None
    borrowed: bool = False

    @property
    def out_features(self) -> int:
        if self.words is not None:
            return self.words.shape[0]
        assert self.plain is not None
        return self.plain.out_features

    @property
    def nbytes(self) -> int:
        if self.words is not None:
            return 0 if self.borrowed else self.words.nbytes
        return 0 if self.plain is None else self.plain.nbytes


@dataclass(frozen=True)
class CudaDense:
    """A 16-bit weight ``[N, K]`` (fp32 in the interpreter). ``borrowed``: the bytes are another's."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    borrowed: bool = False

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def nbytes(self) -> int:
        return 0 if self.borrowed else self.weight.nbytes


@dataclass(frozen=True)
class CudaStack:
    """Linear layers of equal input side by side, each computed by itself; their own biases do not count."""

    parts: tuple[CudaLinear | CudaDense, ...]
    bias: torch.Tensor | None

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


AnyLinear = CudaLinear | CudaDense | CudaStack


class CudaOps:
    """See ``kernels.ops.Ops``. ``dtype``: bfloat16 or float16; float32 in the interpreter."""

    name = "cuda"
    coded_head = False
    exact_inputs = 0

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.kv_dtype = torch.device(device), dtype, dtype
        self.dense_itemsize = dtype.itemsize
        self.configs = configs_for(self.device)
        self.scratch = Scratch(self.device)
        self._wide = dtype == torch.float32
        on_nvidia = self.device.type == "cuda" and torch.version.hip is None
        self.kernels = LinearKernels(self.configs, self.scratch, fast=on_nvidia and not self._wide, wide=self._wide)
        self._torch = TorchOps(self.device, dtype, resident=False)
        # One counter for each launch of a step whose programs wait for others of it; zeroed together.
        self._waits = torch.zeros(_MAX_WAITS, dtype=torch.int32, device=self.device)
        self._n_waits = 0
        self._depth = 0
        self._sequences: PagedSequences | None = None
        self._owners = torch.empty(0, dtype=torch.int32, device=self.device)
        self._blocks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        if self._depth == 0:
            self._waits.zero_()
            self._n_waits = 0
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def flush(self) -> None:
        pass

    def recordings(self) -> None:
        return None

    def prepare_linear(self, weights: Sequence[Nf4Tensor], bias: torch.Tensor | None) -> CudaLinear:
        here = [weight.to(self.device) for weight in weights]
        if any(unsupported(weight) is not None for weight in here):
            return CudaLinear(None, self._torch.prepare_linear(here, bias), None)
        return CudaLinear(pack(here, self.dtype), None, None if bias is None else bias.to(self.device, self.dtype))

    def prepare_dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> CudaDense:
        here = weight.to(self.device, self.dtype, copy=True)
        return self._compiled(CudaDense(here, None if bias is None else bias.to(self.device, self.dtype)))

    def _compiled(self, dense: CudaDense) -> CudaDense:
        """Run it for each tile of rows once, here: else the step loop would wait for the compiler while serving."""
        if self.device.type == "cuda":
            for rows in ROW_TILES:
                x = torch.zeros(rows, dense.weight.shape[1], dtype=self.dtype, device=self.device)
                dense_linear(x, dense.weight, wide=self._wide)
        return dense

    def rows(self, weight: AnyLinear, first: int, last: int) -> AnyLinear:
        if isinstance(weight, CudaDense):
            return CudaDense(weight.weight[first:last], None, borrowed=True)
        if isinstance(weight, CudaLinear):
            if weight.words is not None:
                return CudaLinear(weight.words.rows(first, last), None, None, borrowed=True)
            assert weight.plain is not None
            return CudaLinear(None, self._torch.rows(weight.plain, first, last), None)
        within, at = [], 0
        for part in weight.parts:
            begin, end = max(first - at, 0), min(last - at, part.out_features)
            if begin < end:
                within.append(self.rows(part, begin, end))
            at += part.out_features
        return CudaStack(tuple(_flat(within)), None)

    def stack(self, parts: Sequence[AnyLinear], bias: torch.Tensor | None) -> AnyLinear:
        bias = None if bias is None else bias.to(self.device, self.dtype)
        flat = _flat(parts)
        dense = [part.weight for part in flat if isinstance(part, CudaDense)]
        words = [part.words for part in flat if isinstance(part, CudaLinear) and part.words is not None]
        if len(dense) == len(flat):
            return self._compiled(CudaDense(torch.cat(dense), bias))
        joined = join(words) if len(words) == len(flat) else None
        return CudaStack(tuple(flat), bias) if joined is None else CudaLinear(joined, None, bias)

    def exactly(self, weight: AnyLinear, positions: torch.Tensor) -> AnyLinear:
        return weight

    def dense(self, weight: AnyLinear) -> torch.Tensor:
        # In torch, not by the kernel that dequantises: that writes into memory of the step loop's, and is compiled for
        # 16-bit results only.
        if isinstance(weight, CudaDense):
            return weight.weight.to(torch.float32, copy=True)
        if isinstance(weight, CudaStack):
            return torch.cat([self.dense(part) for part in weight.parts])
        if weight.words is None:
            assert weight.plain is not None
            return self._torch.dense(weight.plain)
        n, k = weight.words.shape
        out = torch.empty(n, k, device=self.device)
        step = max(1, _DENSE_CHUNK // k)
        for first in range(0, n, step):
            out[first : first + step] = weight.words.rows(first, min(first + step, n)).dequantize()
        return out

    def linear(
        self,
        x: torch.Tensor,
        weight: AnyLinear,
        *,
        add_to: torch.Tensor | None = None,
        adapters: SiteAdapters | None = None,
    ) -> torch.Tensor:
        if isinstance(weight, CudaLinear) and weight.words is None:
            assert weight.plain is not None
            return self._torch.linear(x, weight.plain, add_to=add_to, adapters=adapters)
        if adapters is None:
            return self._without_adapters(x, weight, add_to)
        if isinstance(weight, CudaLinear) and weight.words is not None and x.shape[0] <= self.configs.dense_above:
            fused = self._fused_adapters(adapters)
            if fused is not None:
                return self.kernels.fused(x, weight.words, weight.bias, add_to, fused)
        vectors = adapters.vector_rows()
        if vectors is None:
            y = self._without_adapters(x, weight, add_to)
            adapters.add_(y, x)
            return y
        y = self._without_adapters(x, replace(weight, bias=None), None)
        base = y[vectors.rows]
        if weight.bias is not None:
            y += weight.bias
        y = y if add_to is None else add_to.add_(y)
        adapters.add_(y, x, base)
        return y

    def _without_adapters(self, x: torch.Tensor, weight: AnyLinear, add_to: torch.Tensor | None) -> torch.Tensor:
        """``x @ W.T + bias``, added to ``add_to`` if there is one."""
        if not isinstance(weight, CudaLinear):
            return self._side_by_side(x, weight, add_to)
        assert weight.words is not None
        if x.shape[0] <= self.configs.dense_above:
            return self.kernels.fused(x, weight.words, weight.bias, add_to, None)
        y = F.linear(x, self.kernels.dequantize(weight.words, self.dtype), weight.bias)
        return y if add_to is None else add_to.add_(y)

    def _side_by_side(
        self, x: torch.Tensor, weight: CudaDense | CudaStack, add_to: torch.Tensor | None
    ) -> torch.Tensor:
        """``x @ W.T + bias``, added to ``add_to`` if there is one, without adapters."""
        parts = weight.parts if isinstance(weight, CudaStack) else (weight,)
        few = x.shape[0] <= self.configs.dense_above
        y = torch.empty(x.shape[0], weight.out_features, dtype=torch.float32 if few else x.dtype, device=self.device)
        at = 0
        for part in parts:
            out = y[:, at : at + part.out_features]
            at += part.out_features
            if isinstance(part, CudaDense):
                # The same order of summation for any number of rows, as the NF4 kernel's; many rows by the library.
                if few:
                    dense_linear(x, part.weight, wide=self._wide, out=out)
                else:
                    out.copy_(F.linear(x, part.weight))
            elif part.words is None:
                assert part.plain is not None
                out.copy_(self._torch.linear(x, part.plain))
            elif few:
                out.copy_(self.kernels.fused(x, part.words, None, None, None))
            else:
                out.copy_(F.linear(x, self.kernels.dequantize(part.words, self.dtype)))
        if weight.bias is not None:
            y += weight.bias
        return y.to(x.dtype) if add_to is None else add_to.add_(y)

    def _fused_adapters(self, adapters: SiteAdapters) -> LinearAdapters | None:
        """What the fused kernel needs; None if another implementation of the op is to add the deltas."""
        op, routing = adapters.lora.kernel, adapters.adapters
        if not isinstance(op, TritonLora) or not isinstance(routing, LoraRouting):
            return None
        if self._depth == 0 or self._n_waits == _MAX_WAITS:
            self._waits.zero_()  # in the stream's order: after whatever waited on them
            self._n_waits = 0
        done = self._waits[self._n_waits : self._n_waits + 1]
        self._n_waits += 1
        return LinearAdapters(op, routing, adapters.site, adapters.layer, done)

    def prepare_embedding(self, weight: torch.Tensor, *, head: bool) -> torch.Tensor:
        # As it is in the interpreter; fp16 activations need an fp16 head for the matrix units.
        return weight.to(self.device) if self._wide else weight.to(self.device, self.dtype)

    def embed(self, token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.empty(token_ids.numel(), weight.shape[1], dtype=self.dtype, device=self.device)
        return elementwise.embed(token_ids, weight, out)

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return dense_linear(x, weight, wide=self._wide)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        return elementwise.rms_norm(x, weight, epsilon)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
        return self._torch.layer_norm(x, weight, bias, epsilon)

    def head_norm_(self, heads: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
        elementwise.head_norm_(heads, weight, epsilon)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return elementwise.silu_mul(gate_up)

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._torch.gelu_mul(gate_up)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return self._torch.gelu(x)

    def add_(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self._torch.add_(x, y)

    def softcap_(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        return self._torch.softcap_(x, cap)

    def new_kv_cache(
        self, n_layers: int, n_pages: int, shape: AttentionShape
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        size = attention.cache_shape(n_pages, shape)
        return [
            (
                torch.zeros(size, dtype=self.dtype, device=self.device),
                torch.zeros(size, dtype=self.dtype, device=self.device),
            )
            for _ in range(n_layers)
        ]

    def attention(
        self,
        qkv: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        cache: tuple[torch.Tensor, torch.Tensor],
        sequences: PagedSequences,
        shape: AttentionShape,
    ) -> torch.Tensor:
        if (reason := unsupported_attention(shape)) is not None:
            raise ValueError(f"attention {shape} cannot be computed: {reason}")
        rows, is_decode = qkv.shape[0], qkv.shape[0] == sequences.contexts.numel()
        if sequences is not self._sequences:
            self._look_at(sequences, rows, is_decode)
        elementwise.rope_store_(qkv, *rope, sequences.positions, self._owners, sequences.tables, cache, shape)
        q = qkv[:, : shape.q_size]
        out = torch.empty(rows, shape.q_size, dtype=qkv.dtype, device=self.device)
        if is_decode:
            planes, semaphores = (
                attention.planes_shape(rows, shape),
                attention.semaphores_shape(rows, shape),
            )
            return attention.decode_attention(
                q, cache, sequences.contexts, sequences.tables, shape, out=out,
                planes=self.scratch.empty("attention planes", math.prod(planes), torch.float32),
                semaphores=self.scratch.zeros("attention semaphores", math.prod(semaphores)),
            )  # fmt: skip
        tokens = attention.query_tokens(shape)
        if tokens not in self._blocks:
            starts = sequences.starts.tolist() if sequences.host_starts is None else list(sequences.host_starts)
            columns = attention.query_blocks(starts, tokens)
            first, second = (torch.tensor(c, dtype=torch.int32, device=self.device) for c in columns)
            self._blocks[tokens] = first, second
        return attention.prefill_attention(q, cache, sequences, self._blocks[tokens], shape, out)

    def _look_at(self, sequences: PagedSequences, rows: int, is_decode: bool) -> None:
        """What all layers of a step need to know of its sequences."""
        count = sequences.contexts.numel()
        indices = torch.arange(count, dtype=torch.int32, device=self.device)
        if is_decode:
            # Padding rows of a captured graph have no context; nothing of theirs is stored.
            self._owners = torch.where(sequences.contexts > 0, indices, -1)
        else:
            lengths = (sequences.starts[1:] - sequences.starts[:-1]).long()
            self._owners = torch.repeat_interleave(indices, lengths, output_size=rows)
        self._sequences, self._blocks = sequences, {}


def unsupported_attention(shape: AttentionShape) -> str | None:
    """Why the attention kernels cannot compute a layer, or None."""
    if shape.softcap:
        return "the CUDA kernels have no cap on attention scores"
    if shape.scale is not None and shape.scale != shape.head_dim**-0.5:
        return f"the CUDA kernels scale attention scores by head_dim ** -0.5, not by {shape.scale:g}"
    return None


def _flat(parts: Sequence[AnyLinear]) -> list[CudaLinear | CudaDense]:
    flat: list[CudaLinear | CudaDense] = []
    for part in parts:
        flat += part.parts if isinstance(part, CudaStack) else [part]
    return flat
