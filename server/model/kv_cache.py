"""The paged KV cache's tensors; which request owns which page is ``engine.block_pool``'s to know."""

from __future__ import annotations

import torch

from manylora.kernels.ops import PAGE_SIZE, AttentionShape, Ops, page_bytes
from manylora.server.model.families import ModelSpec


class KVCache:
    """``layers[i]`` is the pair (keys, values) of layer i; see ``Ops.new_kv_cache`` for the layout."""

    def __init__(self, spec: ModelSpec, n_pages: int, ops: Ops) -> None:
        shape = AttentionShape(spec.n_heads, spec.n_kv_heads, spec.head_dim)
        self.n_pages = n_pages
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = ops.new_kv_cache(spec.n_layers, n_pages, shape)

    @staticmethod
    def bytes_per_page(spec: ModelSpec, dtype: torch.dtype) -> int:
        """Bytes that ``PAGE_SIZE`` positions take over all layers, held in ``dtype`` (``Ops.kv_dtype``)."""
        return page_bytes(AttentionShape(spec.n_heads, spec.n_kv_heads, spec.head_dim), spec.n_layers, dtype)

    @staticmethod
    def pages_for(tokens: int) -> int:
        """Pages that hold ``tokens`` positions."""
        return -(-tokens // PAGE_SIZE)
