"""Computes a step: plan -> tensors -> forward -> next tokens. Runs on the step loop's thread only."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

from manylora.kernels.lora_segments import LoraSegments
from manylora.server.engine.batch import adapter_segments, build_batch
from manylora.server.engine.decode_graphs import DecodeGraphs
from manylora.server.engine.request import Request, SampledToken, SampleFailed, SamplingParams, ScheduledRow, StepPlan
from manylora.server.engine.sampler import Sampler
from manylora.server.model.decoder import Decoder
from manylora.server.model.kv_cache import KVCache

logger = logging.getLogger(__name__)


class ModelRunner:
    """The engine's ``Runner`` over a decoder and its KV cache.

    With ``graphs``, rows that decode one token are computed apart from prompts: replayed from a captured graph, and by
    kernels whose results do not depend on a prompt that happens to be computed in the same step.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, sampler: Sampler, graphs: DecodeGraphs | None = None) -> None:
        self._decoder, self._cache, self._sampler, self._graphs = decoder, cache, sampler, graphs

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Compute the plan's tokens; fp32 logits ``[rows that sample, vocab]``, in the order of the plan."""
        return self._decoder.forward(build_batch(plan, self._decoder.ops.device), self._cache)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> dict[str, SampledToken | SampleFailed]:
        """See ``step_loop.Runner``."""
        decoding, segments = self._decoding(plan)
        if self._graphs is None or not decoding:
            return self._sample(self.logits(plan), plan.rows)
        # Prompts first: their rows are sampled while nothing else waits for the graph's output.
        rest = [row for row in plan.rows if not _decodes(row)]
        sampled = self._sample(self.logits(StepPlan(tuple(rest))), rest) if rest else {}
        return sampled | self._sample(self._graphs.run(decoding, segments), decoding)

    @torch.inference_mode()
    def warm_up(self, max_tokens: int, max_context: int) -> None:
        """Compute steps of every kind, so that nothing is compiled while serving. ``max_tokens`` of a step,
        ``max_context`` of a request."""
        if self._graphs is None:
            return
        self._graphs.warm_up()
        began = time.monotonic()
        lora = self._decoder.lora
        slots: tuple[int | None, ...] = (None,) if lora is None else (None, 0)
        lengths = [length for length in (2, 17, 33, 65, 257, 513) if length <= max_tokens]
        for length in lengths:
            for slot in slots:
                # Several prompts if one would be too long. All keys and values go to page 0, which nobody has yet.
                rows = []
                for first in range(0, length, max_context):
                    request = Request(f"warm-up {first}", [0] * min(max_context, length - first), SamplingParams())
                    request.pages, request.slot = [0] * KVCache.pages_for(request.num_tokens), slot
                    rows.append(ScheduledRow(request, 0, request.num_tokens))
                self._sample(self.logits(StepPlan(tuple(rows))), rows)
        logger.info("prompt kernels ready in %.1f s", time.monotonic() - began)

    def _decoding(self, plan: StepPlan) -> tuple[list[ScheduledRow], LoraSegments | None]:
        """The rows for the graphs, with their adapters; none if they cannot be run there."""
        if self._graphs is None:
            return [], None
        decoding = [row for row in plan.rows if _decodes(row)]
        segments = adapter_segments(decoding) if decoding else None  # on the host: graphs have their own lists
        return (decoding, segments) if self._graphs.takes(decoding, segments) else ([], None)

    def _sample(self, logits: torch.Tensor, rows: Sequence[ScheduledRow]) -> dict[str, SampledToken | SampleFailed]:
        """``logits`` has a row for each of ``rows`` that samples."""
        requests = [row.request for row in rows if row.sample]
        return {r.request_id: token for r, token in zip(requests, self._sampler.sample(logits, requests), strict=True)}


def _decodes(row: ScheduledRow) -> bool:
    """Whether a row is a decode step: one token, whose logits are wanted. A prompt's chunk may have one token too."""
    return row.count == 1 and row.sample
