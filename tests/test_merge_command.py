"""`manylora merge`: the written checkpoint against PEFT's own merge of the same adapter into the same base."""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, VeraConfig, get_peft_model
from transformers import AutoTokenizer

from manylora.server import merge_command
from manylora.server.model.loader import quantize_checkpoint
from manylora.server.model.resolve import open_model, resolve
from manylora.server.model.stored_base import StoredBase
from tests.checkpoints import save_tokenizer
from tests.merge_cases import (
    ADAPTERS,
    FAMILIES,
    TABLES,
    TOKENS,
    load,
    make_adapter,
    make_bases,
    merge,
    stored,
    ulps,
    with_peft,
)
from tests.model.test_gguf import write_gguf


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny bf16 checkpoints; not to be written to."""
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def adapter(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(bases["llama"], tmp_path_factory.mktemp("adapters") / "a", **ADAPTERS["lora"])


CASES = [
    (base, kind)
    for base in FAMILIES
    for kind in ADAPTERS
    if base == "llama" or kind in ("lora", "dora", "both") or (base == "llama-tied" and kind in TABLES)
]


@pytest.mark.parametrize(("base", "kind"), CASES)
def test_equals_peft(bases: dict[str, Path], tmp_path: Path, base: str, kind: str) -> None:
    adapter = make_adapter(bases[base], tmp_path / "adapter", **ADAPTERS[kind])
    out = tmp_path / "out"
    assert merge(bases[base], adapter, out) == 0

    tied = FAMILIES[base][1]["tie_word_embeddings"]
    unmerged = with_peft(bases[base], adapter)
    with torch.no_grad():
        expected_logits = unmerged(TOKENS).logits
        base_logits = load(bases[base])(TOKENS).logits
    if tied and kind in TABLES:
        # PEFT merges both deltas into the one tensor that both modules share, and warns of it; its unmerged model
        # computes with two matrices, and so must the merged one.
        model = unmerged.base_model.model
        embed, head = model.model.embed_tokens, model.lm_head
        expected = {}
        for name, module in (("model.embed_tokens.weight", embed), ("lm_head.weight", head)):
            has_delta = hasattr(module, "get_delta_weight")
            weight = (module.base_layer if has_delta else module).weight.detach()
            expected[name] = (weight + module.get_delta_weight("default").detach() if has_delta else weight).bfloat16()
        assert not torch.equal(*expected.values())
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = unmerged.merge_and_unload()
        expected = {name: tensor.bfloat16() for name, tensor in merged.state_dict().items()}
    config = json.loads((out / "config.json").read_text())
    untied = not tied or kind in TABLES
    assert config["tie_word_embeddings"] is not untied
    tensors = stored(out)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in tensors) is untied
    for name, theirs in expected.items():
        if name in tensors:
            # LoRA's sum is made in PEFT's order. A DoRA's gain is multiplied in before it is added, and an embedding's
            # delta is a transposed product: the last bit of fp32, so at most one step of bf16 where it rounds.
            limit = 1 if kind == "dora" or name.endswith("embed_tokens.weight") else 0
            assert ulps(tensors[name], theirs) <= limit, name

    with torch.no_grad():
        logits = load(out)(TOKENS).logits
    # What bf16 leaves of fp32 weights, against how far the adapter moves the logits.
    error, effect = (logits - expected_logits).abs().max(), (base_logits - expected_logits).abs().max()
    assert error < 0.03 * effect, (float(error), float(effect))


def test_what_else_is_written(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(bases["llama"], tmp_path / "adapter", **ADAPTERS["lora"])
    (adapter / "chat_template.jinja").write_text("adapter: {{ messages }}")
    out = tmp_path / "new" / "out"
    assert merge(bases["llama"], adapter, out) == 0
    said = capsys.readouterr().out
    assert f"{out} holds {bases['llama']} with {adapter} merged into 14 modules" in said
    assert "chat template" in said
    assert load(out, "auto").dtype == torch.bfloat16  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("hello a").input_ids == AutoTokenizer.from_pretrained(bases["llama"])("hello a").input_ids
    assert tokenizer.chat_template == "adapter: {{ messages }}"
    generation = json.loads((bases["llama"] / "generation_config.json").read_text())
    assert json.loads((out / "generation_config.json").read_text()) == generation
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    made = tmp_path / "made"
    made.mkdir()
    (made / "file").touch()
    assert out.stat().st_mode == made.stat().st_mode
    assert {file.stat().st_mode for file in out.iterdir()} == {(made / "file").stat().st_mode}


def test_many_shards(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(bases["qwen3"], tmp_path / "adapter", **ADAPTERS["lora"])
    one, many = tmp_path / "one", tmp_path / "many"
    merge_command.merge_checkpoint(str(bases["qwen3"]), str(adapter), one, progress=False)
    merge_command.merge_checkpoint(str(bases["qwen3"]), str(adapter), many, progress=False, max_shard=50_000)
    assert len(list(many.glob("*.safetensors"))) > 3
    expected, found = stored(one), stored(many)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    load(many)


def test_weights_are_in_memory_one_at_a_time(
    bases: dict[str, Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[weakref.ref[torch.Tensor]] = []
    most = 0
    real = StoredBase.weight

    def weight(self: StoredBase, projection: str, layer: int) -> torch.Tensor:
        nonlocal most
        tensor = real(self, projection, layer)
        read.append(weakref.ref(tensor))
        most = max(most, sum(one() is not None for one in read))
        return tensor

    monkeypatch.setattr(StoredBase, "weight", weight)
    merge_command.merge_checkpoint(str(bases["llama"]), str(adapter), tmp_path / "out", progress=False)
    assert len(read) == 14
    assert most == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_base_of_other_bits_is_rounded_once(bases: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    base = tmp_path / "base"
    model = load(bases["llama"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # below what bf16 resolves, so that rounding first would show
            parameter.mul_(1 + 0.004 * torch.randn(parameter.shape, generator=generator))
    model.to(dtype).save_pretrained(base)
    save_tokenizer(base)
    adapter = make_adapter(base, tmp_path / "adapter", **ADAPTERS["lora"])
    assert merge(base, adapter, tmp_path / "out") == 0
    expected = with_peft(base, adapter).merge_and_unload().state_dict()
    found = stored(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in found)


def test_an_nf4_base_is_dequantised_first(bases: dict[str, Path], tmp_path: Path) -> None:
    nf4, plain = tmp_path / "nf4", tmp_path / "plain"
    quantize_checkpoint(str(bases["llama"]), nf4, progress=False)
    # The same weights in fp32, as this project's reader sees them.
    base = StoredBase(open_model(resolve(str(nf4))))
    model = load(bases["llama"])
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            for projection, module in zip(("q", "k", "v", "o"), ("q_proj", "k_proj", "v_proj", "o_proj"), strict=True):
                getattr(block.self_attn, module).weight.copy_(base.weight(projection, layer))
            for projection in ("gate", "up", "down"):
                getattr(block.mlp, f"{projection}_proj").weight.copy_(base.weight(projection, layer))
    model.save_pretrained(plain)
    adapter = make_adapter(plain, tmp_path / "adapter", **ADAPTERS["lora"])
    assert merge(nf4, adapter, tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    expected, found = with_peft(plain, adapter).merge_and_unload().state_dict(), stored(tmp_path / "out")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in found)


def test_a_gguf_base(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    base = write_gguf(tmp_path / "base.gguf", bases["llama"], kind=gguf.GGMLQuantizationType.F32)
    assert merge(base, adapter, tmp_path / "out") == 0
    assert merge(bases["llama"], adapter, tmp_path / "same") == 0
    expected, found = stored(tmp_path / "same"), stored(tmp_path / "out")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(TOKENS).logits, load(tmp_path / "same")(TOKENS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("hello a").input_ids


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_merged_where_the_base_has_them(bases: dict[str, Path], tmp_path: Path, bias: str) -> None:
    base = bases["llama-biases"]
    adapter = make_adapter(base, tmp_path / "a", r=2, target_modules=["q_proj", "down_proj"], bias=bias)
    assert merge(base, adapter, tmp_path / "out") == 0
    expected = with_peft(base, adapter).merge_and_unload().state_dict()
    found = stored(tmp_path / "out")
    changed = 0
    for name, tensor in found.items():
        # A trained bias is kept as its difference from the base's: the last bit of fp32.
        assert ulps(tensor, expected[name].bfloat16()) <= (1 if name.endswith("bias") else 0), name
        changed += name.endswith("bias") and not torch.equal(tensor, stored(base)[name])
    assert changed == (14 if bias == "all" else 4)


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
@pytest.mark.parametrize("base", ["llama", "llama-tied"])
def test_saved_modules_take_the_place_of_the_bases(
    bases: dict[str, Path], tmp_path: Path, base: str, saved: list[str]
) -> None:
    adapter = make_adapter(bases[base], tmp_path / "a", r=2, target_modules=["q_proj"], modules_to_save=saved)
    assert merge(bases[base], adapter, tmp_path / "out") == 0
    unmerged = with_peft(bases[base], adapter)
    with torch.no_grad():
        expected, before = unmerged(TOKENS).logits, load(bases[base])(TOKENS).logits
        logits = load(tmp_path / "out")(TOKENS).logits
    assert (logits - expected).abs().max() < 0.03 * (before - expected).abs().max()


OTHER_KINDS: dict[str, Callable[[], Any]] = {
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=4, total_step=10, lora_alpha=6, target_modules=["q_proj"]),
    "vera": lambda: VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "loha": lambda: LoHaConfig(r=2, alpha=3, target_modules=["q_proj"]),
    "tokens": lambda: LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 7, 42]),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_kinds_that_are_folded_at_load(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    config = OTHER_KINDS[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(bases["llama"]), config)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / "a")
        assert merge(bases["llama"], tmp_path / "a", tmp_path / "out") == 0
        expected = with_peft(bases["llama"], tmp_path / "a").merge_and_unload().state_dict()
    found, before, changed = stored(tmp_path / "out"), stored(bases["llama"]), 0
    for name, tensor in found.items():
        # PEFT multiplies the same factors in another order: the last bits of fp32, then one rounding to bf16.
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=2**-8, atol=1e-6)
        changed += not torch.equal(tensor, before[name])
    assert changed == {"vera": 4, "tokens": 3}.get(kind, 2)
