"""What a server gives its parts of a GPU's memory, before anything is on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from manylora.server.config import ConfigError, EngineConfig
from manylora.server.model.families import ModelSpec
from manylora.server.model.synthetic import synthetic_spec
from manylora.server.sizing import Form, Room, Sizes, budget, choose_sizes

GIB = 1 << 30
LLAMA_70B = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8,
}  # fmt: skip
CUDA = Form("cuda", torch.bfloat16, torch.bfloat16, torch.bfloat16, "words")
CPU = Form("cpu", torch.float32, torch.int16, torch.float32, "tiles")


def sizes(spec: ModelSpec, free: int, form: Form = CUDA, **flags: Any) -> Sizes:
    return choose_sizes(EngineConfig(**flags), spec, form, Room(free, free))


def test_everything_fits_together() -> None:
    """Base, adapters' pages and keys and values of Llama-3.1-8B on 24 and 80 GiB, of a 70B model on 80 GiB."""
    cases = (("llama-3.1-8b", {}, 24), ("llama-3.1-8b", {}, 80), ("llama-3.1-8b", LLAMA_70B, 80))
    for name, changes, gib in cases:
        spec = synthetic_spec(name, **changes)
        got = sizes(spec, gib * GIB)
        per_layer = sum(
            spec.lora_shapes().in_features[p] * spec.lora_shapes().out_features[p]
            for p in ("q", "k", "v", "o", "gate", "up", "down")
        )
        found = budget(spec, CUDA, got)
        base = spec.n_layers * per_layer * 0.5158 + 4 * spec.vocab_size * spec.hidden_size
        assert found.base == pytest.approx(base, rel=0.005), "half a byte and a nested scale a weight; 16-bit tables"
        assert found.base + found.kv + found.slots + found.tables < gib * GIB, (changes, gib)
        assert got.kv_pages * 16 >= 8192, "one request of the whole context must be possible"


def test_what_cannot_fit_is_said_before_it_is_tried() -> None:
    spec = synthetic_spec("llama-3.1-8b", **LLAMA_70B)
    with pytest.raises(ConfigError, match=r"--max-device-adapters: the base \(\d+ MiB\) and 64 pages of adapters"):
        sizes(spec, 48 * GIB)
    assert sizes(spec, 48 * GIB, max_device_adapters=8, max_rank=64).max_slots == 8
    with pytest.raises(ConfigError, match=r"^--model: its base takes 3\d{4} MiB, and 24576 MiB are free on cuda"):
        sizes(spec, 24 * GIB)
    with pytest.raises(ConfigError, match=r"^--model: its base takes 4\d{4} MiB, and 24576 MiB are free on cpu"):
        sizes(spec, 24 * GIB, CPU)


def test_integers_hold_almost_twice_the_tokens() -> None:
    """A vector of fp32 takes ``4 head_dim`` bytes, one of integers ``2 head_dim`` and its scale's four."""
    for name in ("tiny", "llama-3.1-8b"):
        spec = synthetic_spec(name)
        per_token = {}
        for dtype, vector in ((torch.float32, 4 * spec.head_dim), (torch.int16, 2 * spec.head_dim + 4)):
            found = sizes(spec, 64 * GIB, replace(CPU, kv_dtype=dtype), kv_memory=2 * GIB)
            per_token[dtype] = 2 * spec.n_layers * spec.n_kv_heads * vector
            assert found.kv_pages == 2 * GIB // (16 * per_token[dtype])
            assert budget(spec, replace(CPU, kv_dtype=dtype), found).kv == found.kv_tokens * per_token[dtype]
        assert 1.6 < per_token[torch.float32] / per_token[torch.int16] < 2


def test_no_pages_are_kept_that_no_rank_could_use() -> None:
    spec = synthetic_spec("tiny")
    for rank, pages in ((8, 4), (16, 4), (17, 8), (64, 8), (256, 16)):
        assert sizes(spec, GIB, max_device_adapters=4, max_rank=rank).max_pages == pages, rank
