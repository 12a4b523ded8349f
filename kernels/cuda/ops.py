"""The decoder's operations as Triton kernels, for CUDA devices (and, on the CPU, in Triton's interpreter: tests).

Every operation of a decode step can be captured in a CUDA graph: no synchronisation, no allocation outside the
caching allocator, scratch memory at addresses that stay. Up to ``Configs.dense_above`` rows a row's bits do not
depend on the rows beside it; above, the linear layers are a library's products with dequantised weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from manylora.kernels.cuda import attention, elementwise
from manylora.kernels.cuda.configs import Configs, configs_for
from manylora.kernels.cuda.dense_linear import dense_linear
from manylora.kernels.cuda.linear import LinearAdapters, LinearKernels
from manylora.kernels.cuda.lora_op import TritonLora
from manylora.kernels.cuda.nf4_words import Nf4Words, pack, unsupported
from manylora.kernels.cuda.scratch import Scratch
from manylora.kernels.lora import SiteAdapters
from manylora.kernels.lora_routing import LoraRouting
from manylora.kernels.nf4_tensor import Nf4Tensor
from manylora.kernels.ops import AttentionShape, PagedSequences
from manylora.kernels.torch_ops import TorchLinear, TorchOps

_MAX_WAITS = 4096


@dataclass(frozen=True)
class CudaLinear:
    """A fused linear layer's weights; ``plain`` instead of ``words`` where these kernels cannot hold them."""

    words: Nf4Words | None
    plain: TorchLinear | None
    bias: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        if self.words is not None:
            return self.words.nbytes
        return 0 if self.plain is None else self.plain.nbytes


class CudaOps:
    """See ``kernels.ops.Ops``. ``dtype``: bfloat16 or float16; float32 in the interpreter."""

    name = "cuda"

    def __init__(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        configs: Configs | None = None,
        fast: bool | None = None,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.configs = configs_for(self.device) if configs is None else configs
        self.scratch = Scratch(self.device)
        self._wide = dtype == torch.float32
        on_nvidia = self.device.type == "cuda" and torch.version.hip is None
        self.kernels = LinearKernels(
            self.configs, self.scratch, fast=on_nvidia and not self._wide if fast is None else fast, wide=self._wide
        )
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

    def prepare_linear(self, weights: Sequence[Nf4Tensor], bias: torch.Tensor | None) -> CudaLinear:
        here = [weight.to(self.device) for weight in weights]
        if any(unsupported(weight) is not None for weight in here):
            return CudaLinear(None, self._torch.prepare_linear(here, bias), None)
        return CudaLinear(pack(here, self.dtype), None, None if bias is None else bias.to(self.device, self.dtype))

    def linear(
        self,
        x: torch.Tensor,
        weight: CudaLinear,
        *,
        add_to: torch.Tensor | None = None,
        adapters: SiteAdapters | None = None,
    ) -> torch.Tensor:
        if weight.words is not None and x.shape[0] <= self.configs.dense_above:
            fused = None if adapters is None else self._fused_adapters(adapters)
            y = self.kernels.fused(x, weight.words, weight.bias, add_to, fused)
            if fused is not None:
                return y
        elif weight.words is not None:
            y = F.linear(x, self.kernels.dequantize(weight.words, self.dtype), weight.bias)
            y = y if add_to is None else add_to.add_(y)
        else:
            assert weight.plain is not None
            y = self._torch.linear(x, weight.plain, add_to=add_to)
        if adapters is not None:
            adapters.add_(y, x)
        return y

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

    def head_norm_(self, heads: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
        elementwise.head_norm_(heads, weight, epsilon)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return elementwise.silu_mul(gate_up)

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
                planes=self.scratch.empty("attention planes", _numel(planes), torch.float32),
                semaphores=self.scratch.zeros("attention semaphores", _numel(semaphores)),
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


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
