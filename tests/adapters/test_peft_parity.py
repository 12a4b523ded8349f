"""Every delta we read equals the one peft computes from the same directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.adapters.errors import AdapterRefused
from manylora.adapters.peft_loader import load_peft_adapter
from tests.adapters.peft_dirs import ALL, PLACES, SHAPES, HfBase, load_peft, peft_deltas, save_peft, tiny_model

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "every projection": {"r": 8, "lora_alpha": 4, "target_modules": ALL},
    "all-linear": {"r": 4, "target_modules": "all-linear"},
    "all-linear without some": {"r": 4, "target_modules": "all-linear", "exclude_modules": ["k_proj", "mlp.up_proj"]},
    "rslora": {"r": 9, "lora_alpha": 16, "use_rslora": True, "target_modules": ALL},
    "rank and alpha patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6, r"layers\.\d+\.self_attn\.o_proj": 3},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 5, "(k|v)_proj": 7, "^model.layers.1.mlp.up_proj": 1},
    },
    "overlapping patterns": {
        "r": 4,
        "target_modules": ALL,
        "alpha_pattern": {"z": 1, "q_proj": 3, "layers.0.self_attn.q_proj": 9},
    },
    "rslora with patterns": {
        "r": 4,
        "use_rslora": True,
        "target_modules": ALL,
        "rank_pattern": {"v_proj": 12},
        "alpha_pattern": {"v_proj": 5},
    },
    "one layer": {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "layers by list": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "layers by patterns": {
        "r": 4,
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "layers"],
    },
    "full paths override layers": {
        "r": 4,
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "regex": {"r": 4, "target_modules": r".*layers\.[01]\.(self_attn\.(q|v)|mlp\.gate)_proj"},
    "regex with exclusion": {"r": 4, "target_modules": r".*_proj", "exclude_modules": r".*\.1\.mlp\..*"},
    "lm_head": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    "embedding": {"r": 4, "target_modules": ["embed_tokens"]},
    "embedding and lm_head, rslora": {"r": 5, "use_rslora": True, "target_modules": ["embed_tokens", "lm_head"]},
    "dropout and initialisation": {
        "r": 4,
        "target_modules": ["q_proj"],
        "lora_dropout": 0.5,
        "init_lora_weights": "gaussian",
    },
    "orthogonal": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "mica": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "mica"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_deltas_equal_those_of_peft(name: str, tmp_path: Path) -> None:
    save_peft(tmp_path, **CONFIGS[name])
    adapter = load_peft_adapter(tmp_path, SHAPES)
    paths = {(place.projection, place.layer): path for path, place in PLACES.items()}
    ours = {paths[place]: pair.scale * (pair.b @ pair.a) for place, pair in adapter.lora.pairs.items()}
    theirs = peft_deltas(load_peft(tmp_path))
    assert set(ours) == set(theirs)
    for module, delta in theirs.items():
        torch.testing.assert_close(ours[module], delta, rtol=1e-5, atol=1e-5, msg=f"{module}: deltas differ")


def test_report_of_mixed_ranks(tmp_path: Path) -> None:
    save_peft(tmp_path, r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"], rank_pattern={"q_proj": 16})
    report = load_peft_adapter(tmp_path, SHAPES).report
    assert report.ranks == (4, 16)
    assert report.scales == (0.5, 2.0)
    assert report.modules == ("q", "v")
    assert report.n_modules == 4
    assert report.dtype == "float32"
    assert report.nbytes == 4 * sum(2 * (rank * (32 + out)) for rank, out in ((16, 32), (4, 16)))
    assert report.warnings == ()


def test_overlapping_alpha_patterns_are_warned_about(tmp_path: Path) -> None:
    save_peft(tmp_path, r=4, target_modules=["q_proj"], alpha_pattern={"q_proj": 3, "layers.0.self_attn.q_proj": 9})
    (warning,) = load_peft_adapter(tmp_path, SHAPES).report.warnings
    assert "layers.0.self_attn.q_proj" in warning


def test_copy_of_the_embedding_is_compared_with_the_base(tmp_path: Path) -> None:
    save_peft(tmp_path, r=4, target_modules=["embed_tokens"])
    model = tiny_model()
    same = load_peft_adapter(tmp_path, SHAPES, base=HfBase(model))
    assert same.report.warnings == ()
    assert len(load_peft_adapter(tmp_path, SHAPES).report.warnings) == 1
    with torch.no_grad():
        model.model.embed_tokens.weight += 1
    with pytest.raises(AdapterRefused, match=r"embed_tokens\.base_layer\.weight \(largest difference 1\)"):
        load_peft_adapter(tmp_path, SHAPES, base=HfBase(model))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_copy_of_an_embedding_that_the_server_rounded(kind: torch.dtype, tmp_path: Path) -> None:
    save_peft(tmp_path, r=4, target_modules=["embed_tokens"])
    assert load_peft_adapter(tmp_path, SHAPES, base=HfBase(tiny_model().to(kind))).report.warnings == ()
