"""The decoder's operations in plain torch: any device, any shape. The CPU path where the numba kernels cannot run,
and an independent check of them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from manylora.kernels.lora import SiteAdapters
from manylora.kernels.nf4_tensor import Nf4Tensor
from manylora.kernels.ops import PAGE_SIZE, AttentionShape, PagedSequences


@dataclass(frozen=True)
class TorchLinear:
    """Weights side by side, in NF4 or dense, or one dequantised copy where ``TorchOps`` keeps one. ``borrowed``: the
    bytes are another's."""

    weights: tuple[Nf4Tensor | torch.Tensor, ...]
    resident: torch.Tensor | None
    bias: torch.Tensor | None
    borrowed: bool = False

    @property
    def out_features(self) -> int:
        return sum(w.shape[0] for w in self.weights) if self.resident is None else self.resident.shape[0]

    @property
    def nbytes(self) -> int:
        if self.borrowed:
            return 0
        return sum(w.nbytes for w in self.weights) if self.resident is None else self.resident.nbytes

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``[N, K]``."""
        if self.resident is not None:
            return self.resident.to(dtype)
        parts = [w.dequantize(dtype) if isinstance(w, Nf4Tensor) else w.to(dtype) for w in self.weights]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class TorchOps:
    """See ``kernels.ops.Ops``.

    ``resident`` keeps the dequantised weights (4 or 2 bytes a weight instead of about half a byte) rather than
    dequantising them at every step; on a CPU that is the only bearable choice.
    """

    name = "torch"
    coded_head = False
    exact_inputs = 0

    def __init__(self, device: torch.device | str, dtype: torch.dtype, *, resident: bool) -> None:
        self.device, self.dtype, self._resident = torch.device(device), dtype, resident
        self.dense_itemsize, self.kv_dtype = dtype.itemsize, dtype

    def together(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def flush(self) -> None:
        pass

    def recordings(self) -> None:
        return None

    def prepare_linear(self, weights: Sequence[Nf4Tensor], bias: torch.Tensor | None) -> TorchLinear:
        here = tuple(weight.to(self.device) for weight in weights)
        moved = None if bias is None else bias.to(self.device, self.dtype)
        if self._resident:
            return TorchLinear((), torch.cat([w.dequantize(self.dtype) for w in here]), moved)
        return TorchLinear(here, None, moved)

    def prepare_dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> TorchLinear:
        here = weight.to(self.device, self.dtype, copy=True)
        moved = None if bias is None else bias.to(self.device, self.dtype)
        return TorchLinear((), here, moved) if self._resident else TorchLinear((here,), None, moved)

    def rows(self, weight: TorchLinear, first: int, last: int) -> TorchLinear:
        if weight.resident is not None:
            return TorchLinear((), weight.resident[first:last], None, borrowed=True)
        within, at = [], 0
        for part in weight.weights:
            end = at + part.shape[0]
            if first <= at and end <= last:
                within.append(part)
            elif at < last and first < end:
                raise ValueError(f"rows {first} to {last} cut through a weight of rows {at} to {end}")
            at = end
        return TorchLinear(tuple(within), None, None, borrowed=True)

    def stack(self, parts: Sequence[TorchLinear], bias: torch.Tensor | None) -> TorchLinear:
        moved = None if bias is None else bias.to(self.device, self.dtype)
        if self._resident:
            return TorchLinear((), torch.cat([part.matrix(self.dtype) for part in parts]), moved)
        return TorchLinear(tuple(weight for part in parts for weight in part.weights), None, moved)

    def exactly(self, weight: TorchLinear, positions: torch.Tensor) -> TorchLinear:
        return weight

    def dense(self, weight: TorchLinear) -> torch.Tensor:
        return weight.matrix(self.dtype).to(torch.float32, copy=True)

    def linear(
        self,
        x: torch.Tensor,
        weight: TorchLinear,
        *,
        add_to: torch.Tensor | None = None,
        adapters: SiteAdapters | None = None,
    ) -> torch.Tensor:
        vectors = None if adapters is None else adapters.vector_rows()
        y = F.linear(x, weight.matrix(self.dtype), weight.bias if vectors is None else None)
        base = None if vectors is None else y[vectors.rows]
        if vectors is not None and weight.bias is not None:
            y += weight.bias
        y = y if add_to is None else add_to.add_(y)
        if adapters is not None:
            adapters.add_(y, x, base)
        return y

    def prepare_embedding(self, weight: torch.Tensor, *, head: bool) -> torch.Tensor:
        return weight.to(self.device)

    def embed(self, token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight[token_ids].to(self.dtype)

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight.to(x.dtype)).float()

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * weight).to(self.dtype)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, epsilon).to(self.dtype)

    def head_norm_(self, heads: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
        each = heads.view(heads.shape[0], -1, weight.numel())
        each.copy_(self.rms_norm(each, weight, epsilon))

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")

    def add_(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.add_(y)

    def softcap_(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        return x.div_(cap).tanh_().mul_(cap)

    def new_kv_cache(
        self, n_layers: int, n_pages: int, shape: AttentionShape
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        keys = (n_pages, shape.n_kv_heads, shape.head_dim, PAGE_SIZE)
        values = (n_pages, shape.n_kv_heads, PAGE_SIZE, shape.head_dim)
        return [
            tuple(torch.zeros(size, dtype=self.dtype, device=self.device) for size in (keys, values))  # type: ignore[misc]
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
        tokens, d = qkv.shape[0], shape.head_dim
        q, k, v = torch.split(qkv, [shape.q_size, shape.kv_size, shape.kv_size], dim=-1)
        positions = sequences.positions.long()
        q = rotate(q.view(tokens, shape.n_heads, d), rope, positions)
        k = rotate(k.view(tokens, shape.n_kv_heads, d), rope, positions)
        keys, values = cache
        lengths = (sequences.starts[1:] - sequences.starts[:-1]).long()
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=self.device), lengths)
        pages = sequences.tables[owner, positions // PAGE_SIZE].long()
        keys[pages, :, :, positions % PAGE_SIZE] = k.to(keys.dtype)
        values[pages, :, positions % PAGE_SIZE, :] = v.reshape(tokens, shape.n_kv_heads, d).to(values.dtype)

        group = shape.n_heads // shape.n_kv_heads
        out = torch.empty(tokens, shape.q_size, dtype=qkv.dtype, device=self.device)
        starts, contexts = sequences.starts.tolist(), sequences.contexts.tolist()
        for s, context in enumerate(contexts):
            first, last = starts[s], starts[s + 1]
            table = sequences.tables[s, : -(-context // PAGE_SIZE)].long()
            own_k = keys[table].permute(1, 0, 3, 2).reshape(shape.n_kv_heads, -1, d)[:, :context]
            own_v = values[table].permute(1, 0, 2, 3).reshape(shape.n_kv_heads, -1, d)[:, :context]
            # The query heads of a group as further queries of their KV head: several times faster than enable_gqa.
            queries = q[first:last].view(-1, shape.n_kv_heads, group, d).permute(1, 2, 0, 3)
            count = last - first
            at = positions[first:last, None]
            seen = torch.arange(context, device=self.device)[None, :]
            mask = seen <= at
            if shape.window:
                mask &= seen > at - shape.window
            y = _attend(queries.reshape(shape.n_kv_heads, group * count, d), own_k, own_v, mask.repeat(group, 1), shape)
            out[first:last] = y.view(shape.n_kv_heads, group, count, d).permute(2, 0, 1, 3).reshape(count, -1)
        return out


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, shape: AttentionShape
) -> torch.Tensor:
    """``q`` ``[kv_heads, queries, d]``, ``k`` and ``v`` ``[kv_heads, keys, d]``, ``mask`` bool ``[queries, keys]``."""
    if not shape.softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=shape.scale)
    scores = (q.float() @ k.float().mT) * (shape.score_scale / shape.softcap)
    scores = (scores.tanh_() * shape.softcap).masked_fill_(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``[T, heads, head_dim]`` in the halves convention of transformers; ``rope`` as ``Ops``'s."""
    cos, sin = (table[positions][:, None, :] for table in rope)
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)
