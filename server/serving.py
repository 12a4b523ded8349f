"""Puts a server together: base, adapters' pool and registry, engine; for ``manylora serve``, tests and benchmarks.

Sizes left open in the configuration are chosen (``sizing``) once the device and the model are known, and logged.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from manylora.adapters.host_tier import HostTier
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.slots import SlotManager
from manylora.adapters.versions import AdapterInfo, AdapterRef
from manylora.adapters.watcher import FolderWatcher
from manylora.kernels.lora import BatchedLora
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.ops import PAGE_SIZE
from manylora.server.adapter_loading import AdapterLoader, first_adapters
from manylora.server.api.state import Serving
from manylora.server.bandwidth import measure_bandwidth
from manylora.server.config import ConfigError, ServeConfig
from manylora.server.device_ops import check_cpu_kernels, choose_path, lora_dtype
from manylora.server.engine.auto_merge import AutoMerger, TokenShares
from manylora.server.engine.decode_graphs import DecodeGraphs
from manylora.server.engine.detokenizer import vocabulary_for
from manylora.server.engine.engine import Engine
from manylora.server.engine.grammar.grammars import GrammarCompiler, grammars_for
from manylora.server.engine.merge_builder import MergeBuilder, probe_tokens
from manylora.server.engine.merges import MergeManager
from manylora.server.engine.metrics import Metrics
from manylora.server.engine.runner import ModelRunner
from manylora.server.engine.sampler import Sampler
from manylora.server.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from manylora.server.model.decoder import Decoder
from manylora.server.model.decoder_weights import DecoderWeights
from manylora.server.model.exact_inputs import with_exact_inputs
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.loader import LoadedBase, load_base
from manylora.server.plan import Plan, readable
from manylora.server.sizing import Form, Room, Sizes, choose_sizes, free_memory

logger = logging.getLogger(__name__)

_DRAFTS_UP_TO_CPU = 16
"""Tokens of a step that drafts may fill it up to. A step of one token waits for memory; one of 16 computes (measured by
bench/speculation.py)."""
_DRAFTS_UP_TO_CUDA = 64

_PLANNED_RANK, _PLANNED_CONTEXT = 16, 512
"""Of the adapters and requests whose decode floor is told at the start."""

_UPLOAD_THREADS = 2
"""Copies to the device at once: they are bound by the bus, and by the interpreter."""
_READ_THREADS = 3
"""Reads of adapters that had left host memory: two slow disks, and one more."""


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
    plan: Plan
    host: HostTier
    watcher: FolderWatcher | None
    merges: MergeManager
    auto_merger: AutoMerger | None
    grammars: GrammarCompiler | None
    _threads: tuple[ThreadPoolExecutor, ...] = field(repr=False)

    async def close(self) -> None:
        """Stop the engine; what still runs is aborted."""
        if self.watcher is not None:
            await asyncio.to_thread(self.watcher.stop)
        if self.auto_merger is not None:
            self.auto_merger.close()
        await self.engine.close()
        self.merges.close()
        if self.grammars is not None:
            self.grammars.close()
        self.host.close()
        for executor in self._threads:
            executor.shutdown(wait=True, cancel_futures=True)

    def check_integrity(self) -> None:
        """After ``close``: raise RuntimeError, with the numbers, if anything that requests held was not given back:
        pages and slots (as the step loop saw when it was idle), references to versions, copies in host memory, merged
        weights, the pool's pages."""
        if self.engine.integrity_error is not None:
            raise self.engine.integrity_error
        self.registry.check_integrity()
        if in_flight := self.registry.counts().requests_in_flight:
            raise RuntimeError(f"registry: {in_flight} references are held after the last request")
        self.merges.check_integrity(idle=True)
        self.host.check_integrity(idle=True)
        self.pool.check_integrity()


def choose_device(name: str) -> torch.device:
    """``auto``: CUDA where there is any. Raises ConfigError for a device that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", "cuda was asked for, but torch sees no CUDA device (--device cpu runs anywhere)")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _drafts_up_to(device: torch.device, max_rows: int) -> int:
    """See ``SchedulerConfig``. There are decode graphs for ``max_rows`` tokens."""
    return _DRAFTS_UP_TO_CPU if device.type == "cpu" else min(_DRAFTS_UP_TO_CUDA, max_rows)


def build(config: ServeConfig, *, progress: bool = True, base: LoadedBase | None = None) -> Running:
    """Load the base and put the engine together; nothing runs until ``engine.start()``.

    ``base``: already loaded (tests); its weights are taken over. Raises ModelError or ConfigError.
    """
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    device = choose_device(config.engine.device)
    if device.type == "cpu":
        check_cpu_kernels(config.engine.cpu_kernels)
    if base is None:
        base = load_base(config.model, cache_dir=config.cache_dir, progress=progress)
    spec, tokenizer, digest, source, model_name = base.spec, base.tokenizer, base.digest, base.source, base.name
    name = config.served_model_name or model_name
    weights = base.weights
    path = choose_path(
        device, config.engine.cpu_kernels, spec, weights, arithmetic=config.engine.cpu_arithmetic, progress=progress
    )
    ops = path.ops
    arithmetic = config.engine.cpu_arithmetic if ops.name == "numba" else None
    pages = lora_dtype(config.engine.lora_dtype, device.type, ops.dtype, arithmetic)
    form = Form.of(ops, pages, weights)
    # The base is in host memory already: on a CPU its bytes will be given to what it is re-laid into.
    free = free_memory(torch.device("cpu"))
    sizes = choose_sizes(
        config.engine,
        spec,
        form,
        Room(free + weights.nbytes if device.type == "cpu" else free_memory(device), free),
    )
    pool = LoraPool(
        spec.lora_shapes(),
        max_slots=sizes.max_slots,
        max_pages=sizes.max_pages,
        max_rank=sizes.max_rank,
        dtype=ops.dtype,
        page_dtype=pages,
        device=device,
        table_bytes=sizes.table_bytes,
    )
    lora = BatchedLora(pool, path.lora)
    prepared = DecoderWeights.prepare(spec, weights, ops, max_context=sizes.max_context)
    prepared = with_exact_inputs(spec, prepared, ops)
    decoder = Decoder(spec, prepared, ops, lora)
    del weights, base  # the decoder holds its own form of them; the base is in memory once
    cache = KVCache(spec, sizes.kv_pages, ops)
    eos = frozenset(tokenizer.eos_token_ids)
    graphs = None
    if device.type == "cuda":
        graphs = DecodeGraphs(decoder, cache, max_rows=sizes.max_rows, max_context=sizes.max_context)
    sampler = Sampler(spec.vocab_size, device, eos_token_ids=eos)
    shares = None if config.auto_merge is None else TokenShares()
    runner = ModelRunner(decoder, cache, sampler, graphs, shares=shares)
    runner.warm_up(sizes.max_batch_tokens, sizes.max_context)
    vocabulary = vocabulary_for(tokenizer.hf)
    grammars = grammars_for(tokenizer, spec.vocab_size, vocabulary)
    metrics = Metrics(name)
    parts: list[Engine] = []

    def retired(ref: AdapterRef) -> None:
        if parts:
            parts[0].drop_adapter(ref)

    loader = AdapterLoader(model_name, decoder, pool, metrics)
    reads = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="manylora-read")
    uploads = ThreadPoolExecutor(_UPLOAD_THREADS, thread_name_prefix="manylora-upload")
    host = HostTier(
        loader.read, executor=reads, max_bytes=sizes.host_memory, max_copies=config.engine.max_host_adapters
    )
    registry = AdapterRegistry(
        loader.load, host=host, state_path=config.registry_state, on_retired=retired, reserved={name}
    )
    host.bind(registry)
    slots = SlotManager(
        pool,
        host,
        executor=uploads,
        on_ready=lambda: parts[0].wake() if parts else None,
        pinned=registry.is_pinned,
        live=registry.is_live,
    )
    scheduler = Scheduler(
        SchedulerConfig(
            max_rows=sizes.max_rows,
            max_batch_tokens=sizes.max_batch_tokens,
            num_pages=sizes.kv_pages,
            page_size=PAGE_SIZE,
            max_context=sizes.max_context,
            max_waiting=config.engine.max_queue,
            prefix_cache=config.engine.prefix_cache,
            drafts_up_to=_drafts_up_to(device, sizes.max_rows) if config.api.max_speculative_tokens else 0,
        ),
        slots,
    )
    engine = Engine(
        runner,
        scheduler,
        vocabulary=vocabulary,
        metrics=metrics,
        registry=registry,
        eos_token_ids=eos,
        max_slots=sizes.max_slots,
        host_stats=host.stats,
    )
    parts.append(engine)
    probe = probe_tokens(tokenizer.encode, vocabulary=spec.vocab_size, limit=sizes.max_context)
    merges = MergeManager(
        registry, host.fetch, MergeBuilder(decoder, engine.call, probe, warm_up=runner.merged_warm_up)
    )
    registry.when_freed(merges.version_freed)
    registry.when_freed(engine.version_freed)
    auto_merger = None
    if config.auto_merge is not None and shares is not None:
        auto_merger = AutoMerger(config.auto_merge, merges, shares)
    planned = Plan(
        name, spec, form, sizes, rank=min(_PLANNED_RANK, sizes.max_rank),
        context=min(_PLANNED_CONTEXT, sizes.max_context), bandwidth=measure_bandwidth(device),
    )  # fmt: skip
    logger.info("%s on %s: %s operations, LoRA: %s", name, device, ops.name, lora.implementation)
    for line in readable(planned):
        logger.info("plan: %s", line)
    serving = Serving(
        engine=engine,
        registry=registry,
        tokenizer=tokenizer,
        metrics=metrics,
        base_name=name,
        base_digest=digest,
        max_context=sizes.max_context,
        base_root=str(source),
        host=host,
        merges=merges,
        grammars=grammars,
    )
    watcher = None
    if config.adapter_dir is not None and config.watch is not None:
        watcher = FolderWatcher(config.adapter_dir, registry, interval=config.watch)
    return Running(
        serving, engine, registry, slots, pool, decoder, runner, sizes, planned, host, watcher, merges, auto_merger,
        grammars,
        (reads, uploads),
    )  # fmt: skip


def load_adapters(running: Running, config: ServeConfig) -> list[AdapterInfo]:
    """Load what the server begins with (see ``adapter_loading.first_adapters``), then watch, if it is to be watched."""
    loaded = first_adapters(running.registry, config, running.watcher)
    if running.watcher is not None:
        running.watcher.start()
    if running.auto_merger is not None:
        running.auto_merger.start()
    return loaded
