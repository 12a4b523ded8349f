"""Several scaled adapters on one row, on a small real decoder: against a model whose weights hold the deltas' sum.

The model in float64 (transformers) is the truth. Both sides multiply with the same dequantised weights, so ours differs
by its fp32 rounding alone. **The bound**: the longest sums have 192 terms in one chain, each rounded by at most 2^-24
of what it has reached; errors of random sign grow with the square root of their number, which makes 14 x 2^-24 for one
product, and two layers of four products in a row, with adapters beside each, add up some 16 such errors: sqrt(16) x 14
= 56 roundings of the largest logit. Doubled for the maximum over thousands of logits: 112. A wrong scale or a lost
delta is off by a hundredth of the logits and more, three orders above.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import pytest
import torch
from transformers import LlamaForCausalLM

from manylora.adapters.versions import AdapterRef
from manylora.kernels.cpu import available
from manylora.kernels.lora import BatchedLora
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_weights import LoraVectors
from manylora.kernels.ops import Ops
from manylora.kernels.torch_ops import TorchOps
from manylora.server.engine.batch import build_batch
from manylora.server.engine.request import AdapterUse, Request, SamplingParams, ScheduledRow, StepPlan
from manylora.server.model.decoder import Decoder
from manylora.server.model.decoder_weights import DecoderWeights
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.synthetic import synthetic_adapter, synthetic_base, synthetic_spec
from tests.model.merged_model import double_model

SPEC: Final = synthetic_spec("tiny")
SHAPES: Final = SPEC.lora_shapes()
BOUND: Final = 112 * 2.0**-24


def biases(seed: int, *modules: tuple[str, int]) -> dict[tuple[str, int], LoraVectors]:
    random = torch.Generator().manual_seed(seed)
    return {at: LoraVectors(bias=0.3 * torch.randn(SHAPES.out_features[at[0]], generator=random)) for at in modules}


ADAPTERS: Final = {
    "a": replace(synthetic_adapter(SHAPES, 4, seed=1), vectors=biases(4, ("q", 0), ("down", 1))),
    "b": replace(
        synthetic_adapter(SHAPES, 20, seed=2, projections=("q", "o", "up", "down", "lm_head")),
        vectors=biases(5, ("q", 0), ("down", 1), ("gate", 1)),
    ),
    "c": synthetic_adapter(SHAPES, 1, seed=3, projections=("v", "gate", "embed")),
}
REFS: Final = {name: AdapterRef(name, char * 64) for name, char in zip("abc", "5a0", strict=True)}
"""Versions in another order than names and slots."""

Uses = list[tuple[str, float]]
COMPOSITIONS: Final[list[Uses]] = [
    [],
    [("a", 1.0)],
    [("a", 0.5)],
    [("b", -2.0)],
    [("a", 0.7), ("b", 0.3)],
    [("b", 0.3), ("a", 0.7)],
    [("a", 1.0), ("b", 1.0), ("c", 1.0)],
    [("c", -1.5), ("b", 0.25)],
    [("c", 3.0)],
    [("a", 0.5), ("b", 0.0)],
]


class Server:
    """The decoder and its cache, with the adapters in the slots of ``places``."""

    def __init__(self, ops: Ops, places: str = "ab-c") -> None:
        self.pool = LoraPool(SHAPES, max_slots=4, max_pages=8, max_rank=32, device=ops.device)
        self.slots = {name: slot for slot, name in enumerate(places) if name != "-"}
        for name, slot in self.slots.items():
            self.pool.write(slot, ADAPTERS[name])
        weights = DecoderWeights.prepare(SPEC, synthetic_base(SPEC), ops, max_context=128)
        self.decoder = Decoder(SPEC, weights, ops, BatchedLora(self.pool))
        self.cache = KVCache(SPEC, 4 * len(COMPOSITIONS), ops)

    def request(self, number: int, uses: Uses) -> Request:
        tokens = torch.randint(0, SPEC.vocab_size, (9 + number,), generator=torch.Generator().manual_seed(7)).tolist()
        made = Request(f"r{number}", tokens, SamplingParams())
        made.adapters = tuple(AdapterUse(REFS[name], scale) for name, scale in uses)
        made.slots = tuple(self.slots[name] for name, _ in uses)
        made.pages = [4 * number + i for i in (2, 0, 3, 1)]
        return made

    @torch.inference_mode()
    def step(self, rows: Sequence[ScheduledRow]) -> dict[str, torch.Tensor]:
        rows = sorted(rows, key=lambda row: row.request.slots)
        logits = self.decoder.forward(build_batch(StepPlan(tuple(rows))), self.cache)
        return dict(zip((row.request.request_id for row in rows if row.sample), logits, strict=True))

    def run(self, requests: Sequence[Request], chunk: int = 100) -> list[torch.Tensor]:
        """Logits ``[2, vocab]`` of each: of its prompt, in chunks, and of token 5 after it."""
        seen: dict[str, list[torch.Tensor]] = {r.request_id: [] for r in requests}
        for start in range(0, max(len(r.prompt_token_ids) for r in requests), chunk):
            rows = [
                ScheduledRow(r, start, min(chunk, len(r.prompt_token_ids) - start))
                for r in requests
                if start < len(r.prompt_token_ids)
            ]
            for name, logits in self.step(rows).items():
                seen[name].append(logits)
        for r in requests:
            r.output_token_ids = [5]
        for name, logits in self.step([ScheduledRow(r, r.num_tokens - 1, 1) for r in requests]).items():
            seen[name].append(logits)
        return [torch.stack(seen[r.request_id]) for r in requests]

    def of(self, compositions: Sequence[Uses], chunk: int = 100) -> list[torch.Tensor]:
        return self.run([self.request(i, uses) for i, uses in enumerate(compositions)], chunk)


def implementations() -> list[str]:
    return ["torch", "cpu"] if available() else ["torch"]


@pytest.fixture(params=implementations())
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "torch":
        return TorchOps(torch.device("cpu"), torch.float32, resident=True)
    from manylora.kernels.cpu.ops import NumbaOps

    return NumbaOps("fp32")


def merged(uses: Uses) -> LlamaForCausalLM:
    """The base with ``sum of scale * B A`` added to its weights, in float64."""
    base = synthetic_base(SPEC)

    def delta(projection: str, layer: int) -> torch.Tensor | float:
        pairs = [(scale, ADAPTERS[name].pairs.get((projection, layer))) for name, scale in uses]
        return sum(
            scale * pair.scale * (pair.b.double() @ pair.a.double()) for scale, pair in pairs if pair is not None
        )

    def table(name: str) -> torch.Tensor:
        found = delta(name, 0)
        # The embedding's A has a column for each token: its delta lies transposed.
        return (base.embed if name == "embed" else base.output_embedding).double() + (
            found.T if name == "embed" and isinstance(found, torch.Tensor) else found
        )

    added: dict[tuple[str, int], torch.Tensor] = defaultdict(lambda: torch.zeros(()))
    for name, scale in uses:
        for at, vectors in ADAPTERS[name].vectors.items():
            added[at] = added[at] + scale * vectors.bias
    return double_model(
        SPEC, base, lambda p, layer: base.projections[p, layer].dequantize().double() + delta(p, layer), table, added
    )


def test_logits_are_those_of_the_summed_deltas(ops: Ops) -> None:
    """Mixed with one another in every step, prompts in chunks and decoding."""
    server = Server(ops)
    for number, (uses, logits) in enumerate(zip(COMPOSITIONS, server.of(COMPOSITIONS, chunk=4), strict=True)):
        tokens = [*server.request(number, uses).prompt_token_ids, 5]
        with torch.inference_mode():
            exact = merged(uses)(torch.tensor([tokens])).logits[0, -2:]
        assert float((logits.double() - exact).abs().max()) <= BOUND * float(exact.abs().max()), uses


def test_compositions_differ_by_far_more_than_the_bound(ops: Ops) -> None:
    """The comparison above would be empty if deltas were lost on both sides. One prompt for all."""
    server = Server(ops)
    requests = [server.request(0, uses) for uses in COMPOSITIONS]
    logits = []
    for r in requests:
        logits += server.run([r])
    for i, one in enumerate(COMPOSITIONS):
        for j, other in enumerate(COMPOSITIONS[:i]):
            is_same = sorted(use for use in one if use[1]) == sorted(use for use in other if use[1])
            assert torch.equal(logits[i], logits[j]) == is_same
            if not is_same:
                assert float((logits[i] - logits[j]).abs().max()) > 100 * BOUND * float(logits[i].abs().max())


@pytest.fixture
def exact_ops(ops: Ops) -> Ops:
    """Operations whose rows do not depend on each other."""
    if isinstance(ops, TorchOps):
        pytest.skip("the bits of torch's products depend on the number of rows")
    return ops


def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_chunks(exact_ops: Ops) -> None:
    server = Server(exact_ops)
    together = server.of(COMPOSITIONS)
    for number, uses in enumerate(COMPOSITIONS):
        [alone] = server.run([server.request(number, uses)])
        assert torch.equal(alone, together[number]), uses
    for uses, one, other in zip(COMPOSITIONS, together, server.of(COMPOSITIONS, chunk=3), strict=True):
        assert torch.equal(one, other), uses


def test_bits_do_not_depend_on_the_slots(exact_ops: Ops) -> None:
    """A request that was preempted may come back to other slots, and must go on with the same numbers."""
    first = Server(exact_ops, "ab-c").of(COMPOSITIONS)
    for places in ("c-ba", "bca", "-acb"):
        for uses, one, other in zip(COMPOSITIONS, first, Server(exact_ops, places).of(COMPOSITIONS), strict=True):
            assert torch.equal(one, other), (places, uses)


def test_scale_0_is_the_base_to_the_bit(ops: Ops) -> None:
    server = Server(ops)
    base, none, both = (server.run([server.request(0, uses)])[0] for uses in ([], [("a", 0.0)], [("c", 0.0), ("b", 0)]))
    assert torch.equal(base, none)
    assert torch.equal(base, both)


def test_one_version_by_two_names_has_the_sum_of_the_scales(ops: Ops) -> None:
    server = Server(ops)
    twice = server.request(0, [("a", 0.5), ("a", 0.25)])
    twice.adapters = (twice.adapters[0], AdapterUse(AdapterRef("another name", REFS["a"].version), 0.25))
    gone = server.request(0, [("a", 0.5), ("a", -0.5)])
    [sum_of_both], [single] = server.run([twice]), server.run([server.request(0, [("a", 0.75)])])
    assert torch.equal(sum_of_both, single)
    assert torch.equal(server.run([gone])[0], server.run([server.request(0, [])])[0])
