"""Every file that is wrong is one clear `ModelError` that names it and says what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.server.model.errors import BadCheckpoint, ModelError, ModelNotFound, UnsupportedModel
from manylora.server.model.loader import load_base, quantize_checkpoint


def refusal(path: Path | str, tmp_path: Path, kind: type[ModelError] = BadCheckpoint) -> str:
    with pytest.raises(kind) as caught:
        load_base(str(path), cache_dir=tmp_path / "cache", progress=False)
    return str(caught.value)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    assert f"There is no model at {tmp_path}/nowhere" in refusal(tmp_path / "nowhere", tmp_path, ModelNotFound)
    assert "no such file" in refusal("model.gguf", tmp_path, ModelNotFound)


def test_a_hub_id_that_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read once, at its first import
    message = refusal("some-org/some-model", tmp_path, ModelNotFound)
    assert "hf download some-org/some-model" in message


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert "checkpoint directory or a .gguf file" in refusal(tmp_path / "weights.safetensors", tmp_path, ModelNotFound)


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert "has no config.json" in refusal(tmp_path / "model", tmp_path, ModelNotFound)
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    assert "LoRA adapter: name its base" in refusal(tmp_path / "model", tmp_path, ModelNotFound)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"architectures": ', "not valid JSON"), (b"[]", "a JSON list"), (b'"\xff"', "not UTF-8")],
)
def test_a_corrupt_config(content: bytes, message: str, copied: Callable[..., Path], tmp_path: Path) -> None:
    path = copied()
    (path / "config.json").write_bytes(content)
    assert re.search(rf"config\.json .*{message}", refusal(path, tmp_path))


def test_an_unknown_architecture_is_refused_before_anything_is_read(
    copied: Callable[..., Path], tmp_path: Path
) -> None:
    path = copied(architectures=["MixtralForCausalLM"])
    (path / "model.safetensors").unlink()
    assert "MixtralForCausalLM is not one of Llama" in refusal(path, tmp_path, UnsupportedModel)


@pytest.mark.parametrize("size", [0, 6, 300, -50])
def test_truncated_weights(size: int, copied: Callable[..., Path], tmp_path: Path) -> None:
    path = copied()
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    message = refusal(path, tmp_path)
    assert f"{file} cannot be used: it is truncated or corrupt" in message
    assert "fetch the file again" in message


def test_no_weights(copied: Callable[..., Path], tmp_path: Path) -> None:
    path = copied()
    (path / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refusal(path, tmp_path)


def test_pickles_are_never_loaded(copied: Callable[..., Path], tmp_path: Path) -> None:
    path = copied()
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    message = refusal(path, tmp_path)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_a_missing_shard(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out = quantize_checkpoint(str(checkpoints["llama"]), tmp_path / "out", progress=False, max_shard=60_000)
    shards = sorted(out.glob("*.safetensors"))
    shards[1].unlink()
    assert f"1 of {len(shards)} weight files are missing: {shards[1].name}" in refusal(out, tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "no `weight_map`"),
        (json.dumps({"weight_map": {"a": "../../etc/passwd"}}), "outside its directory"),
    ],
)
def test_a_bad_index(index: str, message: str, copied: Callable[..., Path], tmp_path: Path) -> None:
    path = copied()
    (path / "model.safetensors.index.json").write_text(index)
    assert message in refusal(path, tmp_path)


def test_missing_unexpected_and_misshapen_tensors_are_all_named(copied: Callable[..., Path], tmp_path: Path) -> None:
    path = copied()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.v_proj.bias"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(64, 64)

    rewrite(path, change)
    message = refusal(path, tmp_path)
    assert "2 tensors are missing: model.layers.1.self_attn.v_proj.bias, model.norm.weight" in message
    assert "1 tensors are not part of this architecture: model.layers.0.self_attn.q_norm.weight" in message
    assert "model.layers.0.mlp.up_proj.weight has shape [64, 64], the config says [128, 64]" in message


def test_values_that_are_not_finite(copied: Callable[..., Path], tmp_path: Path) -> None:
    path = copied()
    rewrite(path, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(float("nan")))
    assert "model.layers.1.mlp.up_proj.weight cannot be quantised: it holds values that are not finite" in refusal(
        path, tmp_path
    )
    assert list((tmp_path / "cache" / "bases").iterdir()) == []


def test_weights_of_another_type(copied: Callable[..., Path], tmp_path: Path) -> None:
    path = copied()
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(path, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    assert f"{name} (F8_E4M3)" in refusal(path, tmp_path, UnsupportedModel)


def test_rows_that_are_not_whole_blocks(tmp_path: Path, copied: Callable[..., Path]) -> None:
    path = copied(intermediate_size=96)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            mlp = f"model.layers.{layer}.mlp"
            for projection in ("gate", "up"):
                tensors[f"{mlp}.{projection}_proj.weight"] = torch.ones(96, 64)
                tensors[f"{mlp}.{projection}_proj.bias"] = torch.ones(96)
            tensors[f"{mlp}.down_proj.weight"] = torch.ones(64, 96)

    rewrite(path, change)
    assert "rows of [96] are not whole NF4 blocks" in refusal(path, tmp_path, UnsupportedModel)


@pytest.fixture
def nf4(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return quantize_checkpoint(str(checkpoints["llama"]), tmp_path / "nf4", progress=False)


Q0 = "model.layers.0.self_attn.q_proj.weight"


def bad_state(tensors: dict[str, torch.Tensor], **changes: object) -> None:
    name = f"{Q0}.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[name].tolist())) | changes
    tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q0}.absmax"), f"missing: {Q0}.absmax"),
        (lambda t: t.pop(f"{Q0}.nested_quant_map"), f"missing: {Q0}.nested_quant_map"),
        (lambda t: t[f"{Q0}.quant_map"].fill_(0), f"{Q0}: its quant_map is not that of NF4"),
        (lambda t: t[f"{Q0}.nested_absmax"].fill_(float("inf")), f"{Q0}: its scales are not finite"),
        (lambda t: t.update({Q0: t[Q0][:-1].clone()}), f"{Q0}: packed must be uint8 \\[2048\\]"),
        (lambda t: bad_state(t, shape=[32, 128]), r"stored shape is \[32, 128\], the config says \[64, 64\]"),
        (lambda t: bad_state(t, blocksize=7), "quant_state is not understood"),
        (lambda t: bad_state(t, quant_type="fp4"), "not that of an NF4 weight"),
        (lambda t: t[f"{Q0}.quant_state.bitsandbytes__nf4"].fill_(7), "quant_state is not JSON"),
    ],
)
def test_faults_of_a_quantised_checkpoint(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, nf4: Path, tmp_path: Path
) -> None:
    rewrite(nf4, change)
    assert re.search(message, refusal(nf4, tmp_path))


def test_a_partly_quantised_checkpoint(nf4: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{Q0}.")]:
            del tensors[name]
        tensors[Q0] = torch.ones(64, 64)

    rewrite(nf4, change)
    message = refusal(nf4, tmp_path, UnsupportedModel)
    assert f"1 projections are not quantised ({Q0})" in message


def test_a_quantised_head(nf4: Path, tmp_path: Path) -> None:
    rewrite(nf4, lambda tensors: tensors.update({"lm_head.weight.absmax": torch.ones(1)}))
    assert "lm_head is quantised too" in refusal(nf4, tmp_path, UnsupportedModel)


def test_a_checkpoint_without_a_tokenizer(copied: Callable[..., Path], tmp_path: Path) -> None:
    path = copied()
    (path / "tokenizer.json").unlink()
    assert "it has no tokenizer" in refusal(path, tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_truncated_tokenizer(name: str, copied: Callable[..., Path], tmp_path: Path) -> None:
    path = copied()
    file = path / name
    file.write_bytes(file.read_bytes()[:-30])
    assert f"{file} cannot be used: it is truncated or corrupt" in refusal(path, tmp_path)


def test_a_destination_that_cannot_be_written(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written"):
        quantize_checkpoint(str(checkpoints["llama"]), tmp_path / "file" / "out", progress=False)
