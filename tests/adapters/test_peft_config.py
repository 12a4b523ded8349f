"""Classification of every field of PEFT's configs, torch-free, and what is made of their values."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from manylora.adapters.peft_config import ParsedConfig, parse_config
from manylora.adapters.peft_types import REFUSED, SERVED
from tests.adapters.peft_dirs import plain_config

# A non-default value of every field of a LoRA that is refused, as PEFT would write it.
REFUSED_VALUES: dict[str, list[Any]] = {
    "modules_to_save": [["score"], ["lm_head", "norm"], "score"],
    "trainable_token_indices": [{"score": [3]}],
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
    "bias": ["vera_only", None, 3],
    "task_type": ["SEQ_CLS", "TOKEN_CLS"],
    "init_lora_weights": ["pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "lora_ga", "loftq", "newest_idea", 3],
    "made_up_field": [True, 1, 0, "x", ["x"], {"x": 1}],
}


def parse(**changes: Any) -> ParsedConfig:
    return parse_config(json.dumps(plain_config(**changes)).encode())


def test_every_type_of_the_installed_peft_is_known() -> None:
    from peft import PeftType

    assert not SERVED.keys() & REFUSED.keys()
    # Bone was in earlier versions.
    assert {kind.value for kind in PeftType} == (SERVED.keys() | REFUSED.keys()) - {"BONE"}


@pytest.mark.parametrize("peft_type", SERVED)
def test_every_field_of_the_installed_peft_is_classified_once(peft_type: str) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    served = SERVED[peft_type]
    tables = [served.handled, set(served.harmless), set(served.refused), set(served.refused_unless_none)]
    classified = set().union(*tables)
    assert sum(map(len, tables)) == len(classified)
    assert {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type])} <= classified


def test_a_default_peft_config_is_accepted() -> None:
    from peft import LoraConfig

    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict() | {"target_modules": ["q_proj"]}
    parsed = parse_config(json.dumps(config).encode())
    assert parsed.reasons == ()
    assert parsed.adapter is not None
    assert parsed.adapter.r == 8


@pytest.mark.parametrize("name", ["use_dora", "lora_bias", "use_rslora", "ensure_weight_tying"])
def test_served_switches(name: str) -> None:
    parsed = parse(**{name: True})
    assert parsed.reasons == ()
    assert getattr(parsed.adapter, name) is True


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED_VALUES.items() for value in values]
)
def test_refused_by_name(name: str, value: Any) -> None:
    parsed = parse(**{name: value})
    assert len(parsed.reasons) == 1
    assert parsed.reasons[0].startswith(f"{name} = ")
    assert parsed.refused_fields == {name}
    assert parsed.adapter is not None, "the tensors are still looked at"


@pytest.mark.parametrize("name", ["pissa", "olora", "corda", "lora_ga"])
def test_base_changing_initialisations_name_the_conversion(name: str) -> None:
    assert "path_initial_model_for_weight_conversion" in parse(init_lora_weights=name).reasons[0]


@pytest.mark.parametrize("name", sorted(SERVED["LORA"].harmless))
@pytest.mark.parametrize("value", [None, "anything", 3, {"x": 1}])
def test_harmless_whatever_the_value(name: str, value: Any) -> None:
    assert parse(**{name: value}).reasons == ()


@pytest.mark.parametrize("value", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_harmless_initialisations(value: Any) -> None:
    assert parse(init_lora_weights=value).reasons == ()


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_unknown_fields_that_are_not_set_are_ignored(value: Any) -> None:
    assert parse(future_feature=value).reasons == ()


@pytest.mark.parametrize("peft_type", sorted(REFUSED))
def test_other_methods_are_refused_by_name(peft_type: str) -> None:
    parsed = parse(peft_type=peft_type, its_own_field=3)
    assert parsed.adapter is None
    assert parsed.reasons == (f'peft_type = "{peft_type}": {REFUSED[peft_type]}, is not served',)


@pytest.mark.parametrize("peft_type", ["NEWEST", "lora", 3, ["LORA"]])
def test_unknown_types(peft_type: Any) -> None:
    (reason,) = parse(peft_type=peft_type).reasons
    assert reason.startswith(
        f"peft_type = {json.dumps(peft_type)}: no type that this server knows, is not served (LORA"
    )


def test_no_type() -> None:
    (reason,) = parse(peft_type=None).reasons
    assert reason.startswith("adapter_config.json has no peft_type; LORA, ADALORA, VERA")


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
        ({"trainable_token_indices": [1, "2"]}, 'trainable_token_indices of embed_tokens = [1, "2"]: must be a list'),
        ({"trainable_token_indices": {"lm_head": 3}}, "trainable_token_indices of lm_head = 3: must be a list"),
        ({"trainable_token_indices": [4, 4]}, "names a token twice"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias cannot be combined with use_dora"),
        ({"peft_type": "ADALORA", "init_r": 0}, "init_r = 0: a rank must be"),
        ({"peft_type": "ADALORA", "rank_pattern": {"q_proj": 3}}, "rank_pattern['q_proj']: AdaLoRA lists true and"),
        ({"peft_type": "ADALORA", "rank_pattern": {"q.lora_E": [1]}}, "AdaLoRA lists true and false for a lora_E"),
        ({"peft_type": "ADALORA", "rank_pattern": {"q.lora_E": [True]}}, "has 1 entries, init_r is 12"),
        ({"peft_type": "LOKR", "decompose_factor": 1.5}, "decompose_factor = 1.5: must be an integer"),
        ({"peft_type": "TRAINABLE_TOKENS"}, "token_indices = null: must be a list of token ids"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 1}, "cannot be combined with a target_modules"),
    ],
)
def test_malformed_values(changes: dict[str, Any], reason: str) -> None:
    parsed = parse(**changes)
    assert parsed.adapter is None
    assert any(reason in found for found in parsed.reasons), parsed.reasons


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"x"', "\xff", "[" * 100_000])
def test_malformed_files(text: str) -> None:
    parsed = parse_config(text.encode("latin-1"))
    assert parsed.adapter is None
    assert len(parsed.reasons) == 1


def test_all_reasons_at_once() -> None:
    parsed = parse(use_qalora=True, bias="some", init_lora_weights="pissa", modules_to_save=["norm"], surprise=1)
    assert len(parsed.reasons) == 5


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


@pytest.mark.parametrize(
    ("peft_type", "changes", "reason"),
    [
        ("VERA", {"save_projection": False}, "save the adapter again with save_projection=True"),
        ("VERA", {"exclude_modules": ["x"]}, 'exclude_modules = ["x"]: a field this server does not know'),
        ("LOHA", {"use_effective_conv2d": True}, "use_effective_conv2d = true: a decomposition of convolutions"),
        ("LOKR", {"use_effective_conv2d": True}, "use_effective_conv2d = true: a decomposition of convolutions"),
        ("LOHA", {"use_dora": True}, "use_dora = true: a field this server does not know"),
        ("ADALORA", {"use_dora": True}, "use_dora = true: AdaLoRA has no DoRA"),
        ("ADALORA", {"alora_invocation_tokens": [1]}, "alora_invocation_tokens = [1]: aLoRA"),
    ],
)
def test_refused_of_other_types(peft_type: str, changes: dict[str, Any], reason: str) -> None:
    config = without(plain_config(peft_type=peft_type, **changes), "lora_alpha", "bias")
    if peft_type == "ADALORA":
        config["lora_alpha"] = 8
    (found,) = parse_config(json.dumps(config).encode()).reasons
    assert reason in found


def test_half_a_surrogate_pair_is_refused() -> None:
    """No answer that names it could be sent."""
    (reason,) = parse_config(b'{"peft_type": "LORA", "base_model_name_or_path": "\\ud800"}').reasons
    assert reason.startswith("adapter_config.json is not valid JSON")
    reason.encode()
