"""Adapters by a family's own module names: fused projections are split by rows, ``fan_in_fan_out`` is checked against
the base, and names of another family are refused. Parity with PEFT: tests/e2e/test_family_parity.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.adapters.errors import AdapterRefused
from manylora.adapters.peft_loader import load_peft_adapter
from manylora.adapters.weights import AdapterWeights
from manylora.kernels.sites import CONV1D, FUSED, SEPARATE, LoraShapes, ModuleNames
from tests.adapters.peft_dirs import HIDDEN, INTERMEDIATE, KV, LAYERS, SHAPES, plain_config, write_dir

GPT2 = replace(SHAPES, names=CONV1D, out_features={**SHAPES.out_features, "k": HIDDEN, "v": HIDDEN, "gate": 0})
PHI3 = replace(SHAPES, names=FUSED)
QKV = HIDDEN + 2 * KV


def tensors(stem: str, n_in: int, n_out: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """LoRA on one module of every layer; ``stem`` has a place for the layer."""
    random = torch.Generator().manual_seed(n_out)
    result = {}
    for layer in range(LAYERS):
        name = f"base_model.model.{stem.format(layer)}"
        result[f"{name}.lora_A.weight"] = torch.randn(rank, n_in, generator=random)
        result[f"{name}.lora_B.weight"] = torch.randn(n_out, rank, generator=random)
    return result


def load(path: Path, shapes: LoraShapes, values: dict[str, torch.Tensor], **config: Any) -> AdapterWeights:
    return load_peft_adapter(write_dir(path, plain_config(**config), values), shapes)


def test_a_fused_module_is_split_by_rows(tmp_path: Path) -> None:
    values = {
        **tensors("model.layers.{}.self_attn.qkv_proj", HIDDEN, QKV),
        **tensors("model.layers.{}.mlp.gate_up_proj", HIDDEN, 2 * INTERMEDIATE),
    }
    loaded = load(tmp_path, PHI3, values, target_modules=["qkv_proj", "gate_up_proj"])
    assert set(loaded.lora.pairs) == {(p, layer) for p in ("q", "k", "v", "gate", "up") for layer in range(LAYERS)}
    stem = "base_model.model.model.layers.1.self_attn.qkv_proj"
    for projection, rows in (("q", slice(0, HIDDEN)), ("k", slice(HIDDEN, HIDDEN + KV)), ("v", slice(QKV - KV, QKV))):
        pair = loaded.lora.pairs[projection, 1]
        assert torch.equal(pair.a, values[f"{stem}.lora_A.weight"])
        assert torch.equal(pair.b, values[f"{stem}.lora_B.weight"][rows])
        assert pair.scale == 2.0
    up = loaded.lora.pairs["up", 0].b
    assert torch.equal(up, values["base_model.model.model.layers.0.mlp.gate_up_proj.lora_B.weight"][INTERMEDIATE:])


@pytest.mark.parametrize("said", [True, False, None])
def test_gpt2s_adapters_mean_the_same_whatever_fan_in_fan_out_says(tmp_path: Path, said: bool | None) -> None:
    """PEFT sets it to true on Conv1D by itself, and its factors are never transposed."""
    values = tensors("transformer.h.{}.attn.c_attn", HIDDEN, 3 * HIDDEN)
    config = {} if said is None else {"fan_in_fan_out": said}
    loaded = load(tmp_path, GPT2, values, target_modules=["c_attn"], **config)
    assert [warning for warning in loaded.report.warnings if "fan_in_fan_out = false" in warning] or said
    b = values["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    assert torch.equal(torch.cat([loaded.lora.pairs[p, 0].b for p in ("q", "k", "v")]), b)


@pytest.mark.parametrize("names", [SEPARATE, FUSED], ids=["llama", "phi3"])
def test_fan_in_fan_out_on_a_base_of_plain_linear_layers_is_refused(tmp_path: Path, names: ModuleNames) -> None:
    values = tensors("model.layers.{}.self_attn.o_proj", HIDDEN, HIDDEN)
    with pytest.raises(AdapterRefused, match="fan_in_fan_out = true: for bases that store their weights transposed"):
        load(tmp_path, replace(SHAPES, names=names), values, target_modules=["o_proj"], fan_in_fan_out=True)


@pytest.mark.parametrize(
    ("shapes", "stem", "n_out"),
    [
        (PHI3, "model.layers.{}.self_attn.q_proj", HIDDEN),
        (PHI3, "model.layers.{}.mlp.up_proj", INTERMEDIATE),
        (SHAPES, "model.layers.{}.self_attn.qkv_proj", QKV),
        (SHAPES, "transformer.h.{}.attn.c_attn", 3 * HIDDEN),
        (GPT2, "model.layers.{}.self_attn.q_proj", HIDDEN),
        (GPT2, "transformer.h.{}.mlp.c_gate", INTERMEDIATE),
        (GPT2, "transformer.h.{}.ln_1", HIDDEN),
        (GPT2, "h.{}.attn.c_attn", 3 * HIDDEN),
    ],
    ids=str,
)
def test_names_of_another_family_are_refused(tmp_path: Path, shapes: LoraShapes, stem: str, n_out: int) -> None:
    """Nothing is guessed: q_proj is no third of a qkv_proj."""
    with pytest.raises(AdapterRefused, match="match no module of the base") as caught:
        load(tmp_path, shapes, tensors(stem, HIDDEN, n_out), target_modules=[stem.rpartition(".")[2]])
    assert stem.format(0) in str(caught.value)


def test_factors_of_a_transposed_weight_are_refused(tmp_path: Path) -> None:
    """As if ``fan_in_fan_out`` turned the factors round: A of c_attn reads the hidden size, whatever is said."""
    values = tensors("transformer.h.{}.attn.c_attn", 3 * HIDDEN, HIDDEN)
    with pytest.raises(AdapterRefused, match=r"lora_A.weight has shape \[4, 96\], expected \[4, 32\]"):
        load(tmp_path, GPT2, values, target_modules=["c_attn"], fan_in_fan_out=True)


@pytest.mark.parametrize("kind", ["LOHA", "LOKR"])
def test_kinds_that_peft_does_not_put_on_conv1d_are_refused(tmp_path: Path, kind: str) -> None:
    stem = "base_model.model.transformer.h.0.attn.c_attn"
    values = {f"{stem}.{'hada' if kind == 'LOHA' else 'lokr'}_w1_a": torch.ones(3 * HIDDEN, 4)}
    config = {"peft_type": kind, "r": 4, "alpha": 8, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}
    path = write_dir(tmp_path, config, values)  # type: ignore[arg-type]
    with pytest.raises(AdapterRefused, match=r"PEFT has no Lo(Ha|Kr) on weights that are stored as \[in, out\]"):
        load_peft_adapter(path, GPT2)


def test_a_whole_embedding_by_gpt2s_name(tmp_path: Path) -> None:
    values = tensors("transformer.h.{}.attn.c_attn", HIDDEN, 3 * HIDDEN)
    rows = torch.randn(SHAPES.in_features["embed"], HIDDEN)
    values["base_model.model.transformer.wte.weight"] = rows
    loaded = load(tmp_path, GPT2, values, target_modules=["c_attn"], modules_to_save=["wte"])
    assert torch.equal(loaded.lora.tables["embed"].rows, rows)
