"""Checkpoints of families whose files are not laid out as Llama's: fused and transposed weights, other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from manylora.server.merge_command import merge_checkpoint
from manylora.server.model.errors import BadCheckpoint
from manylora.server.model.loader import LoadedBase, load_base, quantize_checkpoint
from tests.e2e.family_models import CASES, reference_model, save_adapter, save_model

FAMILIES = ("phi3", "gemma2", "gpt2")
IDS = torch.tensor([[5, 9, 250, 3, 77, 31, 8, 100, 42, 17, 6, 6, 2]])


def load(path: Path, cache: Path) -> LoadedBase:
    return load_base(str(path), cache_dir=cache, progress=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        save_model(CASES[family], root / family)
    return {family: root / family for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_quantize_writes(family: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """Fused weights stay fused in NF4, and a Conv1D's is written the way round that bitsandbytes has it."""
    out = quantize_checkpoint(str(saved[family]), tmp_path / "out", progress=False)
    of_source, of_nf4 = load(saved[family], tmp_path / "cache"), load(out, tmp_path / "other")
    for module, weight in of_source.weights.projections.items():
        assert torch.equal(weight.dequantize(), of_nf4.weights.projections[module].dequantize()), module
    for module, bias in of_source.weights.biases.items():
        assert torch.equal(bias, of_nf4.weights.biases[module]), module
    # In bf16: transformers leaves what is not quantised in the file's type, and LayerNorm wants one type throughout.
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        out, device_map="cpu", dtype=torch.bfloat16, attn_implementation="eager"
    )
    plain = reference_model(CASES[family], saved[family], of_source)
    with torch.no_grad():
        expected, got = plain(IDS).logits, quantized(IDS).logits.float()
    # It rounds weights and activations to 8 bits in four layers of widely drawn weights.
    assert (got - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_checkpoints_are_what_peft_merges(family: str, saved: dict[str, Path], tmp_path: Path) -> None:
    case = CASES[family]
    model = transformers.AutoModelForCausalLM.from_pretrained(saved[family], dtype=torch.float32)
    save_adapter(model, case.adapters["all"], tmp_path / "adapters" / "all", 0)
    merge_checkpoint(str(saved[family]), str(tmp_path / "adapters" / "all"), tmp_path / "out", progress=False)
    merged: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        merged |= load_file(file)
    theirs: Any = adapted_from(model, tmp_path / "adapters" / "all").merge_and_unload()
    expected = {name: p for name, p in theirs.state_dict().items() if name in merged}
    assert expected.keys() == merged.keys()
    for name, tensor in expected.items():
        # Sums in fp32 on both sides, rounded once to the 8 bits of bf16; they may fall to the other side of a tie.
        torch.testing.assert_close(merged[name].float(), tensor, rtol=2**-8, atol=1e-6, msg=name)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS)


def adapted_from(model: Any, folder: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(model, folder)


def test_gpt2s_first_checkpoints_have_no_prefix(saved: dict[str, Path], tmp_path: Path) -> None:
    """And hold each layer's causal mask."""
    path = tmp_path / "bare"
    path.mkdir()
    for file in saved["gpt2"].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 256, 256).bfloat16() for layer in range(4)}
    save_file(bare, path / "model.safetensors", metadata={"format": "pt"})
    whole, other = load(saved["gpt2"], tmp_path / "cache"), load(path, tmp_path / "cache")
    assert whole.digest != other.digest
    for module, weight in whole.weights.projections.items():
        assert torch.equal(weight.packed, other.weights.projections[module].packed)
    assert whole.weights.positions is not None
    assert other.weights.positions is not None
    assert torch.equal(whole.weights.positions, other.weights.positions)


def test_a_transposed_weight_is_not_taken_for_another(saved: dict[str, Path], tmp_path: Path) -> None:
    """Square weights aside, a Conv1D's file must have it as [in, out]."""
    path = tmp_path / "turned"
    path.mkdir()
    for file in saved["gpt2"].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"c_fc.weight has shape \[256, 64\], the config says \[64, 256\]"):
        load(path, tmp_path / "cache")
