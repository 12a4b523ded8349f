"""`manylora inspect`: the report of a good adapter, and every reason against a bad one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from manylora.server import cli


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def write(directory: Path, *, rank: int = 4, module: str = "q_proj", **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": [module], "bias": "none"}
    fields |= {"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"}
    (directory / "adapter_config.json").write_text(json.dumps(fields | config))
    key = f"base_model.model.model.layers.0.self_attn.{module}"
    tensors = {f"{key}.lora_A.weight": torch.ones(rank, 64), f"{key}.lora_B.weight": torch.ones(64, rank)}
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def inspect(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int, str, str]:
    code = cli.main(["inspect", *line])
    out, err = capsys.readouterr()
    return code, out, err


def test_against_a_base(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write(tmp_path / "a")
    code, out, err = inspect(capsys, str(adapter), "--model", str(base))
    assert (code, err) == (0, "")
    assert "kind:           LoRA\n" in out
    assert "ranks:          4\n" in out
    assert "projections:    q\n" in out
    assert "composable:     yes\n" in out
    assert "  q       layers 0 of 1; rank 4; scale 2\n" in out
    assert "warning:" in out  # it was trained on another base
    code, out, _ = inspect(capsys, str(adapter), "--model", str(base), "--json")
    report = json.loads(out)
    assert (report["ranks"], report["scales"], report["modules"]) == ([4], [2.0], 1)
    assert report["placement"]["q"]["layers"] == "0 of 1"


def test_what_a_slot_takes_is_what_the_pool_takes(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write(tmp_path / "a", rank=20)
    report = json.loads(inspect(capsys, str(adapter), "--model", str(base), "--json")[1])
    assert report["device pages"] == {"q": 2}
    # Two pages of 16 ranks, of A [64, 16] and B [16, 64], in the one layer.
    assert report["device bytes"].startswith(f"{2 * 16 * (64 + 64) * 2} bytes a slot in 16 bits")


def test_a_dora_says_why_it_is_not_composable(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write(tmp_path / "a", use_dora=True)
    file = adapter / "adapter_model.safetensors"
    magnitude = {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.full((64,), 2.0)}
    save_file(load_file(file) | magnitude, file)
    code, out, _ = inspect(capsys, str(adapter), "--model", str(base))
    assert code == 0
    assert "kind:           DoRA\n" in out
    assert "composable:     no: " in out
    assert "; gain\n" in out


def test_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = inspect(capsys, str(write(tmp_path / "a")))
    assert code == 0
    assert "give --model" in out
    assert "ranks:          4\n" in out
    assert "modules:        q_proj\n" in out
    assert "layers:         0\n" in out
    assert "base model:     org/base\n" in out


def test_every_reason_is_told(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write(tmp_path / "a", use_magic=True, task_type="SEQ_CLS")
    for line in ([str(bad)], [str(bad), "--model", str(base)]):
        code, out, err = inspect(capsys, *line)
        assert (code, out) == (2, "")
        assert "use_magic" in err
        assert "SEQ_CLS" in err
    code, out, err = inspect(capsys, str(bad), "--json")
    assert code == 2
    assert len(json.loads(out)["refused"]) == 2
    assert "use_magic" in err


def test_a_rank_that_is_too_large(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write(tmp_path / "a")
    code, _, err = inspect(capsys, str(adapter), "--model", str(base), "--max-rank", "2")
    assert code == 2
    assert "rank 4 is above --max-rank 2" in err


def test_nothing_there(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(capsys, str(tmp_path / "nowhere"))[0] == 2
    assert inspect(capsys, str(write(tmp_path / "a")), "--model", str(tmp_path / "nowhere"))[0] == 2
