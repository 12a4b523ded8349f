"""The decoder of every served family, driven by its `ModelSpec`: pre-norm blocks of attention and an MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from manylora.kernels.lora import BatchedLora
from manylora.kernels.lora_segments import LoraSegments
from manylora.kernels.ops import Maxima, Ops, PagedSequences
from manylora.kernels.sites import SITES
from manylora.server.model.decoder_weights import DecoderWeights, LayerWeights, Norm
from manylora.server.model.families import ModelSpec
from manylora.server.model.forward_batch import ForwardBatch
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.linear import SiteLinear
from manylora.server.model.recorded_shape import RecordedShape, is_full_step, is_short_step
from manylora.server.model.step_arrays import StepArrays

if TYPE_CHECKING:
    from manylora.kernels.cpu.replay import Recordings


@dataclass(frozen=True)
class StepResult:
    """``hidden`` ``[T, hidden]``: the last layer's output; ``logits`` fp32 ``[sampled, vocab]``, and their ``maxima``,
    if they came by the way."""

    hidden: torch.Tensor
    logits: torch.Tensor
    maxima: Maxima | None = None


class _Layer:
    """One block, its sites bound to the operations and to the adapters."""

    def __init__(self, weights: LayerWeights, layer: int, ops: Ops, lora: BatchedLora | None) -> None:
        self.input_norm, self.attention_out_norm = weights.input_norm, weights.attention_out_norm
        self.post_attention_norm, self.mlp_out_norm = weights.post_attention_norm, weights.mlp_out_norm
        self.q_norm, self.k_norm, self.attention = weights.q_norm, weights.k_norm, weights.attention
        self.qkv, self.o, self.gate_up, self.down = (
            SiteLinear(ops, weights.sites[site], site, layer, lora) for site in ("qkv", "o", "gate_up", "down")
        )


class Decoder:
    """The forward pass over one step's batch, and ``adapters.base.BaseModel``: the weights that it computes with.

    Holds no state of its own: several decoders may share weights, operations and adapters.
    """

    def __init__(self, spec: ModelSpec, weights: DecoderWeights, ops: Ops, lora: BatchedLora | None) -> None:
        self.spec, self.weights, self.ops, self.lora = spec, weights, ops, lora
        self._layers = [_Layer(layer, i, ops, lora) for i, layer in enumerate(weights.layers)]
        self._recordings = ops.recordings()
        activations = {"silu": ops.silu_mul, "gelu_tanh": ops.gelu_mul if spec.gated else ops.gelu}
        self._activate = activations[spec.hidden_act]

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices as they are held for computing."""
        return self.weights.nbytes

    def forward(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """Compute the batch's tokens, storing their keys and values in ``cache``; logits fp32 ``[sampled, vocab]``."""
        return self.logits(self.hidden(batch, cache), batch, batch.sample_rows)

    def step(self, step: StepArrays, cache: KVCache) -> StepResult:
        """As ``forward``, for whoever looks at the result before this thread computes anything else: a step of rows
        that decode is one program then, output layer and all."""
        if self._recordings is not None and self._may_be_recorded(step.lora, len(step.token_ids)):
            with_logits = step.sample_rows is None and self._only_kernels_make_logits(step.lora)
            hidden, maxima, logits = self._recorded(self._recordings, step, cache, with_logits=with_logits)
            if logits is not None:
                return StepResult(hidden, logits, maxima)
            batch = step.on(self.ops.device)
        else:
            batch = step.on(self.ops.device)
            hidden = self.hidden(batch, cache)
        return StepResult(hidden, self.logits(hidden, batch, batch.sample_rows))

    def hidden(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """As ``forward``, but the last layer's output ``[T, hidden]``: what ``logits`` takes."""
        tokens = batch.token_ids.numel()
        if self._recordings is not None and batch.routed is None and self._may_be_recorded(batch.lora, tokens):
            return self._recorded(self._recordings, StepArrays.of(batch), cache)[0].clone()
        adapters = batch.routed
        if batch.lora is not None and self.lora is not None and adapters is None:
            adapters = self.lora.route(batch.lora, tokens)
        x = self._embedded(batch.token_ids, batch.sequences.positions, batch.lora)
        return self._compute(x, batch.sequences, adapters, cache)

    def _embedded(
        self, token_ids: torch.Tensor, positions: torch.Tensor, segments: LoraSegments | None
    ) -> torch.Tensor:
        """What the first layer is given, ``[T, hidden]``."""
        x = self.ops.embed(token_ids, self.weights.embedding)
        if segments is not None and self.lora is not None:
            self.lora.add_embedding_(x, token_ids, segments)
        if self.spec.embed_scale != 1.0:
            x *= self.spec.embed_scale
        if self.weights.positions is not None:
            x += self.weights.positions[positions.long()]
        return x

    def _compute(
        self, x: torch.Tensor, sequences: PagedSequences, adapters: Any | None, cache: KVCache
    ) -> torch.Tensor:
        """All layers, in place on the embedded tokens ``x`` ``[T, hidden]``."""
        ops, epsilon = self.ops, self.spec.rms_norm_eps
        with ops.together():
            for layer, rope, pages in zip(self._layers, self.weights.rope, cache.layers, strict=True):
                with ops.together():
                    qkv = layer.qkv(self._norm(x, layer.input_norm), adapters)
                    if layer.q_norm is not None and layer.k_norm is not None:
                        q, k = layer.attention.q_size, layer.attention.kv_size
                        ops.head_norm_(qkv[:, :q], layer.q_norm, epsilon)
                        ops.head_norm_(qkv[:, q : q + k], layer.k_norm, epsilon)
                    attended = ops.attention(qkv, rope, pages, sequences, layer.attention)
                    x = self._onto(x, layer.o, attended, adapters, layer.attention_out_norm)
                    gate_up = layer.gate_up(self._norm(x, layer.post_attention_norm), adapters)
                    x = self._onto(x, layer.down, self._activate(gate_up), adapters, layer.mlp_out_norm)
        return x

    def _onto(
        self, x: torch.Tensor, linear: SiteLinear, y: torch.Tensor, adapters: Any | None, norm: Norm | None
    ) -> torch.Tensor:
        """``linear(y)``, normed if there is a ``norm``, added to the residual stream ``x`` in place."""
        if norm is None:
            return linear(y, adapters, add_to=x)
        return self.ops.add_(x, self._norm(linear(y, adapters), norm))

    def _norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        if norm.bias is None:
            return self.ops.rms_norm(x, norm.weight, self.spec.rms_norm_eps)
        return self.ops.layer_norm(x, norm.weight, norm.bias, self.spec.rms_norm_eps)

    def _may_be_recorded(self, segments: LoraSegments | None, tokens: int) -> bool:
        """A step of a shape that comes again, of adapters with pairs alone: what gains and biases need is laid out on
        the host for each step. A full step must begin with token ids, as a recording keeps its own inputs."""
        if not (is_short_step(tokens) or (is_full_step(tokens) and self._embedding_is_queued(segments))):
            return False
        return segments is None or self.lora is None or not self.lora.has_vectors(segments)

    def _only_kernels_make_logits(self, segments: LoraSegments | None) -> bool:
        if self.weights.head_bias is not None:
            return False
        return segments is None or self.lora is None or not self.lora.touches("lm_head", segments)

    def _embedding_is_queued(self, segments: LoraSegments | None) -> bool:
        """Whether only a kernel makes what the first layer is given."""
        if not self.weights.tied or self.spec.embed_scale != 1.0 or self.weights.positions is not None:
            return False
        return segments is None or self.lora is None or not self.lora.touches("embed", segments)

    def _recorded(
        self, recordings: Recordings, step: StepArrays, cache: KVCache, *, with_logits: bool = False
    ) -> tuple[torch.Tensor, Maxima | None, torch.Tensor | None]:
        """The last layer's output, in memory of the recording's own; with logits, their maxima and these, too."""
        from manylora.kernels.cpu.maxima import first_maxima  # numba: there is some, or nothing would be recorded

        if self.lora is None and step.lora is not None:
            step = replace(step, lora=None)
        shape, from_ids = RecordedShape.of(step), self._embedding_is_queued(step.lora)
        first: np.ndarray = step.token_ids
        if not from_ids:
            ids, positions = torch.from_numpy(step.token_ids), torch.from_numpy(step.positions)
            first = self._embedded(ids, positions, step.lora).numpy()

        def inputs() -> list[torch.Tensor]:
            return [torch.from_numpy(np.empty_like(first)), *shape.inputs()]

        def fill(own: Sequence[np.ndarray]) -> None:
            own[0][:] = first
            shape.fill(own[1:], step)

        def compute(own: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Maxima | None, torch.Tensor | None]:
            sequences, segments = shape.rebuilt(own[1:], step.lora)
            adapters = None
            if segments is not None and self.lora is not None:
                adapters = self.lora.route(segments, shape.tokens)
            with self.ops.together():
                x = self.ops.embed(own[0], self.weights.embedding) if from_ids else own[0]
                self._compute(x, sequences, adapters, cache)
                if not with_logits:
                    return x, None, None
                logits = self._capped(self.ops.logits(self._norm(x, self.weights.final_norm), self.weights.head))
                return x, first_maxima(logits), logits

        # The cache itself, not its address: a recording keeps the pages that it writes to.
        return recordings.run((cache, shape, from_ids, with_logits), inputs, fill, compute)

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        return self.ops.softcap_(logits, self.spec.logit_softcap) if self.spec.logit_softcap else logits

    # --- the weights, dequantised: on any thread, beside the step loop ---------------------------------------------

    def weight(self, projection: str, layer: int) -> torch.Tensor:
        """fp32 ``[out_features, in_features]`` on the CPU, a copy: the very values that are multiplied with."""
        return self.ops.dense(self.rows(projection, layer)).cpu()

    def bias(self, projection: str, layer: int) -> torch.Tensor | None:
        """fp32 ``[out_features]`` on the CPU, a copy; None if the module has none."""
        found = self.weights.layers[layer].biases.get(projection)
        return None if found is None else found.clone()

    def table(self, projection: str) -> torch.Tensor:
        """``embed`` or ``lm_head``, fp32 ``[vocab, hidden]`` on the CPU, a copy."""
        weight = {"embed": self.weights.embedding, "lm_head": self.weights.head}[projection]
        # What a row of the table is looked up as, not what Ops.logits multiplies with: the same values.
        rows = self.ops.embed(torch.arange(self.spec.vocab_size, device=self.ops.device), weight)
        return rows.to("cpu", torch.float32)

    @property
    def tied(self) -> bool:
        """Whether ``lm_head`` is the embedding's own weight."""
        return self.weights.tied

    def rows(self, projection: str, layer: int) -> Any:
        """A layer's projection as ``Ops.rows`` cuts it out of its site: a prepared view without bias."""
        site = next(site for site, members in SITES.items() if projection in members)
        offsets = self.spec.lora_shapes().site_offsets(site)
        place = SITES[site].index(projection)
        return self.ops.rows(self.weights.layers[layer].sites[site], offsets[place], offsets[place + 1])

    def logits(self, x: torch.Tensor, batch: ForwardBatch, rows: torch.Tensor | None) -> torch.Tensor:
        """fp32 ``[rows, vocab]`` of some of the batch's tokens: int64, ascending; None for all of them."""
        if rows is not None:
            if rows.numel() == 0:
                return torch.empty(0, self.spec.vocab_size, dtype=torch.float32, device=self.ops.device)
            if rows.numel() != x.shape[0]:  # else it is all of them, and copying takes a millisecond
                x = x[rows]
        hidden = self._norm(x, self.weights.final_norm)
        logits = self.ops.logits(hidden, self.weights.head)
        if self.weights.head_bias is not None:
            logits += self.weights.head_bias
        if self.lora is not None:
            adapters: Any = batch.routed
            if batch.lora is not None and self.lora.touches("lm_head", batch.lora):
                adapters = batch.lora if rows is None else batch.lora.select(rows)
            if adapters is not None:
                self.lora.add_(logits, hidden, adapters, "lm_head", 0)
        return self._capped(logits)
