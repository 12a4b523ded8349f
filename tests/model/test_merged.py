"""A merged model against float64: its weights one by one, then its logits; what it shares with the base; its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from manylora.kernels.lora_weights import LoraPair, LoraVectors, LoraWeights
from manylora.kernels.ops import Ops
from manylora.kernels.sites import LAYER_PROJECTIONS
from manylora.kernels.torch_ops import TorchOps
from manylora.server.model.decoder import Decoder
from manylora.server.model.decoder_weights import DecoderWeights
from manylora.server.model.families import ModelSpec
from manylora.server.model.merged import CannotMerge, MergeMode, merge_adapter, merge_size, own_bytes
from manylora.server.model.synthetic import synthetic_adapter, synthetic_spec
from manylora.server.model.weights import BaseWeights
from tests.kernels.test_prepared_linear import OPS
from tests.model.merged_model import BIASES, PLAIN, double_model, full_adapter, logits, make_decoder, with_weights

TOKENS = [3, 17, 200, 5, 5, 31, 319, 0, 44, 18, 101, 250, 17, 9, 60, 61, 62]  # more than a page
FP32_ROUNDINGS = 200 * 2.0**-24
"""Of the largest logit, after two layers of sums of up to 192 terms; measured: a tenth of it."""
BF16 = 2.0**-8
"""Half of the distance between neighbours is 2^-9 of the smaller at most."""


@pytest.fixture(params=OPS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return OPS[request.param]()


def exact_weight(decoder: Decoder, adapter: LoraWeights, p: str, layer: int) -> torch.Tensor:
    """``gain * W + s B A`` in float64, of the values that the base computes with."""
    weight = decoder.weight(p, layer).double()
    vectors, pair = adapter.vectors.get((p, layer)), adapter.pairs.get((p, layer))
    if vectors is not None and vectors.gain is not None:
        weight = vectors.gain.double()[:, None] * weight
    return weight if pair is None else weight + pair.scale * (pair.b.double() @ pair.a.double())


def exact_biases(base: BaseWeights, adapter: LoraWeights) -> dict[tuple[str, int], torch.Tensor]:
    biases = {module: bias.double() for module, bias in base.biases.items()}
    for module, vectors in adapter.vectors.items():
        if vectors.bias is not None:
            biases[module] = biases.get(module, torch.zeros(())) + vectors.bias.double()
    return biases


@pytest.mark.parametrize("spec", [PLAIN, BIASES], ids=["plain", "biases, tied"])
def test_exact_weights_are_the_merged_ones_rounded_once(ops: Ops, spec: ModelSpec) -> None:
    _, decoder = make_decoder(spec, ops)
    adapter = full_adapter(spec)
    merged = with_weights(decoder, merge_adapter(decoder, adapter, "exact"))
    for layer in range(spec.n_layers):
        for p in LAYER_PROJECTIONS:
            exact, got = exact_weight(decoder, adapter, p, layer), merged.weight(p, layer)
            if (p, layer) in adapter.pairs or (p, layer) == ("k", 0):
                assert ((got - exact).abs() <= BF16 * exact.abs() + 1e-7).all(), (p, layer)
                assert not torch.equal(got, decoder.weight(p, layer))
            else:
                assert torch.equal(got, decoder.weight(p, layer)), f"{p} of layer {layer} is nobody's business"
    rows = adapter.tables["embed"]
    table = merged.table("embed")
    assert torch.equal(table[rows.ids], rows.rows.bfloat16().float())
    others = torch.ones(spec.vocab_size, dtype=torch.bool).index_fill(0, rows.ids, False)
    assert torch.equal(table[others], decoder.table("embed")[others])
    pair = adapter.pairs["lm_head", 0]
    head = decoder.table("lm_head").double() + pair.scale * (pair.b.double() @ pair.a.double())
    assert ((merged.table("lm_head") - head).abs() <= BF16 * head.abs() + 1e-7).all()


@pytest.mark.parametrize(
    ("which", "with_biases", "mode"),
    [
        *product(("numba", "torch", "torch resident"), (False, True), ("exact", "compact")),
        ("cuda", True, "exact"),
        ("cuda", False, "compact"),
    ],
)
def test_logits_are_those_of_the_merged_model(which: str, with_biases: bool, mode: MergeMode) -> None:
    """Against float64 with the very weights that the merged decoder says it computes with."""
    spec, ops = BIASES if with_biases else PLAIN, OPS[which]()
    base, decoder = make_decoder(spec, ops)
    adapter = full_adapter(spec)
    before = logits(decoder, TOKENS)
    merged = with_weights(decoder, merge_adapter(decoder, adapter, mode))
    model = double_model(spec, base, merged.weight, merged.table, exact_biases(base, adapter))
    head_bias = adapter.vectors["lm_head", 0].bias
    assert head_bias is not None
    with torch.no_grad():
        exact = model(torch.tensor([TOKENS])).logits[0] + head_bias.double()
    got = logits(merged, TOKENS)
    assert (got - exact).abs().max() <= FP32_ROUNDINGS * exact.abs().max()
    assert (got - before).abs().max() > 0.1 * before.abs().max(), "the adapter does nothing"
    assert torch.equal(logits(decoder, TOKENS), before), "the base has changed"


@pytest.mark.parametrize("which", ["numba", "torch"])
def test_merged_logits_are_those_of_the_adapter_but_for_the_rounding(which: str) -> None:
    """Exact mode against float64 of weights never rounded: off by what 16 bits cost, far less than compact."""
    base, decoder = make_decoder(PLAIN, OPS[which]())
    adapter = full_adapter(PLAIN)
    exact_table = {"embed": decoder.table("embed").double(), "lm_head": decoder.table("lm_head").double()}
    exact_table["embed"][adapter.tables["embed"].ids] = adapter.tables["embed"].rows.double()
    pair = adapter.pairs["lm_head", 0]
    exact_table["lm_head"] += pair.scale * (pair.b.double() @ pair.a.double())

    def weight(p: str, layer: int) -> torch.Tensor:
        return exact_weight(decoder, adapter, p, layer)

    model = double_model(PLAIN, base, weight, exact_table.__getitem__, exact_biases(base, adapter))
    head_bias = adapter.vectors["lm_head", 0].bias
    assert head_bias is not None
    with torch.no_grad():
        exact = model(torch.tensor([TOKENS])).logits[0] + head_bias.double()
    off = {}
    for mode in ("exact", "compact"):
        merged = with_weights(decoder, merge_adapter(decoder, adapter, mode))  # type: ignore[arg-type]
        off[mode] = float((logits(merged, TOKENS) - exact).abs().max() / exact.abs().max())
    assert off["exact"] < 0.02, "seven roundings of 2^-9 a layer, of random sign"
    assert off["compact"] > 3 * off["exact"]
    assert off["compact"] < 0.5


@pytest.mark.parametrize("which", ["numba", "cuda"])
def test_compact_weights_are_requantised(which: str) -> None:
    ops = OPS[which]()
    _, decoder = make_decoder(PLAIN, ops)
    adapter = full_adapter(PLAIN)
    merged = with_weights(decoder, merge_adapter(decoder, adapter, "compact"))
    for p in ("v", "gate", "down"):
        exact = exact_weight(decoder, adapter, p, 1)
        got = merged.weight(p, 1)
        # The widest gap between NF4's codes is 0.304 of a block's largest value, whose scale is rounded to 8 bits.
        largest = exact.abs().view(-1, 64).amax(1).repeat_interleave(64).view_as(exact)
        assert ((got - exact).abs() <= 0.33 * largest).all()
        # Along the delta nothing is lost but noise: of 8192 weights and more, of which it is a tenth.
        delta = exact - decoder.weight(p, 1)
        assert abs(float(((got - exact) * delta).sum() / delta.square().sum())) < 0.1
    assert torch.equal(merged.weight("o", 0), decoder.weight("o", 0))


@pytest.mark.parametrize("mode", ["exact", "compact"])
def test_what_has_no_delta_is_shared(ops: Ops, mode: MergeMode) -> None:
    _, decoder = make_decoder(PLAIN, ops)
    pairs = synthetic_adapter(PLAIN.lora_shapes(), 4, projections=("v",)).pairs
    merged = merge_adapter(decoder, LoraWeights({("v", 1): pairs["v", 1]}), mode)
    base = decoder.weights
    assert merged.layers[0].sites["qkv"] is base.layers[0].sites["qkv"]
    assert all(merged.layers[1].sites[site] is base.layers[1].sites[site] for site in ("o", "gate_up", "down"))
    assert merged.layers[1].sites["qkv"] is not base.layers[1].sites["qkv"]
    assert merged.embedding is base.embedding
    assert merged.head is base.head
    assert merged.rope is base.rope
    assert merged.final_norm is base.final_norm


@pytest.mark.parametrize("mode", ["exact", "compact"])
@pytest.mark.parametrize("what", ["full", "v", "all", "embed", "bias"])
def test_the_bytes_stated_are_the_bytes_kept(ops: Ops, mode: MergeMode, what: str) -> None:
    _, decoder = make_decoder(PLAIN, ops)
    shapes = PLAIN.lora_shapes()
    adapter = {
        "full": full_adapter(PLAIN),
        "v": synthetic_adapter(shapes, 4, projections=("v",)),
        "all": synthetic_adapter(shapes, 4),
        "embed": synthetic_adapter(shapes, 4, projections=("embed",)),
        "bias": LoraWeights({}, {("q", 0): LoraVectors(bias=torch.ones(shapes.out_features["q"]))}),
    }[what]
    stated = merge_size(decoder, adapter, mode)
    kept = own_bytes(merge_adapter(decoder, adapter, mode), decoder.weights)
    if ops.name == "torch":  # it copies what it fuses
        assert kept <= stated.kept + decoder.nbytes
    else:
        assert kept <= stated.kept
        if what in ("all", "embed"):  # the scales' own tables weigh something beside so few weights
            assert stated.kept <= 1.1 * kept + 4096 * 4 * PLAIN.n_layers
    if mode == "exact" and what == "all":
        weights = sum(shapes.in_features[p] * shapes.out_features[p] for p in LAYER_PROJECTIONS) * PLAIN.n_layers
        assert stated.kept == weights * ops.dense_itemsize
    assert (stated.working > 0) is (what != "bias")


def digest(weights: DecoderWeights) -> str:
    """Over every byte that the base is computed with."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, tuple | list):
            for one in value:
                add(one)
        elif hasattr(value, "__dataclass_fields__"):
            for name in sorted(value.__dataclass_fields__):
                add(getattr(value, name))
        elif isinstance(value, dict):
            for name in sorted(value):
                add(value[name])

    add(weights)
    return found.hexdigest()


@pytest.mark.parametrize("mode", ["exact", "compact"])
def test_the_base_keeps_its_bytes(ops: Ops, mode: MergeMode) -> None:
    _, decoder = make_decoder(BIASES, ops)
    before = digest(decoder.weights)
    merged = merge_adapter(decoder, full_adapter(BIASES), mode)
    assert digest(decoder.weights) == before
    assert digest(merged) != before


def test_values_that_are_not_finite_are_refused_with_their_module() -> None:
    ops = OPS["torch"]()
    _, decoder = make_decoder(PLAIN, ops)
    shapes = PLAIN.lora_shapes()
    a, b = torch.full((1, shapes.in_features["up"]), 1e30), torch.full((shapes.out_features["up"], 1), 1e30)
    with pytest.raises(CannotMerge, match=r"`up` of layer 1: the merged values are not all finite"):
        merge_adapter(decoder, LoraWeights({("up", 1): LoraPair(a, b, 1.0)}), "exact")
    table = LoraPair(torch.full((1, shapes.in_features["embed"]), 1e30), torch.full((128, 1), 1e30), 1.0)
    with pytest.raises(CannotMerge, match="`embed`: the merged values"):
        merge_adapter(decoder, LoraWeights({("embed", 0): table}), "exact")


def test_a_type_that_overflows_is_refused() -> None:
    decoder = make_decoder(PLAIN, TorchOps("cpu", torch.float16, resident=True))[1]
    shapes = PLAIN.lora_shapes()
    pair = LoraPair(
        torch.full((1, shapes.in_features["o"]), 300.0), torch.full((shapes.out_features["o"], 1), 300.0), 1
    )
    with pytest.raises(CannotMerge, match=r"`o` of layer 0: merged values above 65504 do not fit into torch.float16"):
        merge_adapter(decoder, LoraWeights({("o", 0): pair}), "exact")


def test_compact_needs_whole_blocks() -> None:
    spec = synthetic_spec("tiny", hidden_size=96, num_attention_heads=2, num_key_value_heads=2)
    make: Callable[[], Ops] = lambda: TorchOps("cpu", torch.float32, resident=True)  # noqa: E731
    decoder = make_decoder(spec, make())[1]
    adapter = synthetic_adapter(spec.lora_shapes(), 2, projections=("q",))
    with pytest.raises(
        CannotMerge, match=r"`q` of layer 0: its rows of 96 are not whole NF4 blocks of 64; use mode exact"
    ):
        merge_adapter(decoder, adapter, "compact")
    merged = with_weights(decoder, merge_adapter(decoder, adapter, "exact"))
    assert not torch.equal(merged.weight("q", 0), decoder.weight("q", 0))


def test_an_embedding_with_gain_and_bias(ops: Ops) -> None:
    _, decoder = make_decoder(BIASES, ops)
    pairs = synthetic_adapter(BIASES.lora_shapes(), 4, seed=3, projections=("embed",)).pairs
    gain, bias = 1 + 0.1 * torch.randn(128), torch.randn(128)
    adapter = LoraWeights(pairs, {("embed", 0): LoraVectors(gain, bias)})
    merged = with_weights(decoder, merge_adapter(decoder, adapter, "compact"))
    pair = pairs["embed", 0]
    exact = decoder.table("embed").double() * gain + pair.scale * (pair.b.double() @ pair.a.double()).T + bias
    assert ((merged.table("embed") - exact).abs() <= BF16 * exact.abs() + 1e-6).all()
    assert torch.equal(merged.table("lm_head"), decoder.table("lm_head")), "the output layer is the base's embedding"
    assert not merged.tied
    assert decoder.tied


def test_base_model_gives_copies() -> None:
    base, decoder = make_decoder(BIASES, OPS["numba"]())
    for p in LAYER_PROJECTIONS:
        assert torch.equal(decoder.weight(p, 1), base.projections[p, 1].dequantize())
        bias = decoder.bias(p, 1)
        assert bias is not None
        assert torch.equal(bias, base.biases[p, 1].float())
        bias.zero_()
        decoder.weight(p, 1).zero_()
        assert torch.equal(decoder.weight(p, 1), base.projections[p, 1].dequantize())
        again = decoder.bias(p, 1)
        assert again is not None
        assert again.any()
    decoder.table("embed").zero_()
    assert torch.equal(decoder.table("embed"), base.embed.float())
    assert torch.equal(decoder.table("lm_head"), base.embed.float())
    assert make_decoder(PLAIN, OPS["numba"]())[1].bias("q", 0) is None
