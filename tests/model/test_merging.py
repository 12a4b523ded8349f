"""Folding an adapter into weights: the maths against float64 and against PEFT's own merge; nothing is written to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from manylora.kernels.lora_weights import LoraPair, LoraVectors, TableRows
from manylora.server.model.merging import merge_bias, merge_embedding, merge_table, merge_weight

N, K, RANK = 48, 32, 5


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _pair(n: int = N, k: int = K, scale: float = 0.7) -> LoraPair:
    return LoraPair(a=_random(RANK, k, seed=1), b=_random(n, RANK, seed=2), scale=scale)


def _vectors() -> LoraVectors:
    return LoraVectors(gain=_random(N, seed=3) + 2, bias=_random(N, seed=4))


@pytest.mark.parametrize("with_pair", [True, False])
@pytest.mark.parametrize("with_gain", [True, False])
def test_merged_weight_is_gain_w_plus_scaled_b_a(with_pair: bool, with_gain: bool) -> None:
    weight, pair, vectors = _random(N, K), _pair() if with_pair else None, _vectors() if with_gain else None
    exact = weight.double()
    if vectors is not None and vectors.gain is not None:
        exact = exact * vectors.gain.double()[:, None]
    if pair is not None:
        exact = exact + pair.scale * pair.b.double() @ pair.a.double()
    merged = merge_weight(weight, pair, vectors)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), exact, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_16_bit_weight_is_widened_before_the_sum(dtype: torch.dtype) -> None:
    weight = _random(N, K).to(dtype)
    assert torch.equal(merge_weight(weight, _pair()), merge_weight(weight.float(), _pair()))


def test_nothing_given_is_written_to_nor_shared() -> None:
    weight, pair, vectors, bias = _random(N, K), _pair(), _vectors(), _random(N)
    table, rows = _random(10, K), TableRows(torch.tensor([1, 4]), _random(2, K, seed=9))
    given = [weight, pair.a, pair.b, vectors.gain, vectors.bias, bias, table, rows.rows]
    before = [tensor.clone() for tensor in given if tensor is not None]
    results = [
        merge_weight(weight, None),
        merge_weight(weight, pair, vectors),
        merge_weight(weight, None, vectors),
        merge_bias(bias, None),
        merge_bias(bias, vectors),
        merge_bias(None, vectors),
        merge_table(table, None),
        merge_table(table, rows),
        merge_embedding(table, None),
    ]
    for result in results:
        assert result is not None
        result.zero_()
    assert all(torch.equal(old, new) for old, new in zip(before, given, strict=True) if new is not None)


def test_biases_add_up_and_absent_ones_stay_absent() -> None:
    bias, vectors = _random(N).bfloat16(), _vectors()
    merged = merge_bias(bias, vectors)
    assert merged is not None
    assert vectors.bias is not None
    assert torch.equal(merged, bias.float() + vectors.bias)
    assert merge_bias(None, LoraVectors(gain=torch.ones(N))) is None
    alone = merge_bias(None, vectors)
    assert alone is not None
    assert torch.equal(alone, vectors.bias)


def test_rows_of_a_table_are_replaced_and_the_others_keep_their_bits() -> None:
    table = _random(10, K).bfloat16()
    rows = TableRows(torch.tensor([0, 3, 9]), _random(3, K, seed=9))
    merged = merge_table(table, rows)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged[rows.ids], rows.rows.bfloat16())
    others = [i for i in range(10) if i not in (0, 3, 9)]
    assert torch.equal(merged[others], table[others])


@pytest.mark.parametrize("with_gain", [True, False])
def test_merged_embedding_is_the_merged_weight_transposed(with_gain: bool) -> None:
    vocab, hidden = 96, N
    table, pair = _random(vocab, hidden), _pair(n=hidden, k=vocab)
    vectors = LoraVectors(gain=_random(hidden, seed=3) + 2) if with_gain else None
    merged = merge_embedding(table, pair, vectors)
    assert merged.is_contiguous()
    torch.testing.assert_close(merged, merge_weight(table.T, pair, vectors).T, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("broken", ["a", "b", "weight", "gain", "bias", "rows"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(broken: str, value: float) -> None:
    weight, pair, vectors = _random(N, K), _pair(), _vectors()
    table, rows = _random(10, K), TableRows(torch.tensor([2]), _random(1, K))
    tensors = {"a": pair.a, "b": pair.b, "weight": weight, "gain": vectors.gain, "bias": vectors.bias}
    target = (tensors | {"rows": rows.rows})[broken]
    assert target is not None
    target.view(-1)[3] = value
    merge: Callable[[], object] = partial(merge_weight, weight, pair, vectors)
    if broken in ("bias", "rows"):
        merge = partial(merge_bias, None, vectors) if broken == "bias" else partial(merge_table, table, rows)
    with pytest.raises(ValueError, match="not all finite"):
        merge()


def test_an_overflow_of_the_sum_is_refused() -> None:
    with pytest.raises(ValueError, match="not all finite"):
        merge_weight(_random(N, K), _pair(scale=3e38))


def test_shapes_that_do_not_fit_are_refused_with_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"A \[5, 32\] and B \[40, 5\] do not fit a weight of \[48, 32\]"):
        merge_weight(_random(N, K), _pair(n=40))
    with pytest.raises(ValueError, match=r"a gain of shape \[48\] does not fit 40 outputs"):
        merge_weight(_random(40, K), None, _vectors())
    with pytest.raises(ValueError, match=r"a bias of shape \[48\] does not fit 1 outputs"):
        merge_bias(torch.zeros(1), _vectors())
    with pytest.raises(ValueError, match="ids up to 10, but the table has 10"):
        merge_table(_random(10, K), TableRows(torch.tensor([10]), _random(1, K)))
    with pytest.raises(ValueError, match=r"do not fit a table of \[10, 32\]"):
        merge_table(_random(10, K), TableRows(torch.tensor([1]), _random(1, 1)))


class _Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(K, N, bias=True)
        self.embed = nn.Embedding(K, N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_weights_are_those_of_peft(use_dora: bool) -> None:
    torch.manual_seed(0)
    module = _Module()
    table, weight = module.embed.weight.data.clone(), module.linear.weight.data.clone()
    config = LoraConfig(r=4, lora_alpha=7, target_modules=["linear", "embed"], use_dora=use_dora)
    model = get_peft_model(module, config)
    tensors: dict[str, dict[str, torch.Tensor]] = {"linear": {}, "embed": {}}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            continue
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        kind = next(k for k in ("magnitude", "embedding_A", "embedding_B", "lora_A", "lora_B") if k in name)
        of = tensors["linear" if ".linear." in name else "embed"]
        of[{"magnitude": "m"}.get(kind, kind[-1].lower())] = parameter.data.clone()
    merged = model.merge_and_unload()
    scale = 7 / 4
    for of, base, into, theirs in (
        (tensors["linear"], weight, merge_weight, merged.linear.weight.data),
        (tensors["embed"], table, merge_embedding, merged.embed.weight.data),
    ):
        pair, vectors = LoraPair(of["a"], of["b"], scale), None
        if use_dora:
            transposed = base.T if into is merge_embedding else base
            gain = of["m"] / (transposed + scale * of["b"] @ of["a"]).norm(dim=1)
            pair, vectors = LoraPair(of["a"], gain[:, None] * of["b"], scale), LoraVectors(gain=gain)
        ours = into(base, pair, vectors)
        if use_dora or into is merge_embedding:
            # The same real numbers, multiplied in another order.
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(ours, theirs)
