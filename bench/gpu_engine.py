"""The engine on a small random model, end to end: what ``make gpu-check`` runs after the kernels' own checks.

Scheduler, slots, uploads, captured decode steps and the device sampler, as in the server; only HTTP and text are left
out (their packages need not be there). The same requests are then computed by plain torch in fp32, from the values
that the kernels multiply with, one whole sequence at a time: no paging, no batch, no graph.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import gpu_timing  # noqa: F401 - makes the checkout importable on a bare machine
import torch

from manylora.adapters.host_tier import HostTier
from manylora.adapters.slots import SlotManager
from manylora.adapters.versions import AdapterRef, LoadedAdapter
from manylora.kernels.cuda.nf4_words import pack
from manylora.kernels.cuda.ops import CudaOps
from manylora.kernels.lora import BatchedLora
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_weights import LoraWeights
from manylora.kernels.nf4_tensor import Nf4Tensor
from manylora.kernels.ops import PAGE_SIZE
from manylora.kernels.torch_ops import TorchLinear, TorchOps
from manylora.server.engine.batch import adapter_segments, build_batch
from manylora.server.engine.decode_graphs import DecodeGraphs
from manylora.server.engine.request import (
    AdapterUse,
    Request,
    SampledToken,
    SamplingParams,
    ScheduledRow,
    StepPlan,
)
from manylora.server.engine.runner import ModelRunner
from manylora.server.engine.sampler import Sampler
from manylora.server.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from manylora.server.model.decoder import Decoder
from manylora.server.model.decoder_weights import DecoderWeights
from manylora.server.model.families import ModelSpec
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.synthetic import synthetic_adapter, synthetic_base, synthetic_spec

RANKS = (16, 1, 64, 8, 33, 16)
SLOTS = 4
"""Fewer than there are adapters: some are evicted and uploaded again while others decode."""


COMPARED = 6
"""Rows of the comparison of bits, 8 pages each."""


class Wrong(AssertionError):
    """The engine gave what it must not; the message has the numbers."""


class _Exact(TorchOps):
    """fp32, resident, on the values that the kernels multiply with for activations of ``kind``."""

    def __init__(self, device: torch.device, kind: torch.dtype) -> None:
        super().__init__(device, torch.float32, resident=True)
        self._kind = kind

    def prepare_linear(self, weights: Sequence[Nf4Tensor], bias: torch.Tensor | None) -> TorchLinear:
        words = pack([weight.to(self.device) for weight in weights], self._kind)
        return TorchLinear((), words.dequantize(), None if bias is None else bias.to(self.device, torch.float32))


@dataclass
class Engine:
    """What the server has, put together by hand."""

    spec: ModelSpec
    decoder: Decoder
    runner: ModelRunner
    graphs: DecodeGraphs
    pool: LoraPool
    scheduler: Scheduler
    adapters: list[LoraWeights]
    refs: list[AdapterRef]
    uploads: ThreadPoolExecutor

    def generate(self, requests: Sequence[Request]) -> int:
        """Run requests to their ends; returns the number of steps. Raises Wrong if one fails."""
        wake, steps, open_requests = threading.Event(), 0, list(requests)
        for request in requests:
            self.scheduler.add(request)
        while open_requests:
            plan = self.scheduler.schedule()
            if failed := self.scheduler.take_failed():
                raise Wrong(f"request {failed[0][0].request_id}: {failed[0][1]}")
            if not plan.rows:
                wake.wait(0.001)  # an upload is under way
                continue
            tokens = self.runner.execute(plan)
            self.scheduler.commit(plan)
            steps += 1
            for row in plan.rows:
                token = tokens.get(row.request.request_id)
                if not row.sample:
                    continue
                if not isinstance(token, SampledToken):
                    raise Wrong(f"request {row.request.request_id}: {token}")
                row.request.output_token_ids.append(token.token_id)
                if len(row.request.output_token_ids) == row.request.params.max_tokens:
                    self.scheduler.finish(row.request)
                    open_requests.remove(row.request)
        self.scheduler.check_integrity()
        self.pool.check_integrity()
        return steps


def no_disk(source: str) -> LoadedAdapter:
    raise Wrong(f"{source!r} was to be read, but every adapter here is in host memory")


def build_engine(spec: ModelSpec, device: torch.device, dtype: torch.dtype, *, max_rows: int) -> Engine:
    ops = CudaOps(device, dtype)
    pool = LoraPool(spec.lora_shapes(), max_slots=SLOTS, max_pages=12, max_rank=64, dtype=dtype, device=device)
    weights = DecoderWeights.prepare(spec, synthetic_base(spec, device=device), ops, max_context=128)
    decoder = Decoder(spec, weights, ops, BatchedLora(pool, "triton"))
    n_pages = max(max_rows, COMPARED) * KVCache.pages_for(128)
    cache = KVCache(spec, n_pages, ops)
    graphs = DecodeGraphs(decoder, cache, max_rows=max_rows, max_context=128)
    runner = ModelRunner(decoder, cache, Sampler(spec.vocab_size, device), graphs)
    uploads = ThreadPoolExecutor(max_workers=1)
    host = HostTier(no_disk, executor=uploads)
    slots = SlotManager(pool, host, executor=uploads, on_ready=lambda: None)
    config = SchedulerConfig(
        max_rows=max_rows, max_batch_tokens=96, num_pages=n_pages, page_size=PAGE_SIZE, max_context=128
    )
    adapters = [
        synthetic_adapter(
            pool.shapes, rank, seed=i, dtype=dtype, projections=("q", "v", "o", "down", "up", "lm_head")[i % 3 :]
        )
        for i, rank in enumerate(RANKS)
    ]
    refs = [
        AdapterRef(f"a{i}", f"{i:064x}", footprint=pool.pages_needed(lora), nbytes=lora.nbytes)
        for i, lora in enumerate(adapters)
    ]
    for ref, lora in zip(refs, adapters, strict=True):
        host.put(ref.version, SimpleNamespace(lora=lora), ref.nbytes)
    return Engine(spec, decoder, runner, graphs, pool, Scheduler(config, slots), adapters, refs, uploads)


def make_requests(engine: Engine, count: int, length: int, new_tokens: int, *, seed: int) -> list[Request]:
    """Prompts of ``length / 2 .. length`` random tokens; every third for the base, the others deal out the adapters."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        tokens = int(torch.randint(length // 2, length + 1, (1,), generator=random))
        prompt = torch.randint(0, engine.spec.vocab_size, (tokens,), generator=random).tolist()
        sampling = {"temperature": 0.0} if i % 2 == 0 else {"temperature": 0.8, "top_p": 0.9, "seed": i}
        uses = () if i % 3 == 0 else (AdapterUse(engine.refs[i % len(engine.refs)]),)
        made.append(Request(f"r{seed}-{i}", prompt, SamplingParams(max_tokens=new_tokens, **sampling), uses))
    return made


def check_against_torch(engine: Engine, requests: Sequence[Request], dtype: torch.dtype) -> dict[str, float]:
    """Greedy tokens must be the reference's own, or as near to its best as 16-bit activations can tell.

    The bound on a logit: each of a layer's about eight operations rounds its output to 16 bits, once; errors of
    random sign grow with the root of their number, and 6 such standard deviations cover the maximum over all logits
    looked at.
    """
    device = engine.decoder.ops.device
    epsilon = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-21}[dtype]
    bound = 6 * epsilon * (8 * engine.spec.n_layers) ** 0.5
    pool = LoraPool(engine.spec.lora_shapes(), max_slots=len(RANKS), max_pages=20, max_rank=64, device=device)
    for slot, weights in enumerate(engine.adapters):
        pool.write(slot, weights)
    ops = _Exact(device, dtype)
    base = synthetic_base(engine.spec, device=device)
    prepared = DecoderWeights.prepare(engine.spec, base, ops, max_context=128)
    decoder = Decoder(engine.spec, prepared, ops, BatchedLora(pool, "torch"))
    cache = KVCache(engine.spec, KVCache.pages_for(128), ops)
    worst, compared = 0.0, 0
    for request in requests:
        if request.params.temperature > 0:
            continue
        whole = Request("whole", request.prompt_token_ids + request.output_token_ids[:-1], SamplingParams())
        whole.pages = list(range(KVCache.pages_for(128)))
        whole.adapters = request.adapters
        whole.slots = tuple(engine.refs.index(use.ref) for use in request.adapters)
        batch = build_batch(StepPlan((ScheduledRow(whole, 0, len(whole.prompt_token_ids)),)), device)
        first = len(request.prompt_token_ids) - 1
        with torch.inference_mode():
            logits = decoder.forward(
                replace(batch, sample_rows=torch.arange(first, whole.num_tokens, device=device)), cache
            )
        for row, token in zip(logits, request.output_token_ids, strict=True):
            gap = float((row.max() - row[token]) / row.std())
            worst, compared = max(worst, gap), compared + 1
            if gap > 2 * bound:
                raise Wrong(
                    f"{request.request_id}: token {token} is {gap:.4f} deviations below "
                    f"the best (bound {2 * bound:.4f})"
                )
    if compared == 0:
        raise Wrong("nothing was compared")
    return {"worst_gap": worst, "bound": 2 * bound, "tokens_compared": compared}


def check_bits(engine: Engine, requests: Sequence[Request]) -> None:
    """A decoding row's logits have the same bits alone and among others, and the graph's are those of the eager step.

    In the interpreter, whose products' order depends on the row's place, they are only compared as numbers.
    """
    exact = engine.decoder.ops.device.type == "cuda"

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        return torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-4, atol=1e-4)

    rows = []
    for i, request in enumerate(requests[: min(COMPARED, engine.graphs.buckets[-1])]):
        copy = Request(f"c{i}", request.prompt_token_ids, SamplingParams())
        copy.pages = list(range(8 * i, 8 * i + 8))
        if i % 3:
            copy.adapters, copy.slots = (AdapterUse(engine.refs[i % SLOTS]),), (i % SLOTS,)
        rows.append(copy)
    rows.sort(key=lambda row: row.slots)
    device = engine.decoder.ops.device
    for row in rows:
        engine.runner.logits(StepPlan((ScheduledRow(row, 0, row.num_tokens),)))
        row.output_token_ids.append(1)
    plan = [ScheduledRow(row, row.num_tokens - 1, 1) for row in rows]
    with torch.inference_mode():
        together = engine.graphs.run(plan, adapter_segments(plan, device)).clone()
        if not same(engine.runner.logits(StepPlan(tuple(plan))), together):
            raise Wrong("a replayed decode step differs from the same step computed eagerly")
        for i, one in enumerate(plan):
            alone = engine.graphs.run([one], adapter_segments([one], device))
            if not same(alone[0], together[i]):
                raise Wrong(f"row {i} (slots {one.request.slots}) has other bits alone than in the batch")


def compiled_kernels() -> int:
    """How many kernels Triton has compiled or loaded so far in this process."""
    from triton.runtime.jit import JITFunction

    import manylora.kernels.cuda.attention
    import manylora.kernels.cuda.dense_linear
    import manylora.kernels.cuda.elementwise
    import manylora.kernels.cuda.lora
    import manylora.kernels.cuda.nf4_linear
    import manylora.kernels.cuda.sampling

    package = manylora.kernels.cuda
    modules = (
        package.attention, package.dense_linear, package.elementwise, package.lora, package.nf4_linear,
        package.sampling,
    )  # fmt: skip
    kernels = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


def run(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> dict[str, Any]:
    """All of it; figures for the report. Raises Wrong."""
    if quick:  # the interpreter
        spec, rows, count, length, new = synthetic_spec("tiny", num_hidden_layers=1), 2, 3, 6, 2
    else:
        changes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 4096}
        spec, rows, count, length, new = synthetic_spec("tiny", **changes), 24, 40, 60, 24
    engine = build_engine(spec, device, dtype, max_rows=rows)
    try:
        began = time.monotonic()
        engine.runner.warm_up(20 if quick else 96, 128)
        warm, before = time.monotonic() - began, compiled_kernels() if device.type == "cuda" else 0
        requests = make_requests(engine, count, length, new, seed=1)
        steps = engine.generate(requests)
        figures = check_against_torch(engine, requests, dtype)
        again = make_requests(engine, count, length, new, seed=1)
        engine.generate(again)
        for one, other in zip(requests, again, strict=True):
            if one.output_token_ids != other.output_token_ids:
                raise Wrong(f"{one.request_id}: other tokens the second time")
        check_bits(engine, requests)
        after = compiled_kernels() if device.type == "cuda" else 0
        if after != before:
            raise Wrong(f"{after - before} kernels were compiled while serving")
        return {"warm_up_s": round(warm, 2), "steps": steps, "evicted_and_uploaded": len(RANKS) > SLOTS, **figures}
    finally:
        engine.uploads.shutdown(wait=True)
