"""Which positions of x are found large in every row, and what becomes of them when adapters are merged."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from manylora.kernels.cpu import available
from manylora.kernels.ops import Ops
from manylora.kernels.torch_ops import TorchOps
from manylora.server.model import exact_inputs
from manylora.server.model.decoder import Decoder
from manylora.server.model.decoder_weights import DecoderWeights
from manylora.server.model.exact_inputs import input_magnitudes, with_exact_inputs
from manylora.server.model.families import ModelSpec
from manylora.server.model.merged import MergeMode, merge_adapter
from manylora.server.model.synthetic import synthetic_adapter, synthetic_base, synthetic_spec
from manylora.server.model.weights import BaseWeights
from tests.model.merged_model import full_adapter, logits

if not available():
    pytest.skip("no AVX2 and FMA here", allow_module_level=True)

from manylora.kernels.cpu.ops import NumbaOps

SPEC = synthetic_spec("tiny")
LARGE = torch.tensor([2, 5, 17, 30, 31, 40, 56, 63])
TOKENS = [3, 17, 200, 5, 5, 31, 319, 0, 44, 18, 101, 250, 17, 9, 60, 61, 62]


@pytest.fixture(scope="module")
def ops() -> Ops:
    return NumbaOps("int8")


def base(spec: ModelSpec = SPEC) -> BaseWeights:
    """A model whose norms make some positions large in every row."""
    made = synthetic_base(spec)
    for norm in (*made.input_norms, *made.post_attention_norms, made.final_norm):
        norm[LARGE] = 40.0
    return made


def prepared(ops: Ops, spec: ModelSpec = SPEC, weights: BaseWeights | None = None, context: int = 64) -> DecoderWeights:
    return DecoderWeights.prepare(spec, weights or base(spec), ops, max_context=context)


def decoded(weights: DecoderWeights, ops: Ops, spec: ModelSpec = SPEC) -> torch.Tensor:
    return logits(Decoder(spec, weights, ops, None), TOKENS)


def test_the_large_positions_are_found(ops: Ops) -> None:
    weights = with_exact_inputs(SPEC, prepared(ops), ops)
    for layer in weights.layers:
        assert layer.exact.keys() == {"qkv", "gate_up", "down"}
        assert torch.equal(layer.exact["qkv"], LARGE)
        assert torch.equal(layer.exact["gate_up"], LARGE)
        assert len(layer.exact["down"].unique()) == ops.exact_inputs
        assert layer.sites["o"].exact is None
        assert all(layer.sites[site].exact is not None for site in layer.exact)
    assert weights.exact_head is not None
    assert torch.equal(weights.exact_head, LARGE)
    assert weights.head.exact is not None
    assert weights.tied == prepared(ops).tied


def test_magnitudes_are_those_of_the_same_model_in_torch(ops: Ops) -> None:
    plain = TorchOps("cpu", torch.float32, resident=True)
    ours, theirs = (
        input_magnitudes(SPEC, prepared(one, weights=synthetic_base(SPEC)), one) for one in (ops, plain)
    )  # fmt: skip
    assert ours.keys() == theirs.keys()
    for place, found in theirs.items():
        off = abs(ours[place] - found).max() / found.max()
        assert off < 0.05, (place, off)
    assert len(ours) == 3 * SPEC.n_layers + 1


def test_the_answers_come_nearer_to_those_in_fp32(ops: Ops) -> None:
    plain = TorchOps("cpu", torch.float32, resident=True)
    expected, weights = decoded(prepared(plain), plain), prepared(ops)
    before = (decoded(weights, ops) - expected).norm()
    assert (decoded(with_exact_inputs(SPEC, weights, ops), ops) - expected).norm() < 0.5 * before


def test_they_are_the_same_ones_each_time_whatever_ran_before(ops: Ops) -> None:
    first = with_exact_inputs(SPEC, prepared(ops), ops)
    decoded(first, ops)
    torch.manual_seed(99)
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        again = with_exact_inputs(SPEC, prepared(ops), ops)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(first.layers, again.layers, strict=True):
        assert all(torch.equal(one.exact[site], other.exact[site]) for site in one.exact)
    assert torch.equal(decoded(first, ops), decoded(again, ops))


def test_equal_magnitudes_give_the_first_positions(ops: Ops) -> None:
    made = synthetic_base(SPEC)
    for norm in made.input_norms:
        norm.zero_()
    assert with_exact_inputs(SPEC, prepared(ops, weights=made), ops).layers[0].exact["qkv"].tolist() == list(range(8))


@pytest.mark.parametrize("arithmetic", ["int16", "fp32", "torch"])
def test_other_operations_need_none(arithmetic: Any) -> None:
    other = TorchOps("cpu", torch.float32, resident=True) if arithmetic == "torch" else NumbaOps(arithmetic)
    weights = prepared(other)
    assert with_exact_inputs(SPEC, weights, other) is weights


@pytest.mark.parametrize("context", [1, 17])
def test_a_context_shorter_than_the_tokens_is_enough(
    ops: Ops, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """As many tokens are taken as it has. One may have some of the other positions larger."""
    short = prepared(ops, context=context)
    found = with_exact_inputs(SPEC, short, ops).layers[0].exact["qkv"]
    assert len(found.unique()) == len(LARGE)
    assert torch.isin(found, LARGE).sum() >= (6 if context == 1 else 8)
    few = input_magnitudes(SPEC, short, ops)
    monkeypatch.setattr(exact_inputs, "TOKENS", context)
    expected = input_magnitudes(SPEC, prepared(ops), ops)
    assert all((few[place] == expected[place]).all() for place in expected)


def test_values_that_are_not_finite_leave_a_site_as_it_is(ops: Ops, caplog: pytest.LogCaptureFixture) -> None:
    made = base()
    made.post_attention_norms[-1][7] = torch.inf
    with caplog.at_level(logging.INFO):
        weights = with_exact_inputs(SPEC, prepared(ops, weights=made), ops)
    assert weights.layers[-1].exact.keys() == {"qkv"}
    assert weights.layers[0].exact.keys() == {"qkv", "gate_up", "down"}
    assert weights.exact_head is None
    assert weights.head.exact is None
    total = 3 * SPEC.n_layers + 1
    assert f"3 of {total} products are given values that are not finite" in caplog.text
    assert f"{total - 3} products take the 8 largest positions of their inputs exactly" in caplog.text


@pytest.mark.parametrize(
    "spec",
    [
        synthetic_spec("tiny", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        replace(SPEC, embed_scale=8.0, logit_softcap=30.0),
    ],
    ids=["biases, tied", "scaled"],
)  # fmt: skip
def test_other_kinds_of_model(ops: Ops, spec: ModelSpec) -> None:
    weights = with_exact_inputs(spec, prepared(ops, spec), ops)
    assert torch.equal(weights.layers[0].exact["qkv"], LARGE)
    assert weights.tied == spec.tie_embeddings
    assert weights.head.exact is not None
    assert torch.isfinite(decoded(weights, ops, spec)).all()


@pytest.mark.parametrize("mode", ["exact", "compact"])
def test_merged_models_keep_them_and_the_base_its_bits(ops: Ops, mode: MergeMode) -> None:
    weights = with_exact_inputs(SPEC, prepared(ops), ops)
    decoder, before = Decoder(SPEC, weights, ops, None), decoded(weights, ops)
    one = merge_adapter(decoder, synthetic_adapter(SPEC.lora_shapes(), 4, projections=("q", "down")), mode)
    decoded(one, ops)
    for of_base, merged in zip(weights.layers, one.layers, strict=True):
        assert all(merged.sites[site] is of_base.sites[site] for site in ("o", "gate_up"))
        assert merged.exact.keys() == of_base.exact.keys()
        for site in ("qkv", "down"):
            for part in getattr(merged.sites[site], "parts", [merged.sites[site]]):
                if hasattr(part, "packed"):
                    assert torch.equal(part.exact, of_base.sites[site].exact)
    assert torch.equal(decoded(weights, ops), before)


def test_a_merged_output_layer_keeps_them(ops: Ops) -> None:
    weights = with_exact_inputs(SPEC, prepared(ops), ops)
    merged = merge_adapter(Decoder(SPEC, weights, ops, None), full_adapter(SPEC), "exact")
    assert merged.head is not weights.head
    assert torch.equal(merged.head.exact, weights.head.exact)


@pytest.mark.parametrize(("mode", "within"), [("exact", 0.95), ("compact", 0.7)])
def test_a_merged_model_is_nearer_to_its_own_in_fp32(ops: Ops, mode: MergeMode, within: float) -> None:
    """Exactly merged parts are bf16, and q is here; k and v beside it stay in 8 bits. Compact ones are NF4 again."""
    adapter = full_adapter(SPEC) if mode == "compact" else synthetic_adapter(SPEC.lora_shapes(), 4, projections=("q",))
    plain = TorchOps("cpu", torch.float32, resident=True)
    expected = decoded(merge_adapter(Decoder(SPEC, prepared(plain), plain, None), adapter, mode), plain)
    off = []
    for weights in (prepared(ops), with_exact_inputs(SPEC, prepared(ops), ops)):
        merged = merge_adapter(Decoder(SPEC, weights, ops, None), adapter, mode)
        off.append(float((decoded(merged, ops) - expected).norm()))
    assert off[1] < within * off[0], off
