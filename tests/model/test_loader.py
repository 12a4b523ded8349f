"""Loading and quantising: bit-equal to bitsandbytes, readable by transformers, cached."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from manylora.kernels.sites import LAYER_PROJECTIONS
from manylora.server.model import bnb_format, quantize
from manylora.server.model.cache import BaseCache, default_cache_dir
from manylora.server.model.digest import digest_files
from manylora.server.model.errors import ModelError
from manylora.server.model.layout import projection_bias, projection_weight
from manylora.server.model.loader import LoadedBase, load_base, quantize_checkpoint

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def load(path: Path, cache: Path, **options: Any) -> LoadedBase:
    return load_base(str(path), cache_dir=cache, progress=False, **options)


def entry_of(cache: Path) -> Path:
    (entry,) = (cache / "bases").iterdir()
    return entry


def same(first: LoadedBase, second: LoadedBase) -> bool:
    a, b = first.weights, second.weights
    return (
        all(torch.equal(a.projections[key].dequantize(), b.projections[key].dequantize()) for key in a.projections)
        and torch.equal(a.embed, b.embed)
        and torch.equal(a.output_embedding, b.output_embedding)
        and all(torch.equal(x, y) for x, y in zip(a.input_norms, b.input_norms, strict=True))
    )


@pytest.fixture
def forbid_quantising(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to make any further quantising fail the test."""

    def forbid() -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise AssertionError("quantised again")

        monkeypatch.setattr(quantize, "quantize", fail)

    return forbid


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_what_bitsandbytes_makes_of_the_source(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    base = load(checkpoints[family], tmp_path)
    source = load_file(checkpoints[family] / "model.safetensors")
    spec, weights = base.spec, base.weights
    assert set(weights.projections) == {(p, layer) for p in LAYER_PROJECTIONS for layer in range(2)}
    for (projection, layer), weight in weights.projections.items():
        packed, state = bnb.quantize_4bit(
            source[projection_weight(projection, layer)], blocksize=64, quant_type="nf4", compress_statistics=True
        )
        assert torch.equal(weight.packed, packed.view(-1))
        assert weight.dtype == torch.bfloat16
        state.dtype = torch.float32
        assert torch.equal(weight.dequantize(), bnb.dequantize_4bit(packed, state))
        assert ((projection, layer) in weights.biases) == spec.has_bias(projection)
    for (projection, layer), bias in weights.biases.items():
        assert torch.equal(bias, source[projection_bias(projection, layer)])
    assert torch.equal(weights.embed, source["model.embed_tokens.weight"])
    assert torch.equal(weights.final_norm, source["model.norm.weight"])
    assert torch.equal(weights.post_attention_norms[1], source["model.layers.1.post_attention_layernorm.weight"])
    assert len(weights.q_norms) == len(weights.k_norms) == (2 if spec.qk_norm else 0)
    assert (weights.lm_head is None) == spec.tie_embeddings
    if weights.lm_head is not None:
        assert torch.equal(weights.lm_head, source["lm_head.weight"])
    assert base.name == family
    assert base.tokenizer.eos_token_ids == (258,)


def test_tensors_are_cast_to_the_configs_type_as_transformers_does(copied: Callable[..., Path], tmp_path: Path) -> None:
    path = copied("qwen2")
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-6
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    plain = transformers.AutoModelForCausalLM.from_pretrained(path)
    norm = load(path, tmp_path / "cache").weights.final_norm
    assert norm.dtype == torch.bfloat16
    assert torch.equal(norm, plain.model.norm.weight.data)


def test_without_a_type_in_the_config_the_weights_tell(copied: Callable[..., Path], tmp_path: Path) -> None:
    base = load(copied("qwen2", dtype=None), tmp_path / "cache")
    assert base.spec.dtype == "bfloat16"
    assert base.weights.projections["q", 0].dtype == base.weights.final_norm.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_source_types(dtype: torch.dtype, copied: Callable[..., Path], tmp_path: Path) -> None:
    path = copied("qwen2", dtype=str(dtype).removeprefix("torch."))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    weights = load(path, tmp_path / "cache").weights
    model = transformers.AutoModelForCausalLM.from_pretrained(entry_of(tmp_path / "cache"), device_map="cpu")
    model(torch.tensor([[1, 2, 3]]))  # transformers fails where the types of a checkpoint's other tensors mix
    assert weights.projections["q", 0].dtype == dtype
    assert weights.biases["q", 0].dtype == weights.final_norm.dtype == dtype
    assert weights.embed.dtype == torch.bfloat16


def test_large_weights_are_quantised_in_chunks_with_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole = bnb_format.quantize(weight)
    monkeypatch.setattr(bnb_format, "_CHUNK", 640)
    assert torch.equal(bnb_format.quantize(weight).packed, whole.packed)
    assert torch.equal(bnb_format.quantize(weight).absmax_fp32(), whole.absmax_fp32())


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_quantize_writes(
    family: str, nested: bool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Its own bitsandbytes path and our dequantised weights in a plain model give the same logits."""
    out = quantize_checkpoint(str(checkpoints[family]), tmp_path / "out", nested=nested, progress=False)
    base = load(out, tmp_path / "cache")
    assert not (tmp_path / "cache" / "bases").exists()  # nothing to quantise, nothing to cache
    assert base.weights.projections["q", 0].nested is nested

    quantized = transformers.AutoModelForCausalLM.from_pretrained(out, device_map="cpu", dtype=torch.float32)
    # No tensor left over or made up: transformers' own module holds our bytes.
    linear = quantized.model.layers[1].mlp.down_proj
    assert torch.equal(linear.weight.data.view(-1), base.weights.projections["down", 1].packed)
    plain = transformers.AutoModelForCausalLM.from_pretrained(checkpoints[family], dtype=torch.float32)
    with torch.no_grad():
        for (projection, layer), weight in base.weights.projections.items():
            plain.get_parameter(projection_weight(projection, layer)).copy_(weight.dequantize())
        ids = torch.tensor([[5, 9, 250, 3, 77, 31, 8, 100, 42, 17]])
        expected, got = plain(ids).logits, quantized(ids).logits
    # bitsandbytes rounds to the stored bf16 when it dequantises, and computes in bf16.
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


def test_shards(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    whole = quantize_checkpoint(str(checkpoints["llama"]), tmp_path / "whole", progress=False)
    parts = quantize_checkpoint(str(checkpoints["llama"]), tmp_path / "parts", progress=False, max_shard=40_000)
    files = sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert same(load(whole, tmp_path / "cache"), load(parts, tmp_path / "cache"))
    transformers.AutoModelForCausalLM.from_pretrained(parts, device_map="cpu")


def test_quantize_checkpoint_refuses_to_overwrite_or_repeat(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out = quantize_checkpoint(str(checkpoints["llama"]), tmp_path / "out", progress=False)
    with pytest.raises(ModelError, match="exists already"):
        quantize_checkpoint(str(checkpoints["llama"]), out, progress=False)
    with pytest.raises(ModelError, match="quantised to NF4 already"):
        quantize_checkpoint(str(out), tmp_path / "again", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # no temporary directory is left


def test_nf4_seen_through_another_storage_type(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out = quantize_checkpoint(str(checkpoints["llama"]), tmp_path / "out", progress=False)
    before = load(out, tmp_path / "cache")
    tensors = load_file(out / "model.safetensors")
    for name in [name for name in tensors if f"{name}.absmax" in tensors]:
        tensors[name] = tensors[name].view(-1).view(torch.bfloat16).view(-1, 1)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert same(before, load(out, tmp_path / "cache"))


def test_the_second_start_reads_the_cache(
    checkpoints: dict[str, Path], tmp_path: Path, forbid_quantising: Callable[[], None]
) -> None:
    first = load(checkpoints["qwen3"], tmp_path)
    forbid_quantising()
    second = load(checkpoints["qwen3"], tmp_path, served_name="mine")
    assert same(first, second)
    assert first.digest == second.digest
    assert first.spec == second.spec
    assert second.name == "mine"
    assert second.tokenizer.has_chat_template


def test_weights_do_not_share_memory_with_their_file(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base = load(checkpoints["llama"], tmp_path)
    before = base.weights.embed.clone()
    file = entry_of(tmp_path) / "model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert torch.equal(base.weights.embed, before)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def garble_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:40] = b"x" * 32
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", truncate),
        ("model.safetensors", garble_header),  # same size: found when it is read
        ("model.safetensors", Path.unlink),
        ("manylora.json", Path.unlink),
        ("manylora.json", truncate),
        ("config.json", lambda path: path.write_text("x" * path.stat().st_size)),
    ],
    ids=["truncated", "header", "missing", "no marker", "half marker", "config"],
)
def test_a_broken_entry_is_made_again(
    name: str,
    damage: Callable[[Path], object],
    checkpoints: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    forbid_quantising: Callable[[], None],
) -> None:
    first = load(checkpoints["llama"], tmp_path)
    damage(entry_of(tmp_path) / name)
    with caplog.at_level(logging.WARNING):
        second = load(checkpoints["llama"], tmp_path)
    assert "is broken" in caplog.text
    assert same(first, second)
    forbid_quantising()
    assert same(first, load(checkpoints["llama"], tmp_path))


def test_a_cache_that_cannot_be_written_costs_a_warning(
    checkpoints: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    with caplog.at_level(logging.WARNING):
        base = load(checkpoints["llama"], blocked / "cache")
    assert "not cached" in caplog.text
    assert same(base, load(checkpoints["llama"], tmp_path / "cache"))


def test_a_full_disk_is_noticed_before_the_work(
    checkpoints: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with caplog.at_level(logging.WARNING):
        load(checkpoints["llama"], tmp_path / "cache")
    assert "0.00 GB free" in caplog.text
    assert list((tmp_path / "cache" / "bases").iterdir()) == []
    with pytest.raises(ModelError, match=r"0\.00 GB free"):
        quantize_checkpoint(str(checkpoints["llama"]), tmp_path / "out", progress=False)


def test_a_write_that_fails_half_way_falls_back_to_memory(
    checkpoints: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("manylora.server.model.writer.save_file", fail)
    with caplog.at_level(logging.WARNING):
        base = load(checkpoints["llama"], tmp_path)
    assert "No space left" in caplog.text
    assert len(base.weights.projections) == 14
    assert list((tmp_path / "bases").iterdir()) == []


def test_starts_at_the_same_time_share_one_entry(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    cache = BaseCache(tmp_path)
    both = threading.Barrier(2)
    found: list[Path | None] = []

    def start(content: str) -> None:
        def write(directory: Path) -> None:
            (directory / "config.json").write_text(content)
            both.wait(timeout=20)

        found.append(cache.fill("d" * 64, write))

    threads = [threading.Thread(target=start, args=(content,)) for content in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache.entry("d" * 64)] * 2
    assert cache.find("d" * 64) == found[0]
    assert len(list((tmp_path / "bases").iterdir())) == 1


def test_the_digest_is_that_of_the_content(copied: Callable[..., Path], tmp_path: Path) -> None:
    path = copied("llama")
    first = load(path, tmp_path / "cache")
    elsewhere = shutil.copytree(path, tmp_path / "elsewhere")
    assert load(elsewhere, tmp_path / "cache").digest == first.digest
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    changed = load(path, tmp_path / "cache")
    assert changed.digest != first.digest
    assert not torch.equal(changed.weights.final_norm, first.weights.final_norm)


def test_known_hashes_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, remember = tmp_path / "a", tmp_path / "cache" / "hashes.json"
    file.write_bytes(b"one")
    monkeypatch.setattr("manylora.server.model.digest._SETTLED_NS", -1)
    first = digest_files({"a": file}, remember=remember)
    assert len(json.loads(remember.read_text())) == 1
    monkeypatch.setattr("manylora.server.model.digest._hash", lambda path, bar: "0" * 64)
    assert digest_files({"a": file}, remember=remember) == first
    assert digest_files({"a": file}) != first
    remember.write_text("[broken")
    assert digest_files({"a": file}, remember=remember) != first


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    file, remember = tmp_path / "a", tmp_path / "hashes.json"
    file.write_bytes(b"one")
    digest_files({"a": file}, remember=remember)
    assert not remember.exists()


def test_the_default_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "manylora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "manylora"


def test_a_tied_head_that_is_stored_all_the_same(copied: Callable[..., Path], tmp_path: Path) -> None:
    path = copied("qwen2")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert load(path, tmp_path / "cache").weights.lm_head is None
    tensors["lm_head.weight"][0] += 1
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="another lm_head"):
        load(path, tmp_path / "cache")
