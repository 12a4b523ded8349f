"""What is refused of each kind, with its message, and that no config can lie about its tensors."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, TrainableTokensConfig, VeraConfig
from safetensors.torch import load_file, save_file

from manylora.adapters.errors import AdapterRefused
from manylora.adapters.peft_loader import check_peft_adapter, load_peft_adapter
from tests.adapters.peft_dirs import SHAPES, HfBase, plain_config, plain_tensors, save_peft, tiny_model, write_dir

TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"
EMBED = "base_model.model.model.embed_tokens"
HEAD = "base_model.model.lm_head"
CONFIGS: dict[str, Any] = {
    "LoRA": lambda: LoraConfig(r=3, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, **TASK),
    "DoRA": lambda: LoraConfig(r=3, target_modules=["q_proj", "lm_head"], use_dora=True, **TASK),
    "biases": lambda: LoraConfig(r=3, target_modules=["q_proj"], bias="all", lora_bias=True, **TASK),
    "AdaLoRA": lambda: AdaLoraConfig(init_r=3, total_step=9, target_modules=["q_proj", "v_proj"], **TASK),
    "VeRA": lambda: VeraConfig(r=3, target_modules=["q_proj", "down_proj"], **TASK),
    "LoHa": lambda: LoHaConfig(r=3, target_modules=["q_proj", "v_proj"], **TASK),
    "LoKr": lambda: LoKrConfig(r=2, decompose_factor=4, target_modules=["q_proj", "down_proj"], **TASK),
    "tables": lambda: LoraConfig(
        r=3, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[5, 2], **TASK
    ),
    "tokens": lambda: TrainableTokensConfig(token_indices=[5, 2], **TASK),
}


def reasons(path: Path, *, family: str = "Qwen2", tied: bool = False, base: bool = True) -> tuple[str, ...]:
    with pytest.raises(AdapterRefused) as caught:
        load_peft_adapter(path, SHAPES, base=base_of(family, tied=tied) if base else None)
    return caught.value.reasons


def written(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors of an adapter that PEFT wrote for the tiny Qwen2."""
    config, tensors = _written(kind)
    write_dir(path, config, tensors)
    return config, dict(tensors)


@functools.cache
def _written(kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        save_peft(path, peft_config=CONFIGS[kind](), model=tiny_model("Qwen2"))
        return json.loads((path / "adapter_config.json").read_text()), load_file(path / "adapter_model.safetensors")


@functools.cache
def base_of(family: str = "Qwen2", *, tied: bool = False) -> HfBase:
    return HfBase(tiny_model(family, tied=tied))


# --- refusals by name ------------------------------------------------------------------------------------------------


def edit(path: Path, kind: str, config: dict[str, Any], **tensors: torch.Tensor | None) -> Path:
    """What PEFT wrote, with some fields and tensors changed; None removes one. ``__`` in a name stands for a dot."""
    old_config, old_tensors = written(path, kind)
    for name, value in tensors.items():
        full = name.replace("__", ".")
        if value is None:
            del old_tensors[full]
        else:
            old_tensors[full] = value
    return write_dir(path, old_config | config, old_tensors)


def test_ranks_that_a_product_would_need(tmp_path: Path) -> None:
    """With modules of thousands of channels; the tiny ones have no rank above 64."""
    from manylora.adapters.adapter_config import AdapterConfig
    from manylora.adapters.kinds.kind import Place
    from manylora.adapters.kinds.loha import LoHa
    from manylora.adapters.kinds.lokr import LoKr
    from manylora.adapters.peft_targets import Targets

    place = Place("model.layers.0.self_attn.q_proj", "q", 0, 4096, 4096)
    config = AdapterConfig("LOHA", Targets(("q_proj",)), r=64, alpha=8)
    assert LoHa(config).rank(place) == 4096
    assert LoKr(config).rank(place) == 4096
    assert LoKr(AdapterConfig("LOKR", Targets(("q_proj",)), r=8, alpha=8)).rank(place) == 64 * 8


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "ADALORA"])
def test_a_rank_that_is_too_high_is_named(kind: str, tmp_path: Path) -> None:
    from manylora.kernels.sites import LoraShapes

    width = 1024
    shapes = LoraShapes(1, dict.fromkeys(SHAPES.in_features, width), dict.fromkeys(SHAPES.in_features, width))
    config = {"peft_type": kind, "target_modules": ["q_proj"], "r": 32, "alpha": 8, "init_r": 300, "task_type": None}
    config = {k: v for k, v in config.items() if kind == "ADALORA" or k != "init_r"}
    if kind == "ADALORA":
        config.pop("alpha")
    part = {"LOHA": "hada_w1_a", "LOKR": "lokr_w1", "ADALORA": "lora_A"}[kind]
    with pytest.raises(AdapterRefused) as caught:
        load_peft_adapter(write_dir(tmp_path, config, {f"{STEM}.{part}": torch.ones(1)}), shapes)
    name, rank = {"LOHA": ("LoHa", 1024), "LOKR": ("LoKr", 32 * 32), "ADALORA": ("AdaLoRA", 300)}[kind]
    assert caught.value.reasons[0] == (
        "deltas of a rank above 256, the highest that is served: "
        f"model.layers.0.self_attn.q_proj as a {name} has the rank {rank}"
    )


@pytest.mark.parametrize(
    ("kind", "config", "tensors", "reason"),
    [
        ("DoRA", {}, {f"{STEM}.lora_magnitude_vector": None}, "q_proj has no lora_magnitude_vector"),
        ("DoRA", {"use_dora": False}, {}, f"{STEM}.lora_magnitude_vector (use_dora is not set)"),
        ("DoRA", {}, {f"{STEM}.lora_magnitude_vector": torch.ones(31)}, "has shape [31], expected [32]"),
        ("biases", {}, {f"{STEM}.lora_B.bias": None}, "q_proj has no lora_B.bias"),
        ("biases", {"lora_bias": False}, {}, f"{STEM}.lora_B.bias (lora_bias is not set)"),
        ("biases", {"bias": "none"}, {}, "trained biases that the config does not announce (its bias is none)"),
        ("biases", {"bias": "lora_only"}, {}, "does not announce (its bias is targets): base_model.model.model.layers"),
        ("biases", {}, {f"{STEM}.base_layer.bias": None}, "biases that the config says were trained and that have no"),
        ("biases", {}, {f"{STEM}.base_layer.bias": torch.ones(3)}, "base_layer.bias has shape [3], expected [32]"),
        ("biases", {}, {STEM.replace("q_", "o_") + ".bias": torch.ones(32)}, "tensors that match no module of the"),
        ("biases", {}, {f"{STEM}.bias": torch.ones(32), f"{STEM}.base_layer.bias": None}, "match no module of the"),
        ("AdaLoRA", {}, {f"{STEM}.lora_E": None}, "q_proj has no lora_E"),
        ("AdaLoRA", {"init_r": 4}, {}, "(rank 3 in the file, 4 by the config's r and rank_pattern)"),
        (
            "AdaLoRA",
            {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True, False, False]}},
            {},
            "rank 3 in",
        ),
        ("AdaLoRA", {"rank_pattern": {"score.lora_E": [True] * 3}}, {}, "modules of rank_pattern that have no tensors"),
        (
            "VeRA",
            {},
            {"base_model.vera_A": None},
            "not in the file (save_projection): base_model.vera_A",
        ),
        ("VeRA", {}, {"base_model.vera_B": torch.ones(31, 3)}, "base_model.vera_B has shape [31, 3], expected [32, 3]"),
        ("VeRA", {"r": 4}, {}, "(rank 3 in the file, 4 by"),
        ("LoHa", {}, {f"{STEM}.hada_t1": torch.ones(3, 3, 1, 1)}, "tensors of convolutions, which are not served"),
        ("LoKr", {}, {f"{STEM}.lokr_w1": None}, "q_proj has no lokr_w1"),
        ("LoKr", {"decompose_factor": 8}, {}, "expected [8, 8]"),
        ("LoKr", {"decompose_both": True, "r": 1}, {}, "tensors that the config does not announce"),
        ("tables", {"modules_to_save": None}, {}, "copies of base weights that differ"),
        ("tables", {}, {f"{HEAD}.weight": None}, "have no tensors: lm_head of modules_to_save"),
        ("tables", {}, {f"{HEAD}.weight": torch.ones(66, 32)}, "was the vocabulary resized for training? added tokens"),
        ("tables", {"modules_to_save": ["lm_head", "embed_tokens"]}, {}, "model.embed_tokens of modules_to_save"),
        ("tables", {"trainable_token_indices": [5, 2, 1]}, {}, "has shape [2, 32], expected [3, 32] (3 token ids)"),
        (
            "tables",
            {"trainable_token_indices": [5, 64]},
            {},
            "(added tokens are not served): model.embed_tokens",
        ),
        ("tables", {"trainable_token_indices": [5, -1]}, {}, "has the ids 0 to 63, and the config lists -1"),
        ("tables", {"trainable_token_indices": None}, {}, "retrained tokens that the config does not announce"),
        ("tables", {"trainable_token_indices": {"lm_head": [5, 2]}}, {}, "lm_head of trainable_token_indices"),
        ("tokens", {"target_modules": ["embed_tokens", "lm_head"]}, {}, "lm_head of trainable_token_indices"),
        ("tokens", {"target_modules": ["q_proj"]}, {}, "retrained tokens that the config does not announce"),
    ],
)
def test_refused_with_its_reason(
    kind: str, config: dict[str, Any], tensors: dict[str, torch.Tensor | None], reason: str, tmp_path: Path
) -> None:
    found = reasons(edit(tmp_path, kind, config, **tensors))
    assert any(reason in text for text in found), found


def test_tables_replaced_twice(tmp_path: Path) -> None:
    config = {"trainable_token_indices": {"lm_head": [5, 2]}}
    rows = torch.ones(2, 32)
    path = edit(tmp_path, "tables", config, **{f"{HEAD}.token_adapter.trainable_tokens_delta": rows})
    assert "tables replaced as a whole and by tokens at once: lm_head" in reasons(path)


def test_delta_and_rows_of_one_module(tmp_path: Path) -> None:
    """PEFT ties the tokens to an output layer that has factors of its own, whichever it then computes."""
    config = plain_config(target_modules=["lm_head"], trainable_token_indices=[3])
    tensors = {
        f"{HEAD}.lora_A.weight": torch.ones(4, 32),
        f"{HEAD}.lora_B.weight": torch.ones(64, 4),
        f"{EMBED}.token_adapter.trainable_tokens_delta": torch.ones(1, 32),
    }
    path = write_dir(tmp_path, config, tensors)
    assert "modules with both a delta and replaced rows, which is not served: lm_head" in reasons(path, tied=True)
    load_peft_adapter(path, SHAPES, base=base_of("Llama"))


@pytest.mark.parametrize("what", ["factors", "tables", "tokens"])
def test_tied_tables_that_differ(what: str, tmp_path: Path) -> None:
    tying = {"ensure_weight_tying": True}
    if what == "factors":
        config = plain_config(target_modules=["embed_tokens"], **tying)
        tensors = {
            f"{EMBED}.lora_embedding_A": torch.ones(4, 64),
            f"{EMBED}.lora_embedding_B": torch.ones(32, 4),
            f"{HEAD}.lora_A.weight": torch.ones(4, 32),
            f"{HEAD}.lora_B.weight": torch.ones(64, 4) * 2,
        }
    elif what == "tables":
        config = plain_config(modules_to_save=["embed_tokens"], **tying)
        tensors = plain_tensors() | {f"{EMBED}.weight": torch.ones(64, 32), f"{HEAD}.weight": torch.zeros(64, 32)}
    else:
        config = plain_config(trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}, **tying)
        delta = "token_adapter.trainable_tokens_delta"
        tensors = plain_tensors() | {f"{EMBED}.{delta}": torch.ones(1, 32), f"{HEAD}.{delta}": torch.ones(1, 32)}
    (reason,) = reasons(write_dir(tmp_path, config, tensors), family="Llama", tied=True)
    assert reason.startswith("ensure_weight_tying = true: ")


def test_tokens_of_tied_tables_that_differ(tmp_path: Path) -> None:
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1], "target_modules": ["embed_tokens"]}
    tensors = {
        f"{EMBED}.trainable_tokens_delta": torch.ones(1, 32),
        f"{HEAD}.trainable_tokens_delta": torch.zeros(1, 32),
    }
    path = write_dir(tmp_path, config, tensors)
    assert reasons(path, tied=True) == ("retrained tokens that differ between tied tables: lm_head",)


@pytest.mark.parametrize("kind", ["ADALORA", "VERA", "LOHA", "LOKR"])
def test_kinds_that_peft_has_not_on_the_embedding(kind: str, tmp_path: Path) -> None:
    part = {"ADALORA": "lora_E", "VERA": "vera_lambda_b", "LOHA": "hada_w1_a", "LOKR": "lokr_w1"}[kind]
    config = {"peft_type": kind, "target_modules": ["embed_tokens"]}
    found = reasons(write_dir(tmp_path, config, {f"{EMBED}.{part}": torch.ones(1)}))
    assert any("on the embedding, which PEFT does not have" in reason for reason in found)


def test_lora_bias_on_the_embedding(tmp_path: Path) -> None:
    tensors = {f"{EMBED}.lora_embedding_A": torch.ones(4, 64), f"{EMBED}.lora_embedding_B": torch.ones(32, 4)}
    found = reasons(write_dir(tmp_path, plain_config(target_modules=["embed_tokens"], lora_bias=True), tensors))
    assert any("lora_bias on the embedding" in reason for reason in found)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_values_that_are_not_finite(kind: str, tmp_path: Path) -> None:
    config, tensors = written(tmp_path, kind)
    for name, tensor in tensors.items():
        bad = tensor.clone()
        bad.view(-1)[-1] = float("nan")
        path = write_dir(tmp_path / "bad", config, tensors | {name: bad})
        assert f"values that are not finite: 1 in {name}" in reasons(path), name


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("LoRA", ["lora_A.weight", "lora_B.weight"]),
        ("DoRA", ["lora_A.weight", "lora_B.weight"]),
        ("biases", ["lora_B.bias"]),
        ("AdaLoRA", ["lora_A", "lora_E"]),
        ("LoHa", ["hada_w1_a", "hada_w2_a"]),
        ("LoKr", ["lokr_w1", "lokr_w2_a"]),
    ],
)
def test_finite_values_whose_products_are_not(kind: str, parts: list[str], tmp_path: Path) -> None:
    config, tensors = written(tmp_path, kind)
    for part in parts:
        tensors[f"{STEM}.{part}"] = torch.full_like(tensors[f"{STEM}.{part}"], 3e38)
    found = reasons(write_dir(tmp_path, config, tensors))
    assert any(r.startswith("values that overflow: model.layers.0.self_attn.q_proj: ") for r in found), found


def test_an_alpha_that_makes_it_overflow(tmp_path: Path) -> None:
    tensors = {name: value * 1e16 for name, value in plain_tensors().items()}
    assert "values that overflow" in reasons(write_dir(tmp_path, plain_config(lora_alpha=1e9), tensors))[0]
    write_dir(tmp_path, plain_config(lora_alpha=1.0), tensors)
    load_peft_adapter(tmp_path, SHAPES)


def test_dora_of_a_row_that_vanishes(tmp_path: Path) -> None:
    """W + B A is zero there: its norm too."""
    model = tiny_model()
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    tensors = {
        f"{STEM}.lora_A.weight": weight[:1].clone(),
        f"{STEM}.lora_B.weight": -torch.eye(32)[:, :1],
        f"{STEM}.lora_magnitude_vector": torch.ones(32),
    }
    config = plain_config(r=1, lora_alpha=1, use_dora=True, target_modules=["model.layers.0.self_attn.q_proj"])
    (reason,) = reasons(write_dir(tmp_path, config, tensors), family="Llama")
    assert reason == "values that overflow: model.layers.0.self_attn.q_proj: its gain is not finite"


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in ("tables", "tokens")])
def test_untrained_is_refused(kind: str, tmp_path: Path) -> None:
    """As PEFT makes it, before any training: it does nothing."""
    import warnings

    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(tiny_model("Qwen2"), CONFIGS[kind]()).save_pretrained(tmp_path)
    found = reasons(tmp_path)
    assert any("the delta is exactly zero in every module" in reason for reason in found), found


# --- without the base ------------------------------------------------------------------------------------------------

NEEDS = {
    "DoRA": "the norms of a DoRA",
    "biases": "the biases that were trained",
    "tables": "tables that the base may tie",
    "tokens": "tables that the base may tie",
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_the_base(kind: str, tmp_path: Path) -> None:
    """Checked as far as it goes, but never loaded without what is needed."""
    written(tmp_path, kind)
    report = check_peft_adapter(tmp_path, SHAPES)
    assert report.kind == {"biases": "LoRA", "tables": "LoRA", "tokens": "trainable tokens"}.get(kind, kind)
    if kind not in NEEDS:
        load_peft_adapter(tmp_path, SHAPES)
        return
    assert any(NEEDS[kind] in warning for warning in report.warnings)
    assert reasons(tmp_path, base=False) == (f"the base's own weights are needed for {NEEDS[kind]}",)


# --- a config that lies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_config_that_lies_about_its_tensors_is_refused(kind: str, data: st.DataObject, tmp_path: Path) -> None:
    """One tensor is missing, renamed to another module, or of another shape."""
    directory = tmp_path / "true"
    if not directory.is_dir():
        written(directory, kind)
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    load_peft_adapter(directory, SHAPES, base=base_of())
    copies = {name for name in tensors if name.endswith("base_layer.weight")}  # say nothing of their own
    name = data.draw(st.sampled_from(sorted(tensors.keys() - copies)))
    match data.draw(st.sampled_from(["remove", "rename", "widen", "cut", "turn", "double"])):
        case "remove":
            del tensors[name]
        case "rename":
            other = data.draw(st.sampled_from(["layers.7.", "layers.1.mlp.", "x."]))
            tensors[name.replace("layers.0.self_attn.", other) if "layers.0.self" in name else f"{name}x"] = (
                tensors.pop(name)
            )
        case "widen":
            tensors[name] = torch.cat([tensors[name], tensors[name]])
        case "cut":
            tensors[name] = tensors[name][:-1].clone()
        case "turn":
            shape = tuple(reversed(tensors[name].shape))
            tensors[name] = tensors[name].reshape(shape if shape != tensors[name].shape else (1, *shape))
        case "double":
            tensors[name] = tensors[name].double()
    lying = tmp_path / "lying"
    lying.mkdir(exist_ok=True)
    (lying / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, lying / "adapter_model.safetensors")
    assert reasons(lying)


LIES = {
    "r": [1, 4, 64], "init_r": [2, 64], "target_modules": [["q_proj", "k_proj"], ["o_proj"], ".*k_proj"],
    "rank_pattern": [{"q_proj": 5}], "layers_to_transform": [[0], [1]], "exclude_modules": [["q_proj"]],
    "modules_to_save": [["embed_tokens"]], "use_dora": [True, False], "lora_bias": [True, False],
    "bias": ["none", "all"], "peft_type": ["LORA", "ADALORA", "VERA", "LOHA", "LOKR", "TRAINABLE_TOKENS"],
    "decompose_factor": [2, -1], "decompose_both": [True], "save_projection": [False],
    "trainable_token_indices": [[1], {"embed_tokens": [5, 2, 7]}], "token_indices": [[1, 2, 3]],
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_field_that_lies_is_refused(kind: str, tmp_path: Path) -> None:
    """Every field that says something about the tensors, with another value."""
    config, tensors = written(tmp_path, kind)
    for field, values in LIES.items():
        for value in values:
            if field not in config or config[field] == value:
                continue
            if (field, kind) in (("lora_bias", "AdaLoRA"), ("r", "AdaLoRA"), ("decompose_both", "LoKr")):
                continue  # without a meaning: of LoRA only; where the rank is too high to be split
            path = write_dir(tmp_path / "lying", config | {field: value}, tensors)
            assert reasons(path), (field, value)
