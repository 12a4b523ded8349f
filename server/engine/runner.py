"""Computes a step: plan -> tensors -> forward -> next tokens. Runs on the step loop's thread only."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import torch

from manylora.adapters.versions import AdapterRef
from manylora.kernels.ops import Maxima
from manylora.server.engine.auto_merge import TokenShares
from manylora.server.engine.batch import BatchBuilder, adapter_segments
from manylora.server.engine.decode_graphs import DecodeGraphs
from manylora.server.engine.merges import MergedModel
from manylora.server.engine.prompt_logprobs import PromptScorer
from manylora.server.engine.request import (
    AdapterUse,
    Request,
    SampledToken,
    SampleFailed,
    SamplingParams,
    ScheduledRow,
    StepPlan,
)
from manylora.server.engine.sampler import Sampler
from manylora.server.model.decoder import Decoder
from manylora.server.model.kv_cache import KVCache

logger = logging.getLogger(__name__)

_WARM_UP: Final = AdapterUse(AdapterRef("warm-up", ""))


class ModelRunner:
    """The engine's ``Runner`` over a decoder and its KV cache.

    With ``graphs``, rows that decode one token are computed apart from prompts: replayed from a captured graph, and by
    kernels whose results do not depend on a prompt that happens to be computed in the same step. There, a row with
    drafts is as many rows of one token, which share their pages (keys and values of all of them are stored before any
    is attended to): the kernels, and so the bits, are those of a row without. On the CPU it is one short chunk, whose
    bits are the same however it is cut.

    Rows of requests with merged weights (``Request.merged``) are computed by that decoder, all others by the base's, as
    if they were steps of their own: both write to the same KV cache. ``shares`` counts what is generated for whom.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        sampler: Sampler,
        graphs: DecodeGraphs | None = None,
        *,
        shares: TokenShares | None = None,
    ) -> None:
        self._decoder, self._cache, self._sampler, self._graphs = decoder, cache, sampler, graphs
        self._shares = shares
        self._batches = BatchBuilder(decoder.ops.device)
        self._drafted: dict[str, tuple[int, torch.Tensor]] = {}
        """Of the last step's rows with drafts, by request id: the tokens that were known, and the drafts' logits."""
        self._scorer = PromptScorer(decoder.spec.vocab_size)

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Compute the plan's tokens; fp32 logits ``[rows that sample, vocab]``, in the order of the plan; of a row with
        drafts, those of each draft behind its own."""
        groups = _by_model(plan.rows)
        if len(groups) == 1:
            return self._forward(*groups[0])
        places: dict[Request, range] = {}
        total = 0
        for row in plan.rows:
            places[row.request] = range(total, total + row.num_sampled)
            total += row.num_sampled
        out = torch.empty(total, self._decoder.spec.vocab_size, device=self._decoder.ops.device)
        for model, rows in groups:
            out[[place for row in rows for place in places[row.request]]] = self._forward(model, rows)
        return out

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> dict[str, SampledToken | SampleFailed]:
        """See ``step_loop.Runner``."""
        if self._shares is not None:
            self._shares.count(plan.rows)
        self._drafted.clear()
        sampled: dict[str, SampledToken | SampleFailed] = {}
        for model, rows in _by_model(plan.rows):
            sampled |= self._execute(model, rows)
        return sampled

    @torch.inference_mode()
    def draw_on(self, requests: Sequence[Request]) -> dict[str, SampledToken | SampleFailed]:
        """See ``step_loop.Runner``."""
        if self._shares is not None:
            self._shares.count_for(requests)
        rows = []
        for request in requests:
            known, logits = self._drafted[request.request_id]
            rows.append(logits[request.num_tokens - known - 1])
        return self._draw(torch.stack(rows), requests)

    def _execute(
        self, model: MergedModel | None, rows: Sequence[ScheduledRow]
    ) -> dict[str, SampledToken | SampleFailed]:
        graphs = self._graphs_of(model)
        decoding = [] if graphs is None else [row for row in rows if _decodes(row)]
        if graphs is None or not decoding:
            return self._execute_eagerly(model, rows)
        singles = [single for row in decoding for single in _single(row)]
        segments = adapter_segments(singles)  # on the host: graphs have their own lists
        if not graphs.takes(singles, segments):
            return self._execute_eagerly(model, [single for row in rows for single in _single(row)], rows)
        # Prompts first: their rows are sampled while nothing else waits for the graph's output.
        rest = [row for row in rows if not _decodes(row)]
        sampled = self._execute_eagerly(model, rest) if rest else {}
        return sampled | self._sample(graphs.run(singles, segments), decoding)

    def _execute_eagerly(
        self, model: MergedModel | None, rows: Sequence[ScheduledRow], whole: Sequence[ScheduledRow] | None = None
    ) -> dict[str, SampledToken | SampleFailed]:
        """``whole``: the rows that ``rows`` are parts of, if they are."""
        decoder = self._decoder_of(model)
        step = self._batches.arrays(rows)
        result = decoder.step(step, self._cache)
        sampled = self._sample(result.logits, whole or rows, result.maxima)
        sampled.update(self._scorer.score(decoder, result.hidden, step, rows))
        return sampled

    def _forward(self, model: MergedModel | None, rows: Sequence[ScheduledRow]) -> torch.Tensor:
        decoder = self._decoder_of(model)
        return decoder.forward(self._batches.arrays(rows).on(decoder.ops.device), self._cache)

    def _decoder_of(self, model: MergedModel | None) -> Decoder:
        if model is None:
            return self._decoder
        merged: Decoder = model.decoder
        return merged

    def _graphs_of(self, model: MergedModel | None) -> DecodeGraphs | None:
        if model is None or self._graphs is None:
            return self._graphs
        if model.graphs is None:
            model.graphs = self._graphs.beside(model.decoder)
        graphs: DecodeGraphs = model.graphs
        return graphs

    def merged_warm_up(self, model: MergedModel) -> Sequence[Callable[[], None]]:
        """What to call between steps, one at a time, before a merged model serves: else its first steps would wait for
        their graphs to be captured."""
        graphs = self._graphs_of(model)
        return [] if graphs is None else [partial(graphs.capture, rows) for rows in reversed(graphs.buckets)]

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
                    request.pages = [0] * KVCache.pages_for(request.num_tokens)
                    if slot is not None:
                        request.adapters, request.slots = (_WARM_UP,), (slot,)
                    rows.append(ScheduledRow(request, 0, request.num_tokens))
                self._sample(self.logits(StepPlan(tuple(rows))), rows)
        logger.info("prompt kernels ready in %.1f s", time.monotonic() - began)

    def _sample(
        self, logits: torch.Tensor, rows: Sequence[ScheduledRow], maxima: Maxima | None = None
    ) -> dict[str, SampledToken | SampleFailed]:
        """``logits`` has ``num_sampled`` rows for each of ``rows``; the drafts' are put aside for ``draw_on``."""
        rows = [row for row in rows if row.sample]
        if any(row.drafts for row in rows):
            firsts: list[int] = []
            at = 0
            for row in rows:
                firsts.append(at)
                if row.drafts:
                    # A copy: other rows of this step may be computed into the same memory.
                    drafted = logits[at + 1 : at + row.num_sampled].clone()
                    self._drafted[row.request.request_id] = row.request.num_tokens, drafted
                at += row.num_sampled
            logits, maxima = logits[firsts], None
        return self._draw(logits, [row.request for row in rows], maxima)

    def _draw(
        self, logits: torch.Tensor, requests: Sequence[Request], maxima: Maxima | None = None
    ) -> dict[str, SampledToken | SampleFailed]:
        drawn = self._sampler.sample(logits, requests, maxima)
        return {request.request_id: token for request, token in zip(requests, drawn, strict=True)}


def _by_model(rows: Sequence[ScheduledRow]) -> list[tuple[MergedModel | None, Sequence[ScheduledRow]]]:
    """The rows of each decoder, in order; None for the base's, which come first."""
    if not any(row.request.merged is not None for row in rows):
        return [(None, rows)]
    groups: dict[MergedModel | None, list[ScheduledRow]] = {}
    for row in rows:
        groups.setdefault(row.request.merged, []).append(row)
    return sorted(groups.items(), key=lambda group: group[0] is not None)


def _decodes(row: ScheduledRow) -> bool:
    """Whether a row is a decode step: one token besides drafts, whose logits are wanted. A prompt's chunk may have one
    token too."""
    return row.count - len(row.drafts) == 1 and row.sample


def _single(row: ScheduledRow) -> list[ScheduledRow]:
    """A row with drafts as rows of one token, each behind the drafts before it; any other as it is."""
    if not row.drafts:
        return [row]
    return [ScheduledRow(row.request, row.start + i, 1, row.drafts[:i]) for i in range(row.count)]
