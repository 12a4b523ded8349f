"""A tiny model over the CUDA operations, and the same over plain torch on the weights that the kernels multiply
with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from manylora.adapters.versions import AdapterRef
from manylora.kernels.cuda.nf4_words import pack
from manylora.kernels.lora import BatchedLora, Implementation
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.nf4_tensor import Nf4Tensor
from manylora.kernels.ops import Ops
from manylora.kernels.torch_ops import TorchLinear, TorchOps
from manylora.server.engine.batch import build_batch
from manylora.server.engine.request import AdapterUse, Request, SamplingParams, ScheduledRow, StepPlan
from manylora.server.model.decoder import Decoder
from manylora.server.model.decoder_weights import DecoderWeights
from manylora.server.model.families import ModelSpec
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.synthetic import synthetic_adapter, synthetic_base

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALL = ("q", "k", "v", "o", "gate", "up", "down", "lm_head")
FP32_ROUNDINGS = 100 * 2.0**-24
"""Of the largest logit. fp32 on both sides, sums of up to 192 terms through two layers: measured differences are
about a tenth of this; a wrong page, slot or tail is off by the logits' own size."""


class Reference(TorchOps):
    """Plain torch, resident, on the values that the kernels multiply with."""

    def prepare_linear(self, weights: Sequence[Nf4Tensor], bias: torch.Tensor | None) -> TorchLinear:
        words = pack([weight.to(self.device) for weight in weights], torch.float32)
        return TorchLinear((), words.dequantize(), None if bias is None else bias.to(self.device, self.dtype))


class Model:
    """Slots 0 (rank 8, lm_head too) and 2 (rank 33, some projections) hold adapters; slot 1 is empty."""

    def __init__(self, spec: ModelSpec, ops: Ops, implementation: Implementation) -> None:
        self.pool = LoraPool(spec.lora_shapes(), max_slots=3, max_pages=6, max_rank=48, device=DEVICE)
        self.pool.write(0, synthetic_adapter(self.pool.shapes, 8, seed=1, projections=ALL))
        self.pool.write(2, synthetic_adapter(self.pool.shapes, 33, seed=2, projections=("q", "v", "down", "up")))
        lora = BatchedLora(self.pool, implementation)
        weights = DecoderWeights.prepare(spec, synthetic_base(spec), ops, max_context=256)
        self.decoder = Decoder(spec, weights, ops, lora)
        self.cache = KVCache(spec, 40, ops)

    @torch.inference_mode()
    def logits(self, *rows: ScheduledRow) -> torch.Tensor:
        return self.decoder.forward(build_batch(StepPlan(by_slot(rows)), DEVICE), self.cache).cpu()


def by_slot(rows: Sequence[ScheduledRow]) -> tuple[ScheduledRow, ...]:
    """As the scheduler orders a plan."""
    return tuple(sorted(rows, key=lambda row: row.request.slots))


def request(number: int, length: int, slot: int | None, scale: float = 1.0) -> Request:
    """Of random tokens, with four pages of its own, not in order."""
    random = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, 320, (length,), generator=random).tolist()
    made = Request(f"r{number}", tokens, SamplingParams(temperature=0.0))
    if slot is not None:
        made.adapters, made.slots = (AdapterUse(AdapterRef("a", str(slot)), scale),), (slot,)
    made.pages = [4 * number + i for i in (2, 0, 3, 1)]
    return made


def last_token(row: Request) -> ScheduledRow:
    return ScheduledRow(row, row.num_tokens - 1, 1)
