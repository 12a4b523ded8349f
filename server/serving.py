"""Puts a server together: base, adapters' pool and registry, engine; for ``manylora serve``, tests and benchmarks.

Sizes left open in the configuration are chosen here, where the device and the model are known, and logged.
"""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from manylora.adapters.errors import AdapterError, AdapterRefused
from manylora.adapters.peft_loader import load_peft_adapter
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.slots import SlotManager
from manylora.adapters.source import resolve_source
from manylora.adapters.versions import AdapterInfo, AdapterRef, LoadedAdapter
from manylora.kernels.cpu import available as cpu_kernels_available
from manylora.kernels.lora import BatchedLora
from manylora.kernels.lora_pool import MAX_RANK, LoraPool
from manylora.kernels.ops import PAGE_SIZE, Ops
from manylora.kernels.sites import LAYER_PROJECTIONS, PROJECTIONS, RANK_PAGE
from manylora.kernels.torch_ops import TorchOps
from manylora.server.api.state import Serving
from manylora.server.config import ConfigError, EngineConfig, ServeConfig
from manylora.server.engine.decode_graphs import DecodeGraphs
from manylora.server.engine.detokenizer import vocabulary_for
from manylora.server.engine.engine import Engine
from manylora.server.engine.metrics import Metrics
from manylora.server.engine.runner import ModelRunner
from manylora.server.engine.sampler import Sampler
from manylora.server.engine.scheduler import Scheduler, SchedulerConfig
from manylora.server.model.decoder import Decoder
from manylora.server.model.families import ModelSpec
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.loader import LoadedBase, load_base
from manylora.server.model.weights import BaseWeights

logger = logging.getLogger(__name__)

_MIB = 1 << 20


@dataclass(frozen=True)
class Sizes:
    """What the engine was built with: the configuration, its gaps filled."""

    max_rows: int
    max_batch_tokens: int
    max_context: int
    max_slots: int
    max_pages: int
    max_rank: int
    kv_pages: int


@dataclass
class Running:
    """A server's parts. ``serving`` is what the HTTP app takes; the rest is for tests and benchmarks."""

    serving: Serving
    engine: Engine
    registry: AdapterRegistry
    slots: SlotManager
    pool: LoraPool
    decoder: Decoder
    runner: ModelRunner
    sizes: Sizes
    _uploads: ThreadPoolExecutor = field(repr=False)

    async def close(self) -> None:
        """Stop the engine; what still runs is aborted."""
        await self.engine.close()
        self._uploads.shutdown(wait=True)


def choose_device(name: str) -> torch.device:
    """``auto``: CUDA where there is any. Raises ConfigError for a device that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", "cuda was asked for, but torch sees no CUDA device (--device cpu runs anywhere)")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_ops(device: torch.device, spec: ModelSpec, weights: BaseWeights) -> Ops:
    """The fastest operations that this device and these weights allow; the reason is logged where it is not obvious."""
    if device.type == "cuda":
        from manylora.kernels.cuda.ops import CudaOps  # triton, which a CPU need not have

        return CudaOps(device, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16)
    if not cpu_kernels_available():
        reason: str | None = "this processor or installation lacks AVX2, FMA or numba"
    else:
        from manylora.kernels.cpu.ops import NumbaOps, unsupported

        reason = next((r for r in map(unsupported, weights.projections.values()) if r is not None), None)
        if spec.head_dim % PAGE_SIZE:
            reason = f"its head size {spec.head_dim} is no multiple of {PAGE_SIZE}"
        if reason is None:
            return NumbaOps()
    n_bytes = sum(w.shape[0] * w.shape[1] for w in weights.projections.values()) * 4
    logger.warning(
        "The CPU kernels cannot serve this model (%s): a dequantised fp32 copy of %d MiB is kept instead.",
        reason,
        n_bytes // _MIB,
    )
    return TorchOps(device, torch.float32, resident=True)


def choose_sizes(config: EngineConfig, spec: ModelSpec, ops: Ops) -> Sizes:
    """Fill the configuration's gaps. Raises ConfigError for what the model or the machine cannot give."""
    on_cpu = ops.device.type == "cpu"
    if config.max_context is not None and config.max_context > spec.max_position:
        raise ConfigError(
            "--max-context", f"{config.max_context} is more than the model's own {spec.max_position} positions"
        )
    if config.max_rank > MAX_RANK:
        raise ConfigError("--max-rank", f"at most {MAX_RANK} is served, got {config.max_rank}")
    max_context = config.max_context or spec.max_position
    max_rows = config.max_rows or (32 if on_cpu else 128)
    max_batch_tokens = config.max_batch_tokens or max(max_rows, 256 if on_cpu else 2048)
    max_slots = config.max_device_adapters or 32
    # Two pages a slot serve ranks up to 32 everywhere; larger ones share what smaller ones leave.
    max_pages = max(2 * max_slots, -(-config.max_rank // RANK_PAGE))
    page_bytes = KVCache.bytes_per_page(spec, ops.dtype)
    if config.kv_memory is not None:
        kv_pages = config.kv_memory // page_bytes
    else:
        free = _free_memory(ops.device)
        if not on_cpu:
            # There the base and the adapters' pages are still to come; on the CPU the base is there already, and pages
            # are committed as they are first used.
            base, adapters = _base_bytes(spec), max_pages * _adapter_page_bytes(spec, ops.dtype)
            if base + adapters > free:
                raise ConfigError(
                    "--max-device-adapters",
                    f"the base ({base // _MIB} MiB) and {max_pages} pages of adapters ({adapters // _MIB} MiB) need "
                    f"more than the {free // _MIB} MiB that are free on {ops.device}; lower it, or --max-rank",
                )
            free -= base + adapters
        kv_pages = min(free // (4 if on_cpu else 2) // page_bytes, max_rows * KVCache.pages_for(max_context))
    if kv_pages * PAGE_SIZE < max_context:
        needed = KVCache.pages_for(max_context) * page_bytes
        if config.max_context is not None or kv_pages < 1:
            raise ConfigError(
                "--kv-memory",
                f"one request of {max_context} tokens needs {needed // _MIB + 1} MiB of keys and values, there is room "
                f"for {kv_pages * page_bytes // _MIB} MiB; raise it or lower --max-context",
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
    )


def _base_bytes(spec: ModelSpec) -> int:
    """Of the base on a device: NF4 with nested scales, 16-bit tables."""
    shapes = spec.lora_shapes()
    weights = sum(shapes.in_features[p] * shapes.out_features[p] for p in LAYER_PROJECTIONS) * spec.n_layers
    tables = (1 if spec.tie_embeddings else 2) * spec.vocab_size * spec.hidden_size * 2
    return weights // 2 + weights // 64 + weights // 4096 + tables


def _adapter_page_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Of one page of every projection, in all layers."""
    shapes = spec.lora_shapes()
    widths = sum((shapes.in_features[p] + shapes.out_features[p]) * shapes.layers_of(p) for p in PROJECTIONS)
    return widths * RANK_PAGE * dtype.itemsize


def _free_memory(device: torch.device) -> int:
    """Bytes that can be had on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))


class _AdapterLoader:
    """Reads an adapter for this base, and refuses what the pool could never hold. Called on loaders' threads."""

    def __init__(self, base: str, decoder: Decoder, pool: LoraPool, metrics: Metrics) -> None:
        self._base, self._decoder, self._pool, self._metrics = base, decoder, pool, metrics

    def __call__(self, source: str) -> LoadedAdapter:
        start = time.monotonic()
        try:
            weights = load_peft_adapter(
                resolve_source(source), self._pool.shapes, base_name=self._base, base_tensor=self._decoder.table
            )
            reason = self._pool.fits(weights.lora) or self._pool.overflows(weights.lora)
            if reason is not None:
                raise AdapterRefused(f"in {source}", [reason])
        except AdapterRefused:
            self._metrics.adapter_loaded(time.monotonic() - start, refused=True)
            raise
        self._metrics.adapter_loaded(time.monotonic() - start)
        for warning in weights.report.warnings:
            logger.warning("adapter %s: %s", source, warning)
        return LoadedAdapter(version=weights.version, nbytes=weights.nbytes, report=weights.report, weights=weights)


def build(config: ServeConfig, *, progress: bool = True, base: LoadedBase | None = None) -> Running:
    """Load the base and put the engine together; nothing runs until ``engine.start()``.

    ``base``: already loaded (tests); its weights are taken over. Raises ModelError or ConfigError.
    """
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    device = choose_device(config.engine.device)
    if base is None:
        base = load_base(config.model, cache_dir=config.cache_dir, progress=progress)
    spec, tokenizer, digest, source, model_name = base.spec, base.tokenizer, base.digest, base.source, base.name
    name = config.served_model_name or model_name
    weights = base.weights
    ops = choose_ops(device, spec, weights)
    sizes = choose_sizes(config.engine, spec, ops)
    pool = LoraPool(
        spec.lora_shapes(),
        max_slots=sizes.max_slots,
        max_pages=sizes.max_pages,
        max_rank=sizes.max_rank,
        dtype=ops.dtype,
        device=device,
    )
    lora = BatchedLora(pool)
    decoder = Decoder(spec, weights, ops, lora, max_context=sizes.max_context)
    del weights, base  # the decoder holds its own form of them; the base is in memory once
    cache = KVCache(spec, sizes.kv_pages, ops)
    eos = frozenset(tokenizer.eos_token_ids)
    graphs = None
    if device.type == "cuda":
        graphs = DecodeGraphs(decoder, cache, max_rows=sizes.max_rows, max_context=sizes.max_context)
    runner = ModelRunner(decoder, cache, Sampler(spec.vocab_size, device, eos_token_ids=eos), graphs)
    runner.warm_up(sizes.max_batch_tokens, sizes.max_context)
    metrics = Metrics(name)
    parts: list[Engine] = []

    def freed(ref: AdapterRef) -> None:
        if parts:
            parts[0].drop_adapter(ref)

    registry = AdapterRegistry(
        _AdapterLoader(model_name, decoder, pool, metrics),
        state_path=config.registry_state,
        on_freed=freed,
        reserved={name},
    )
    uploads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="manylora-upload")
    slots = SlotManager(
        pool, executor=uploads, on_ready=lambda: parts[0].wake() if parts else None, pinned=registry.is_pinned
    )
    scheduler = Scheduler(
        SchedulerConfig(
            max_rows=sizes.max_rows,
            max_batch_tokens=sizes.max_batch_tokens,
            num_pages=sizes.kv_pages,
            page_size=PAGE_SIZE,
            max_context=sizes.max_context,
            max_waiting=config.engine.max_queue,
        ),
        slots,
    )
    engine = Engine(
        runner,
        scheduler,
        vocabulary=vocabulary_for(tokenizer.hf),
        metrics=metrics,
        registry=registry,
        eos_token_ids=eos,
        max_slots=sizes.max_slots,
    )
    parts.append(engine)
    logger.info(
        "%s on %s (%s operations, LoRA: %s): base %d MiB, %d rows, context of %d, KV cache %d MiB, %d adapter slots",
        name,
        device,
        ops.name,
        lora.implementation,
        decoder.nbytes // _MIB,
        sizes.max_rows,
        sizes.max_context,
        sizes.kv_pages * KVCache.bytes_per_page(spec, ops.dtype) // _MIB,
        sizes.max_slots,
    )
    serving = Serving(
        engine=engine,
        registry=registry,
        tokenizer=tokenizer,
        metrics=metrics,
        base_name=name,
        base_digest=digest,
        max_context=sizes.max_context,
        base_root=str(source),
    )
    return Running(serving, engine, registry, slots, pool, decoder, runner, sizes, uploads)


def load_adapters(running: Running, config: ServeConfig) -> list[AdapterInfo]:
    """Bring back the adapters of the last run, then load those that the configuration names.

    The configuration wins over what was remembered. Raises AdapterError for one that it names and that cannot be
    served: a server that was told to serve an adapter does not start without it. A remembered one that fails is logged.
    """
    named = {spec.name: spec.source for spec in config.adapters}
    if config.adapter_dir is not None:
        for folder in sorted(Path(config.adapter_dir).iterdir()):
            if (folder / "adapter_config.json").is_file():
                named.setdefault(folder.name, str(folder))
    for name, error in running.registry.restore():
        if name not in named:
            logger.error("adapter %s, loaded before the restart, could not be brought back: %s", name, error)
    loaded = []
    for name, source in named.items():
        try:
            loaded.append(running.registry.load(name, source, replace=True))
        except AdapterError as error:
            error.add_note(f"(adapter `{name}`, from the command line)")
            raise
    return loaded
