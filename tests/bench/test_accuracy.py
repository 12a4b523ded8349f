"""What arithmetics do to distributions: the measures by hand, and every arithmetic on a tiny model."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.kernels.cpu import available
from manylora.kernels.lora_weights import LoraWeights
from manylora.kernels.torch_ops import TorchOps
from manylora.server.model.synthetic import synthetic_adapter, synthetic_base, synthetic_spec

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import accuracy
from accuracy import Comparison, Model, measured, windows_of

IDS = torch.arange(100) % 7


class Letters:
    """A tokenizer: a letter is a token."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text]


def compared(reference: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor = IDS) -> dict[str, Any]:
    comparison = Comparison()
    comparison.add(reference, logits, ids)
    return comparison.result()


def test_what_is_the_same_diverges_by_nothing() -> None:
    logits = torch.randn(len(IDS), 7)
    result = compared(logits, logits + 3.0)  # a constant changes no distribution
    assert result["kl_mean"] == pytest.approx(0, abs=1e-9)
    assert result["same_top"] == 1
    assert result["tokens"] == len(IDS)


def test_divergence_is_the_reference_s_from_what_is_measured() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    result = compared(p.log().repeat(100, 1), q.log().repeat(100, 1), torch.zeros(100, dtype=torch.int64))
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)  # the other way round: 0.1308
    assert result["kl_mean"] == pytest.approx(expected, rel=1e-2)
    assert result["perplexity"] == pytest.approx(4)


def test_mean_percentile_and_top_are_over_all_windows() -> None:
    sure = torch.tensor([9.0, 0.0, 0.0]).repeat(100, 1)
    nearly, wrong = torch.tensor([9.0, 0.1, 0.0]), torch.tensor([-9.0, 0.0, 0.0])
    comparison = Comparison()
    ids = torch.zeros(100, dtype=torch.int64)
    comparison.add(sure, sure, ids)
    comparison.add(sure, torch.cat([nearly.repeat(97, 1), wrong.repeat(3, 1)]), ids)
    result = comparison.result()
    assert result["same_top"] == 197 / 200
    far = 9 + math.log(2)
    assert result["kl_mean"] == pytest.approx(far * 3 / 200, rel=1e-2)
    assert result["kl_p99"] == pytest.approx(far, rel=1e-2)  # 1.5 % of the positions


def test_perplexity_is_of_the_next_token_of_the_same_window() -> None:
    ids = torch.arange(100) % 3
    knows = torch.nn.functional.one_hot((ids + 1) % 3, 3) * 50.0
    knows[-1] = torch.tensor([50.0, 0, 0])  # the last one has nothing after it to know: 100 % 3 is 1
    assert compared(knows, knows, ids)["perplexity"] == pytest.approx(1)
    knows[70] = 0.0  # in the second part, and the first token of that is the last one's of the first part
    knows[63] = 0.0
    assert compared(knows, knows, ids)["perplexity"] == pytest.approx(math.exp(2 * math.log(3) / 99), abs=1e-4)


def test_windows_are_the_beginnings_of_all_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "WINDOW", 3)
    windows = windows_of(Letters(), ["abcdefgh", "ijklmn"], 2)  # type: ignore[arg-type]
    assert ["".join(map(chr, one)) for one in windows] == ["abc", "def", "ijk", "lmn"]
    with pytest.raises(ValueError, match="5 tokens: 2 windows of 3 take 6"):
        windows_of(Letters(), ["abcdefgh", "ijklm"], 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("changed", [3, 39])
def test_a_position_depends_on_its_own_token_and_those_before(changed: int) -> None:
    spec = synthetic_spec("tiny")
    model = Model(spec, synthetic_base(spec), TorchOps("cpu", torch.float32, resident=True), 40)  # two pages and a half
    ids = torch.arange(40)
    others = ids.clone()
    others[changed] = 200
    with torch.inference_mode():
        first, second = (model.logits(model.hidden(one), one) for one in (ids, others))
    assert first.shape == (40, spec.vocab_size)
    differ = (first - second).abs().amax(-1) > 1e-6
    assert differ.tolist() == [position >= changed for position in range(40)]


@pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")
def test_an_adapter_is_held_as_each_arithmetic_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside exact arithmetic, so that what is seen is what holding it costs; and that it is there at all."""
    spec = synthetic_spec("tiny")
    adapter = synthetic_adapter(spec.lora_shapes(), 8, dtype=torch.float32)
    windows = [torch.randint(0, spec.vocab_size, (100,), generator=torch.Generator().manual_seed(1))]

    def kl(held: torch.dtype, own: LoraWeights | None = adapter) -> float:
        monkeypatch.setitem(accuracy.HELD, "fp32", held)
        (result,) = measured(spec, lambda: synthetic_base(spec), windows, ["fp32"], adapter=own)
        return float(result["kl_mean"])

    exact, words, half, small = map(kl, (torch.float32, torch.int16, torch.bfloat16, torch.int8))
    assert exact < 1e-9
    assert exact < words < half / 10
    assert half < small < 0.1
    with torch.inference_mode():
        ids, ops = windows[0], TorchOps("cpu", torch.float32, resident=True)
        plain, changed = (Model(spec, synthetic_base(spec), ops, 100, own) for own in (None, adapter))
        assert (plain.logits(plain.hidden(ids), ids) - changed.logits(changed.hidden(ids), ids)).abs().max() > 0.1


@pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")
def test_every_arithmetic_of_a_tiny_model() -> None:
    spec = synthetic_spec("tiny")
    random = torch.Generator().manual_seed(1)
    windows = list(torch.randint(0, spec.vocab_size, (2, 100), generator=random))
    done: list[None] = []
    results = {
        result["arithmetic"]: result
        for result in measured(
            spec, lambda: synthetic_base(spec), windows, list(accuracy.ARITHMETICS), lambda: done.append(None)
        )
    }
    assert list(results) == ["reference", "bf16", "fp32", "int16", "int8"]
    assert len(done) == 2 * (1 + len(results))
    assert all(result["tokens"] == 200 for result in results.values())
    assert results["reference"]["kl_mean"] == 0
    assert results["fp32"]["kl_mean"] < 1e-9
    # That each is computed as it is called: they lie far apart.
    assert 1e-9 < results["int16"]["kl_mean"] < results["bf16"]["kl_mean"] / 10
    assert results["bf16"]["kl_mean"] < results["int8"]["kl_mean"] < 0.1
    assert results["fp32"]["same_top"] == 1
    # Of random tokens a random model knows nothing.
    assert results["reference"]["perplexity"] > spec.vocab_size / 2
