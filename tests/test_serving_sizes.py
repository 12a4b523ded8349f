"""What a server gives its parts of a GPU's memory, before anything is on it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from manylora.server import serving
from manylora.server.config import ConfigError, EngineConfig
from manylora.server.model.families import ModelSpec
from manylora.server.model.synthetic import synthetic_spec

GIB = 1 << 30
LLAMA_70B = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8,
}  # fmt: skip


def sizes(monkeypatch: pytest.MonkeyPatch, spec: ModelSpec, free: int, **flags: Any) -> serving.Sizes:
    monkeypatch.setattr(serving, "_free_memory", lambda device: free)
    ops: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    return serving.choose_sizes(EngineConfig(**flags), spec, ops)


def test_everything_fits_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Base, adapters' pages and keys and values of Llama-3.1-8B on 24 and 80 GiB, of a 70B model on 80 GiB."""
    cases = (("llama-3.1-8b", {}, 24), ("llama-3.1-8b", {}, 80), ("llama-3.1-8b", LLAMA_70B, 80))
    for name, changes, gib in cases:
        spec = synthetic_spec(name, **changes)
        got = sizes(monkeypatch, spec, gib * GIB)
        per_layer = sum(
            spec.lora_shapes().in_features[p] * spec.lora_shapes().out_features[p]
            for p in ("q", "k", "v", "o", "gate", "up", "down")
        )
        base = spec.n_layers * per_layer * 0.5158 + 4 * spec.vocab_size * spec.hidden_size
        adapters = got.max_pages * serving._adapter_page_bytes(spec, torch.bfloat16) + got.table_bytes
        adapters += got.max_slots * serving._vector_bytes(spec)
        keys_and_values = got.kv_pages * serving.KVCache.bytes_per_page(spec, torch.bfloat16)
        assert base + adapters + keys_and_values < gib * GIB, (changes, gib)
        assert got.kv_pages * 16 >= 8192, "one request of the whole context must be possible"


def test_what_cannot_fit_is_said_before_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = synthetic_spec("llama-3.1-8b", **LLAMA_70B)
    with pytest.raises(ConfigError, match=r"--max-device-adapters: the base \(\d+ MiB\) and 64 pages of adapters"):
        sizes(monkeypatch, spec, 48 * GIB)
    assert sizes(monkeypatch, spec, 48 * GIB, max_device_adapters=8, max_rank=64).max_slots == 8
