"""How large a server's parts are: the sizes that a configuration leaves open, and the bytes that each part then takes.

The one source for both ``manylora serve``, which builds what is said here (``serving``), and ``manylora plan``, which
only says it. Nothing is allocated: configs and shapes are enough.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import torch

from manylora.kernels.lora_page import INTEGERS
from manylora.kernels.lora_pool import MAX_RANK
from manylora.kernels.ops import PAGE_SIZE, Ops
from manylora.kernels.sites import LAYER_PROJECTIONS, PROJECTIONS, RANK_PAGE
from manylora.server.config import ConfigError, EngineConfig
from manylora.server.model.families import ModelSpec
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.layout import LM_HEAD, embed_name, plain_shapes, projection_shapes, projection_weight
from manylora.server.model.weights import BaseWeights

_MIB: Final = 1 << 20
_BLOCK: Final = 64
"""Weights of one scale, as a base is quantised here."""
_TILE: Final = 16
"""Vocabulary entries of a tile of the CPU's ``lm_head``; the last is padded."""
_SPAN: Final = 32
"""Values of a hidden state that share a scale as integers; of no multiple of it ``lm_head`` is multiplied in fp32."""
_EXACT: Final = 8
"""Positions of a hidden state whose weights are held once more, where logits are made in 8 bits."""
_NESTED: Final = 256
"""Scales that share one outer scale, where scales are quantised too."""

PROCESS_BYTES: Final = 730 * _MIB
"""Of a process that serves, less all that ``Budget`` has besides: measured on Linux x86-64, CPU build of torch."""

Layout = Literal["tiles", "words", "nf4", "fp32"]
"""How the base's weights are held: in tiles for the CPU kernels, in words for CUDA's, as they are stored, or
dequantised for torch on a CPU."""


@dataclass(frozen=True)
class Form:
    """What the bytes depend on besides the model: where it is computed, in what, and what keys and values are held in,
    and adapters (``page_dtype``)."""

    device: str
    """``cpu`` or ``cuda``."""
    dtype: torch.dtype
    kv_dtype: torch.dtype
    page_dtype: torch.dtype
    layout: Layout
    blocksizes: Mapping[str, int] = field(default_factory=dict)
    """Weights of one scale, by weight name, where that is not 64 (in checkpoints that were NF4 before)."""
    coded_head: bool = False
    """Whether logits are computed from a copy of their table in 8 bits (``Ops.coded_head``)."""

    @classmethod
    def of(cls, ops: Ops, page_dtype: torch.dtype, weights: BaseWeights) -> Form:
        """Of operations and weights that are there."""
        layouts: Mapping[str, Layout] = {"numba": "tiles", "cuda": "words"}
        layout = layouts.get(ops.name, "fp32" if ops.device.type == "cpu" else "nf4")
        blocksizes = {
            projection_weight(*place): weight.blocksize
            for place, weight in weights.projections.items()
            if weight.blocksize != _BLOCK
        }
        return cls(ops.device.type, ops.dtype, ops.kv_dtype, page_dtype, layout, blocksizes, ops.coded_head)

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"


@dataclass(frozen=True)
class Room:
    """Bytes that can be had: ``device`` for the base and all the rest there, ``host`` for adapters in host memory. On a
    CPU both are the same memory."""

    device: int
    host: int


@dataclass(frozen=True)
class Sizes:
    """What the engine is built with: the configuration, its gaps filled."""

    max_rows: int
    max_batch_tokens: int
    max_context: int
    max_slots: int
    max_pages: int
    max_rank: int
    kv_pages: int
    table_bytes: int
    host_memory: int

    @property
    def kv_tokens(self) -> int:
        return self.kv_pages * PAGE_SIZE


@dataclass(frozen=True)
class Budget:
    """Bytes of a server's parts when each is full.

    ``base`` and ``kv`` are taken at the start. So are ``slots`` (pages of A and B, gains, biases) on CUDA; on a CPU the
    system commits pages of them, and of ``kv``, as they are first written. ``tables`` and ``host`` are bounds that
    adapters fill. ``scratch`` is what one step of the largest size needs beside them, ``process`` what the process
    takes without a model.
    """

    base: int
    kv: int
    slots: int
    tables: int
    scratch: int
    host: int
    process: int

    def on_device(self) -> int:
        """Without what is in host memory."""
        return self.base + self.kv + self.slots + self.tables + self.scratch

    def total(self) -> int:
        return self.on_device() + self.host + self.process


# --- the parts -------------------------------------------------------------------------------------------------------


def base_bytes(spec: ModelSpec, form: Form, *, max_context: int) -> int:
    """Of the base as it is held for computing: matrices, tables, norms, biases, rotary tables."""
    total = matrix_bytes(spec, form)
    plain = {name: shape for name, shape in plain_shapes(spec).items() if name not in (embed_name(spec), LM_HEAD)}
    # Norms and biases are computed with in fp32. (Biases are there twice, which is nothing beside the rest.)
    total += sum(torch.Size(shape).numel() for shape in plain.values()) * 4
    rope = max_context * spec.head_dim * 4  # cos and sin of half the head size, fp32
    return total + rope


def matrix_bytes(spec: ModelSpec, form: Form) -> int:
    """Of the linear layers and the two tables alone: ``Decoder.nbytes``."""
    return linear_bytes(spec, form) + sum(table_bytes(spec, form))


def linear_bytes(spec: ModelSpec, form: Form) -> int:
    """Of all linear layers but ``lm_head``: what every step reads once."""
    return sum(
        _linear_bytes(n, k, form.blocksizes.get(name, _BLOCK), form.layout)
        for name, (n, k) in projection_shapes(spec).items()
    )


def _linear_bytes(n: int, k: int, blocksize: int, layout: Layout) -> int:
    weights = n * k
    scales = -(-weights // blocksize)
    if layout == "fp32":
        return weights * 4
    if layout == "tiles":
        return weights // 2 + scales * 4  # scales un-nested, so that a kernel reads them as they lie
    nested = scales + -(-scales // _NESTED) * 4 + _NESTED * 4
    # In words each row has its first block's number and its matrix's offset beside.
    return weights // 2 + nested + (n * 8 if layout == "words" else 16 * 4)


def table_bytes(spec: ModelSpec, form: Form) -> tuple[int, ...]:
    """Of the embedding (first) and, if it is another table, of ``lm_head``: 16 bits a value; for the CPU's integers
    also the largest value of each entry of ``lm_head``, or its codes of 8 bits."""
    rows = spec.vocab_size
    plain = (_tiled(rows) if form.layout == "tiles" else rows) * spec.hidden_size * 2
    codes, spans = _code_bytes(spec, form), spec.hidden_size % _SPAN == 0
    if codes == 0 and form.layout == "tiles" and form.kv_dtype == torch.int16 and spans:
        codes = _tiled(rows) * 4
    head = plain + codes
    return (head,) if spec.tie_embeddings else (rows * spec.hidden_size * 2, head)


def logits_bytes(spec: ModelSpec, form: Form) -> int:
    """What every step's logits read."""
    return _code_bytes(spec, form) or table_bytes(spec, form)[-1]


def _code_bytes(spec: ModelSpec, form: Form) -> int:
    """Of a table for logits in 8 bits: codes, the largest value of each ``_BLOCK`` of an entry, or each span, and the
    weights of ``_EXACT`` positions."""
    width = spec.hidden_size
    if not form.coded_head or width % _SPAN:
        return 0
    return _tiled(spec.vocab_size) * (width + (width // (_BLOCK if width % _BLOCK == 0 else _SPAN)) * 4 + _EXACT * 2)


def _tiled(rows: int) -> int:
    return -(-rows // _TILE) * _TILE


def slot_bytes(spec: ModelSpec, form: Form, max_slots: int, max_pages: int) -> int:
    """Of the pool: pages of A and B for every projection, gains and biases of every slot."""
    return max_pages * page_bytes(spec, form) + max_slots * vector_bytes(spec)


def page_bytes(spec: ModelSpec, form: Form, projections: tuple[str, ...] = PROJECTIONS) -> int:
    """Of one page, 16 ranks, of ``projections`` in all layers."""
    shapes = spec.lora_shapes()
    widths = sum((shapes.in_features[p] + shapes.out_features[p]) * shapes.layers_of(p) for p in projections)
    scales = sum(shapes.layers_of(p) for p in projections) * RANK_PAGE * 4 if form.page_dtype in INTEGERS else 0
    return widths * RANK_PAGE * form.page_dtype.itemsize + scales


def vector_bytes(spec: ModelSpec) -> int:
    """Of a slot's gains and biases, fp32, at every projection."""
    shapes = spec.lora_shapes()
    return sum(shapes.out_features[p] * shapes.layers_of(p) for p in PROJECTIONS) * 2 * torch.float32.itemsize


def adapter_bytes(spec: ModelSpec, rank: int, itemsize: int) -> int:
    """Of a LoRA of one rank on all seven projections of every layer, as it is in its file and in host memory."""
    shapes = spec.lora_shapes()
    widths = sum((shapes.in_features[p] + shapes.out_features[p]) * shapes.n_layers for p in LAYER_PROJECTIONS)
    return widths * rank * itemsize


def scratch_bytes(spec: ModelSpec, form: Form, max_rows: int, max_batch_tokens: int) -> int:
    """Of a step of ``max_batch_tokens`` tokens: one layer's activations (they lie where the last layer's did), and fp32
    logits of ``max_rows`` rows. On CUDA also the largest matrix, dequantised for long prompts. An estimate from the
    shapes: allocators round up."""
    shapes = spec.lora_shapes()
    out = shapes.out_features
    widths = 3 * spec.hidden_size + 2 * spec.q_size + 2 * spec.kv_size + 2 * out["gate"] + out["up"]
    total = max_batch_tokens * widths * form.dtype.itemsize + max_rows * spec.vocab_size * 4
    if form.on_cpu:
        return total
    return total + max(n * k for n, k in projection_shapes(spec).values()) * form.dtype.itemsize


def budget(spec: ModelSpec, form: Form, sizes: Sizes) -> Budget:
    """What a server of these sizes takes."""
    return Budget(
        base=base_bytes(spec, form, max_context=sizes.max_context),
        kv=sizes.kv_pages * KVCache.bytes_per_page(spec, form.kv_dtype),
        slots=slot_bytes(spec, form, sizes.max_slots, sizes.max_pages),
        tables=sizes.table_bytes,
        scratch=scratch_bytes(spec, form, sizes.max_rows, sizes.max_batch_tokens),
        host=sizes.host_memory,
        process=PROCESS_BYTES,
    )


# --- the sizes -------------------------------------------------------------------------------------------------------


def choose_sizes(config: EngineConfig, spec: ModelSpec, form: Form, room: Room) -> Sizes:
    """Fill the configuration's gaps. Raises ConfigError for what the model or the machine cannot give."""
    if config.max_context is not None and config.max_context > spec.max_position:
        raise ConfigError(
            "--max-context", f"{config.max_context} is more than the model's own {spec.max_position} positions"
        )
    if config.max_rank > MAX_RANK:
        raise ConfigError("--max-rank", f"at most {MAX_RANK} is served, got {config.max_rank}")
    max_context = config.max_context or spec.max_position
    max_rows = config.max_rows or (32 if form.on_cpu else 128)
    max_batch_tokens = config.max_batch_tokens or max(max_rows, 256 if form.on_cpu else 2048)
    max_slots = config.max_device_adapters or 32
    per_slot = -(-config.max_rank // RANK_PAGE)
    # Two pages a slot serve ranks up to 32 everywhere; larger ones share what smaller ones leave. No slot can use more
    # than the largest rank's.
    max_pages = max(min(2, per_slot) * max_slots, per_slot)
    kv_page = KVCache.bytes_per_page(spec, form.kv_dtype)
    base = base_bytes(spec, form, max_context=max_context)
    free = room.device - base
    if free <= 0:
        raise ConfigError(
            "--model",
            f"its base takes {base // _MIB} MiB, and {room.device // _MIB} MiB are free on {form.device}; take a "
            "smaller model, or more memory",
        )
    # Room for two adapters that bring a whole table of their own (a retrained lm_head), or many that add some tokens.
    two_tables = 2 * spec.vocab_size * spec.hidden_size * form.dtype.itemsize
    tables = min(two_tables, free // 16) if config.table_memory is None else config.table_memory
    if config.kv_memory is not None:
        kv_pages = config.kv_memory // kv_page
    else:
        if not form.on_cpu:
            # On the CPU the adapters' pages are committed as they are first used; here they are taken at once.
            adapters = slot_bytes(spec, form, max_slots, max_pages) + tables
            if adapters > free:
                raise ConfigError(
                    "--max-device-adapters",
                    f"the base ({base // _MIB} MiB) and {max_pages} pages of adapters ({adapters // _MIB} MiB) need "
                    f"more than the {room.device // _MIB} MiB that are free on {form.device}; lower it, or --max-rank",
                )
            free -= adapters
        kv_pages = min(free // (4 if form.on_cpu else 2) // kv_page, max_rows * KVCache.pages_for(max_context))
    if kv_pages * PAGE_SIZE < max_context:
        needed = KVCache.pages_for(max_context) * kv_page
        if config.max_context is not None or kv_pages < 1:
            raise ConfigError(
                "--kv-memory",
                f"one request of {max_context} tokens needs {needed // _MIB + 1} MiB of keys and values, there is room "
                f"for {kv_pages * kv_page // _MIB} MiB; raise it or lower --max-context",
            )
        max_context = kv_pages * PAGE_SIZE
    return Sizes(
        max_rows=max_rows,
        max_batch_tokens=max_batch_tokens,
        max_context=max_context,
        max_slots=max_slots,
        max_pages=max_pages,
        max_rank=config.max_rank,
        kv_pages=kv_pages,
        table_bytes=tables,
        host_memory=config.host_memory or max(room.host // 4, _MIB),
    )


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
