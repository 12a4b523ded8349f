"""Computes a step: plan -> tensors -> forward -> next tokens. Runs on the step loop's thread only."""

from __future__ import annotations

import torch

from manylora.server.engine.batch import build_batch
from manylora.server.engine.request import SampledToken, SampleFailed, StepPlan
from manylora.server.engine.sampler import Sampler
from manylora.server.model.decoder import Decoder
from manylora.server.model.kv_cache import KVCache


class ModelRunner:
    """The engine's ``Runner`` over a decoder and its KV cache."""

    def __init__(self, decoder: Decoder, cache: KVCache, sampler: Sampler) -> None:
        self._decoder, self._cache, self._sampler = decoder, cache, sampler

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Compute the plan's tokens; fp32 logits ``[rows that sample, vocab]``, in the order of the plan."""
        return self._decoder.forward(build_batch(plan, self._decoder.ops.device), self._cache)

    def execute(self, plan: StepPlan) -> dict[str, SampledToken | SampleFailed]:
        """See ``step_loop.Runner``."""
        logits = self.logits(plan)
        rows = [row.request for row in plan.rows if row.sample]
        return {row.request_id: token for row, token in zip(rows, self._sampler.sample(logits, rows), strict=True)}
