"""What the decoder asks of a device: a small set of operations, implemented by ``torch_ops`` and ``cpu.ops``."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from manylora.kernels.nf4_tensor import Nf4Tensor

if TYPE_CHECKING:
    from manylora.kernels.cpu.replay import Recordings
    from manylora.kernels.lora import SiteAdapters

PAGE_SIZE = 16
"""Token positions of a KV page."""


@dataclass(frozen=True)
class PagedSequences:
    """The sequences of a step: their new tokens lie one behind the other, their keys and values in pages.

    int32 tensors: ``starts`` ``[S + 1]``, first new token of each sequence; ``contexts`` ``[S]``, length of each with
    its new tokens; ``tables`` ``[S, pages]``, page numbers; ``positions`` ``[T]``, position of each new token.
    ``host_starts``: ``starts`` once more, where it need not be fetched from the device.
    """

    starts: torch.Tensor
    contexts: torch.Tensor
    tables: torch.Tensor
    positions: torch.Tensor
    host_starts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Maxima:
    """Of each row its largest value, ``highest`` fp32 ``[rows]``, and the first place where that is, ``places`` int64
    ``[rows]``, on the host; of a row with a NaN, NaN and the place of the first one. As ``numpy.argmax`` has it."""

    highest: npt.NDArray[np.float32]
    places: npt.NDArray[np.int64]


@dataclass(frozen=True)
class AttentionShape:
    """Heads and head size of one layer's attention; ``window`` 0 when every earlier position is seen.

    ``scale``: what scores ``q . k`` are multiplied with, None for the usual ``head_dim ** -0.5``. ``softcap``: if not
    0, scaled scores s become ``softcap * tanh(s / softcap)`` before the softmax (Gemma 2).
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    window: int = 0
    scale: float | None = None
    softcap: float = 0.0

    @property
    def score_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def q_size(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.n_kv_heads * self.head_dim


class Ops(Protocol):
    """Operations on activations ``[rows, width]`` of ``dtype`` on ``device``. Weights are opaque: what ``prepare_*``
    returns is handed back to the operation of the same name, and holds the only copy of the bytes."""

    name: str
    device: torch.device
    dtype: torch.dtype
    dense_itemsize: int
    """Bytes of a weight in what ``prepare_dense`` returns."""
    kv_dtype: torch.dtype
    """What ``new_kv_cache`` holds: ``dtype``, or int16, which have a scale for each vector beside."""
    coded_head: bool
    """Whether ``prepare_embedding`` adds a copy in 8 bits that makes logits, where the width allows it."""
    exact_inputs: int
    """Positions of x that a linear layer may be told to multiply ``exactly``; 0 where that is of no use."""

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Operations within may be queued and run, in order, at the end of the outermost such block or at ``flush``:
        until then nothing else may look at their results. A result lives until the innermost block it was made in
        ends, so what is to stay is written into a tensor from outside (``add_to``)."""

    def flush(self) -> None:
        """Run what is queued."""

    def recordings(self) -> Recordings | None:
        """Where steps are kept that only queue, to be run again without being queued again; None if nothing is
        queued."""

    def prepare_linear(self, weights: Sequence[Nf4Tensor], bias: torch.Tensor | None) -> Any:
        """Fuse NF4 weights of equal K into one linear layer; its output is theirs, one behind the other."""

    def prepare_dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        """A linear layer of a float ``[N, K]`` that is not quantised: rounded once, to the type in which it is kept
        (bf16 on the CPU)."""

    def rows(self, weight: Any, first: int, last: int) -> Any:
        """Outputs ``first .. last - 1`` of a prepared linear layer, without its bias: a view of the same bytes, whose
        own ``nbytes`` is 0. The bounds are those of weights that were prepared together."""

    def stack(self, parts: Sequence[Any], bias: torch.Tensor | None) -> Any:
        """One linear layer of prepared ones of equal K, whose biases do not count, nor what is ``exactly`` multiplied;
        its output is theirs, one behind the other. Parts held in the same way are copied into one; else each is
        computed by itself."""

    def exactly(self, weight: Any, positions: torch.Tensor) -> Any:
        """A prepared linear layer, or table that makes logits, by the same bytes, that multiplies these positions of x
        without rounding them or their weights: int64 ``[exact_inputs]``, all different. As it was where nothing is
        rounded."""

    def dense(self, weight: Any) -> torch.Tensor:
        """The matrix of a prepared linear layer, fp32 ``[N, K]``: a copy of the very values it multiplies with. Any
        thread, at any time: it uses no memory of the operations' own, and nothing is queued."""

    def linear(
        self,
        x: torch.Tensor,
        weight: Any,
        *,
        add_to: torch.Tensor | None = None,
        adapters: SiteAdapters | None = None,
    ) -> torch.Tensor:
        """``x @ W.T + bias`` plus each row's ``adapters``; with ``add_to`` (the residual stream) it is added to that in
        place and returned."""

    def prepare_embedding(self, weight: torch.Tensor, *, head: bool) -> Any:
        """A bf16 ``[vocab, hidden]`` table; ``head`` if ``logits`` is asked of it too (tied embeddings)."""

    def embed(self, token_ids: torch.Tensor, weight: Any) -> torch.Tensor:
        """Rows of the table for int64 ids ``[T]``. If it makes logits, too, this is queued as other operations are, and
        a queue that is run again looks up what the ids are by then (NaN for one that there is not, which otherwise
        raises IndexError)."""

    def logits(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        """``x @ W.T``, fp32 ``[rows, vocab]``."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """``x / sqrt(mean(x^2) + epsilon) * weight`` (Zhang and Sennrich 2019); ``weight`` is fp32."""

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
        """``(x - mean) / sqrt(variance + epsilon) * weight + bias`` (Ba et al. 2016); fp32 ``weight``, ``bias``."""

    def head_norm_(self, heads: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
        """``rms_norm`` in place of each head in ``[rows, n_heads * head_dim]``, a column slice of a wider tensor;
        ``weight`` is ``[head_dim]``."""

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``silu(gate) * up`` of ``[rows, 2 * width]``, gate first (SwiGLU, Shazeer 2020)."""

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``gelu(gate) * up``, as ``silu_mul``; GELU in its tanh form (GeGLU, Shazeer 2020)."""

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """``gelu(x)`` in its tanh form (Hendrycks and Gimpel 2016)."""

    def add_(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``x += y`` in place, of ``[rows, width]``; returns ``x``."""

    def softcap_(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        """``cap * tanh(x / cap)`` in place, of fp32 ``[rows, width]``; returns ``x``."""

    def new_kv_cache(
        self, n_layers: int, n_pages: int, shape: AttentionShape
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer, in the implementation's own layout; page numbers are the first dimension."""

    def attention(
        self,
        qkv: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        cache: tuple[torch.Tensor, torch.Tensor],
        sequences: PagedSequences,
        shape: AttentionShape,
    ) -> torch.Tensor:
        """Rotate queries and keys (``rope``: fp32 cos and sin ``[positions, head_dim / 2]``; halves convention), store
        the new keys and values in their pages, attend causally. ``[T, n_heads * head_dim]``; overwrites ``qkv``."""


def page_bytes(shape: AttentionShape, n_layers: int, dtype: torch.dtype) -> int:
    """Bytes of one KV page of ``Ops.kv_dtype`` over all layers; of int16 with the scales."""
    scale = torch.float32.itemsize if dtype == torch.int16 else 0
    return 2 * n_layers * shape.n_kv_heads * PAGE_SIZE * (shape.head_dim * dtype.itemsize + scale)
