"""Classification of every field of PEFT's LoraConfig, torch-free."""

from __future__ import annotations

import json
from typing import Any

import pytest

from manylora.adapters.peft_config import (
    HANDLED,
    HARMLESS,
    REFUSED_UNLESS_FALSY,
    REFUSED_UNLESS_NONE,
    ParsedConfig,
    parse_config,
)
from tests.adapters.peft_dirs import plain_config

# A non-default value of every field that is refused, as PEFT would write it.
REFUSED: dict[str, list[Any]] = {
    "use_dora": [True],
    "lora_bias": [True],
    "fan_in_fan_out": [True],
    "modules_to_save": [["lm_head"], ["score"]],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [3]}],
    "megatron_config": [{"hidden_size": 8}],
    "layer_replication": [[[0, 2], [1, 2]]],
    "target_parameters": [["mlp.experts.gate_up_proj"]],
    "use_qalora": [True],
    "enable_lora": [[True, False, True]],
    "alora_invocation_tokens": [[1, 2], []],
    "use_bdlora": [{}, {"nblocks": 2}],
    "arrow_config": [{}, {"top_k": 3}],
    "kasa_config": [{}],
    "velora_config": [{}],
    "monteclora_config": [{}],
    "bias": ["all", "lora_only", None],
    "task_type": ["SEQ_CLS", "TOKEN_CLS"],
    "init_lora_weights": ["pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "lora_ga", "loftq", "newest_idea", 3],
    "made_up_field": [True, 1, 0, "x", ["x"], {"x": 1}],
}


def parse(**changes: Any) -> ParsedConfig:
    return parse_config(json.dumps(plain_config(**changes)).encode())


def test_every_field_of_the_installed_peft_is_classified_once() -> None:
    import dataclasses

    from peft import LoraConfig

    tables = [HANDLED, set(HARMLESS), set(REFUSED_UNLESS_FALSY), set(REFUSED_UNLESS_NONE)]
    classified = set().union(*tables)
    assert sum(map(len, tables)) == len(classified)
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= classified


def test_a_default_peft_config_is_accepted() -> None:
    from peft import LoraConfig

    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict() | {"target_modules": ["q_proj"]}
    parsed = parse_config(json.dumps(config).encode())
    assert parsed.reasons == ()
    assert parsed.lora is not None
    assert parsed.lora.r == 8


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_refused_by_name(name: str, value: Any) -> None:
    parsed = parse(**{name: value})
    assert len(parsed.reasons) == 1
    assert parsed.reasons[0].startswith(f"{name} = ")
    assert parsed.refused_fields == {name}
    assert parsed.lora is not None, "the tensors are still looked at"


@pytest.mark.parametrize("name", ["pissa", "olora", "corda", "lora_ga"])
def test_base_changing_initialisations_name_the_conversion(name: str) -> None:
    assert "path_initial_model_for_weight_conversion" in parse(init_lora_weights=name).reasons[0]


@pytest.mark.parametrize("name", sorted(HARMLESS))
@pytest.mark.parametrize("value", [None, "anything", 3, {"x": 1}])
def test_harmless_whatever_the_value(name: str, value: Any) -> None:
    assert parse(**{name: value}).reasons == ()


@pytest.mark.parametrize("value", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_harmless_initialisations(value: Any) -> None:
    assert parse(init_lora_weights=value).reasons == ()


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_unknown_fields_that_are_not_set_are_ignored(value: Any) -> None:
    assert parse(future_feature=value).reasons == ()


@pytest.mark.parametrize(
    "peft_type",
    ["ADALORA", "VERA", "LOHA", "LOKR", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "OFT", "BOFT", "XLORA"],
)
def test_other_methods_are_refused_by_name(peft_type: str) -> None:
    parsed = parse(peft_type=peft_type, its_own_field=3)
    assert parsed.lora is None
    assert parsed.reasons == (f'adapter_config.json has peft_type "{peft_type}"; only LORA is served',)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 0}, "r = 0: a rank must be an integer from 1 to 256"),
        ({"r": 257}, "r = 257: a rank must be"),
        ({"r": True}, "r = true: a rank must be"),
        ({"r": "8"}, 'r = "8": a rank must be'),
        ({"r": 8.0}, "r = 8.0: a rank must be"),
        ({"lora_alpha": None}, "lora_alpha = null: an alpha must be a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha = NaN: an alpha must be"),
        ({"lora_alpha": float("inf")}, "lora_alpha = Infinity: an alpha must be"),
        ({"lora_alpha": 10**400}, "an alpha must be"),
        ({"use_rslora": "yes"}, 'use_rslora = "yes": must be true or false'),
        ({"rank_pattern": ["q_proj"]}, 'rank_pattern = ["q_proj"]: must be an object'),
        ({"rank_pattern": {"q_proj": 300}}, "rank_pattern['q_proj'] = 300: a rank must be"),
        ({"alpha_pattern": {"q_proj": "1"}}, "alpha_pattern['q_proj'] = \"1\": an alpha must be"),
        ({"rank_pattern": {"q_(proj": 3}}, 'rank_pattern: "q_(proj" is not a regular expression'),
        ({"target_modules": r"(.*"}, "target_modules: "),
        ({"exclude_modules": r"[z-a]"}, "exclude_modules: "),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": []}, "target_modules is missing"),
        ({"target_modules": [1]}, "target_modules = [1]: must be a string or a list of strings"),
        ({"target_modules": {"q": 1}}, "must be a string or a list of strings"),
        ({"layers_to_transform": "1"}, 'layers_to_transform = "1": must be an integer or a list of integers'),
        ({"layers_to_transform": [True]}, "must be an integer or a list of integers"),
        ({"layers_pattern": "layers"}, "layers_pattern is set without layers_to_transform"),
        ({"layers_pattern": "(", "layers_to_transform": 1}, "layers_pattern: "),
        ({"target_modules": ".*q_proj", "layers_to_transform": 1}, "cannot be combined with a target_modules"),
    ],
)
def test_malformed_values(changes: dict[str, Any], reason: str) -> None:
    parsed = parse(**changes)
    assert parsed.lora is None
    assert any(reason in found for found in parsed.reasons), parsed.reasons


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"x"', "\xff", "[" * 100_000])
def test_malformed_files(text: str) -> None:
    parsed = parse_config(text.encode("latin-1"))
    assert parsed.lora is None
    assert len(parsed.reasons) == 1


def test_all_reasons_at_once() -> None:
    parsed = parse(use_dora=True, bias="all", init_lora_weights="pissa", modules_to_save=["lm_head"], surprise=1)
    assert len(parsed.reasons) == 5
