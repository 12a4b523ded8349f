"""Configs into `ModelSpec`: what transformers makes of them, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from manylora.kernels.sites import LAYER_PROJECTIONS
from manylora.server.model.checkpoint import read_json
from manylora.server.model.errors import UnsupportedModel
from manylora.server.model.families import ARCHITECTURES, ModelSpec, RopeSpec, rope_inv_freq
from manylora.server.model.layout import projection_weight

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
SMOLLM3 = LLAMA | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}
CONFIGS = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3}
PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 0}
GEMMA2 = LLAMA | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
GEMMA3 = LLAMA | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 320,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
}
NEWER = {"smollm3": SMOLLM3, "phi3": PHI3, "gemma2": GEMMA2, "gemma3_text": GEMMA3}
"""Families whose saved models are compared in tests/e2e/test_family_parity.py."""


def test_families_are_read_without_torch() -> None:
    code = "import sys, manylora.server.model.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("family", [*CONFIGS, *NEWER])
def test_what_a_config_leaves_out_is_transformers_default(family: str) -> None:
    given = {**CONFIGS, **NEWER}[family]
    spec = ModelSpec.from_hf_config(given)
    config = transformers.AutoConfig.for_model(**given)
    assert spec.family == family
    assert spec.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    rope = config.rope_parameters
    assert spec.rope.theta == rope.get("full_attention", rope)["rope_theta"]
    assert spec.tie_embeddings == config.tie_word_embeddings
    assert spec.sliding_window == getattr(config, "sliding_window", None)
    for key, value in (
        ("attn_logit_softcapping", spec.attention_softcap),
        ("final_logit_softcapping", spec.logit_softcap),
    ):
        assert value == (getattr(config, key, None) or 0.0)
    scalar = getattr(config, "query_pre_attn_scalar", None)
    assert spec.attention_scale == (None if scalar is None else scalar**-0.5)
    if hasattr(config, "layer_types") and config.layer_types:
        assert list(spec.layer_types) == config.layer_types


@pytest.mark.parametrize("family", CONFIGS)
def test_a_saved_config_reads_the_same(family: str, checkpoints: dict[str, Path]) -> None:
    """transformers 5 writes the rope parameters nested and the layer types out; shapes are those of its modules."""
    spec = ModelSpec.from_hf_config(read_json(checkpoints[family] / "config.json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints[family])
    assert spec.eos_token_ids == (258,)
    assert spec.bos_token_id == 257
    assert spec.dtype == "bfloat16"
    names = dict(model.named_parameters())
    shapes = spec.lora_shapes()
    for projection in LAYER_PROJECTIONS:
        weight = projection_weight(projection, 1)
        assert tuple(names[weight].shape) == (shapes.out_features[projection], shapes.in_features[projection])
        assert (weight.replace("weight", "bias") in names) == spec.has_bias(projection)
    assert spec.qk_norm == any("q_norm" in name for name in names)
    assert tuple(names["model.embed_tokens.weight"].shape) == (
        shapes.in_features["embed"],
        shapes.out_features["embed"],
    )
    assert (shapes.out_features["lm_head"], shapes.in_features["lm_head"]) == (320, 64)
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers]
    if family.startswith("qwen"):
        assert [spec.window(layer) for layer in range(2)] == windows
    elif family == "mistral":
        assert [spec.window(layer) for layer in range(2)] == [8, 8]


def test_eos_ids_are_joined_with_the_generation_configs_first() -> None:
    spec = ModelSpec.from_hf_config(LLAMA | {"eos_token_id": 2}, {"eos_token_id": [5, 2, 7]})
    assert spec.eos_token_ids == (5, 2, 7)


def test_old_and_new_spelling_of_rope_mean_the_same() -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **llama3}}
    older = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **llama3}}
    new = LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **llama3}}
    specs = {ModelSpec.from_hf_config(config).rope for config in (old, older, new)}
    assert specs == {RopeSpec(theta=5e5, kind="llama3", factor=8.0, original_max_position=64)}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "truncate": False},
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "attention_factor": 0.9},
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
    ],
    ids=lambda rope: "-".join(map(str, rope.values())),
)
@pytest.mark.parametrize(("theta", "head_dim"), [(10_000.0, 64), (1_000_000.0, 128)])
def test_frequencies_are_those_of_transformers(rope: dict[str, Any], theta: float, head_dim: int) -> None:
    config = LLAMA | {
        "rope_parameters": rope | {"rope_theta": theta},
        "head_dim": head_dim,
        "max_position_embeddings": 131072,
    }
    hf_config = transformers.AutoConfig.for_model(**config)
    if rope["rope_type"] == "default":
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf_config)
        expected, scaling = rotary.inv_freq, rotary.attention_scaling
    else:
        expected, scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf_config, torch.device("cpu"))
    got, got_scaling = rope_inv_freq(ModelSpec.from_hf_config(config).rope, head_dim)
    assert len(got) == head_dim // 2
    np.testing.assert_allclose(got, expected.double().numpy(), rtol=2e-6)  # theirs are rounded to fp32 on the way
    assert got_scaling == pytest.approx(scaling, rel=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "sliding_window": 32},
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 32},
        {
            "use_sliding_window": True,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ],
)
@pytest.mark.parametrize("base", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_qwen_windows_are_those_of_transformers(base: dict[str, Any], changes: dict[str, Any]) -> None:
    config = base | changes
    layer_types = transformers.AutoConfig.for_model(**config).layer_types
    spec = ModelSpec.from_hf_config(config)
    assert list(spec.layer_types) == layer_types
    assert [spec.window(layer) for layer in range(2)] == [32 if t == "sliding_attention" else None for t in layer_types]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_hidden_layers": 9},
        {"no_rope_layer_interval": 3},
        {"no_rope_layers": [0, 1, 1, 1, 0]},
        {"use_sliding_window": True, "sliding_window": 16},
        {"use_sliding_window": False, "sliding_window": 16},
    ],
)
def test_smollm3_layers_are_those_of_transformers(changes: dict[str, Any]) -> None:
    given = SMOLLM3 | {"num_hidden_layers": 5} | changes
    config, spec = transformers.AutoConfig.for_model(**given), ModelSpec.from_hf_config(given)
    assert [rope is not None for rope in spec.layer_ropes] == [bool(rotated) for rotated in config.no_rope_layers]
    assert list(spec.layer_types) == config.layer_types


def test_mistral_windows() -> None:
    assert ModelSpec.from_hf_config(MISTRAL | {"sliding_window": None}).window(0) is None
    assert ModelSpec.from_hf_config(MISTRAL | {"sliding_window": 16}).window(1) == 16


def test_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(UnsupportedModel, match="GemmaForCausalLM") as caught:
        ModelSpec.from_hf_config({"architectures": ["GemmaForCausalLM"]}, what="/models/gemma")
    assert str(caught.value).startswith("/models/gemma is not supported")
    for architecture in ARCHITECTURES:
        assert architecture in str(caught.value)


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (LLAMA, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type `dynamic`"),
        (LLAMA, {"rope_scaling": {"rope_type": "longrope"}}, "rope type `longrope`"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "without its `factor`"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mystery": 1}}, "`mystery`"),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ between layer types"),
        (LLAMA, {"rope_parameters": {"rope_theta": -1.0}}, "positive number"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial rotary"),
        (LLAMA, {"hidden_act": "gelu"}, "activation `gelu`"),
        (LLAMA, {"pretraining_tp": 2}, "`pretraining_tp`"),
        (LLAMA, {"attn_logit_softcapping": 50.0}, "`attn_logit_softcapping`"),
        (LLAMA, {"num_local_experts": 8}, "`num_local_experts`"),
        (LLAMA, {"sliding_window": 64}, "sliding window"),
        (LLAMA, {"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "custom model code"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantisation method `gptq`"),
        (LLAMA, {"quantization_config": BNB | {"load_in_4bit": False}}, "not 4-bit"),
        (LLAMA, {"quantization_config": BNB | {"bnb_4bit_quant_type": "fp4"}}, "`fp4`"),
        (LLAMA, {"hidden_size": None}, "`hidden_size` is missing"),
        (LLAMA, {"num_attention_heads": "4"}, "positive integer"),
        (LLAMA, {"num_key_value_heads": 3}, "not a multiple of 3"),
        (LLAMA, {"torch_dtype": "float8_e4m3fn"}, "float8"),
        (LLAMA, {"model_type": "mixtral"}, "model_type `mixtral`"),
        (MISTRAL, {"attention_bias": True}, "attention biases"),
        (MISTRAL, {"num_key_value_heads": None}, "`num_key_value_heads` is missing"),
        (MISTRAL, {"layer_types": ["full_attention", "sliding_attention"]}, "`layer_types`"),
        (QWEN2, {"mlp_bias": True}, "MLP biases"),
        (QWEN2, {"dual_chunk_attention_config": {"chunk_size": 1}}, "`dual_chunk_attention_config`"),
        (QWEN3, {"layer_types": ["full_attention", "linear_attention"]}, "layer types"),
        (QWEN3, {"layer_types": ["full_attention"]}, "1 layers of 2"),
        (QWEN3, {"layer_types": ["full_attention", "sliding_attention"]}, "no sliding window"),
        (LLAMA, {"no_rope_layers": [1, 0]}, "`no_rope_layers`"),
        (SMOLLM3, {"no_rope_layers": [1]}, "`no_rope_layers` names 1 layers of 2"),
        (SMOLLM3, {"no_rope_layers": [1, 2]}, "`no_rope_layers` must be a list"),
        (SMOLLM3, {"no_rope_layer_interval": 0}, "`no_rope_layer_interval`"),
        (SMOLLM3, {"layer_types": ["full_attention", "sliding_attention"]}, "no sliding window"),
        (SMOLLM3, {"num_key_value_heads": None}, "`num_key_value_heads` is missing"),
        (
            PHI3,
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
            "`longrope`",
        ),
        (PHI3, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type `yarn` in a Phi-3 model"),
        (PHI3, {"partial_rotary_factor": 0.75}, "`partial_rotary_factor` 0.75"),
        (PHI3, {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3Other"}}, "custom model code"),
        (PHI3, {"auto_map": "modeling_phi3.Phi3ForCausalLM"}, "custom model code"),
        (PHI3, {"attention_bias": True}, "`attention_bias` in a Phi-3 model"),
        (PHI3, {"layer_types": ["full_attention"] * 2}, "`layer_types` in a Phi-3 model"),
        (PHI3, {"hidden_act": "gelu_new"}, "activation `gelu_new`"),
        (GEMMA2, {"hidden_act": "silu"}, "activation `silu`"),
        (GEMMA2, {"hidden_activation": "gelu"}, r"activation `gelu` \(known: gelu_pytorch_tanh\)"),
        (GEMMA2, {"use_bidirectional_attention": True}, "`use_bidirectional_attention`"),
        (GEMMA2, {"attn_logit_softcapping": -1.0}, "`attn_logit_softcapping` must be a positive number"),
        (GEMMA2, {"final_logit_softcapping": "30"}, "`final_logit_softcapping` must be a positive number"),
        (GEMMA2, {"query_pre_attn_scalar": None}, "`query_pre_attn_scalar` must be a positive number"),
        (GEMMA2, {"layer_types": ["chunked_attention"] * 2}, "layer types"),
        (GEMMA2, {"sliding_window": None}, "no sliding window"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "`attn_logit_softcapping` = 50.0"),
        (GEMMA3, {"rope_parameters": {"rope_theta": 5.0}}, "not by layer type"),
        (GEMMA3, {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "rope type `dynamic`"),
        (GEMMA3, {"rope_local_base_freq": -1}, "`rope_theta` must be a positive number"),
        (GEMMA3, {"sliding_window_pattern": "LLLLLG"}, "`sliding_window_pattern` must be a positive integer"),
        (GPT2, {"n_embd": None}, "config key `n_embd` is missing"),
        (GPT2, {"activation_function": "relu"}, r"activation `relu` \(known: gelu_new\)"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "`scale_attn_by_inverse_layer_idx`"),
        (GPT2, {"reorder_and_upcast_attn": True}, "`reorder_and_upcast_attn`"),
        (GPT2, {"add_cross_attention": True}, "`add_cross_attention`"),
        (GPT2, {"n_head": 5}, "`n_embd` 64 is not a multiple of `n_head` 5"),
        (GPT2, {"num_key_value_heads": 2}, "`num_key_value_heads` in a GPT-2 model"),
        (GPT2, {"layer_norm_epsilon": -1.0}, "`layer_norm_epsilon` must be"),
        (GPT2, {"architectures": ["GPT2DoubleHeadsModel"]}, "GPT2DoubleHeadsModel is not one of"),
        (GEMMA3, {"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration is not one of"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_features_that_would_not_be_applied_are_refused(
    base: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        ModelSpec.from_hf_config(base | changes)


def test_every_reason_is_in_one_message() -> None:
    config = LLAMA | {"hidden_act": "gelu", "pretraining_tp": 4, "rope_scaling": {"type": "ntk"}}
    with pytest.raises(UnsupportedModel) as caught:
        ModelSpec.from_hf_config(config)
    assert len(caught.value.reasons) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"pretraining_tp": 1, "use_cache": True, "attention_dropout": 0.0, "initializer_range": 0.02},
        {"quantization_config": BNB | {"bnb_4bit_quant_type": "nf4"}},
        {"rope_scaling": None, "sliding_window": None, "num_local_experts": 0},
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "finetuned": True}},
    ],
)
def test_features_that_change_nothing_are_not_refused(changes: dict[str, Any]) -> None:
    ModelSpec.from_hf_config(LLAMA | changes)


def test_microsofts_copies_of_the_phi3_classes_are_not_custom_code() -> None:
    """Their checkpoints name them in `auto_map`; transformers has the same classes, and they are what is computed."""
    named = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    assert ModelSpec.from_hf_config(PHI3 | {"auto_map": named}) == ModelSpec.from_hf_config(PHI3)


def test_phi3_windows_are_every_layers() -> None:
    spec = ModelSpec.from_hf_config(PHI3 | {"sliding_window": 16})
    assert [spec.window(layer) for layer in range(2)] == [16, 16]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("hidden", [64, 1152, 2304, 2560, 3072, 3584, 5376])
def test_gemmas_embedding_scale_is_rounded_as_transformers_rounds_it(hidden: int, dtype: str) -> None:
    """To the type that the model was trained in: sqrt(3072) is 55.5 in bf16."""
    embedding = transformers.models.gemma2.modeling_gemma2.Gemma2TextScaledWordEmbedding(4, 8, 0, hidden**0.5)
    rounded = embedding.embed_scale.to(getattr(torch, dtype))
    spec = ModelSpec.from_hf_config(GEMMA2 | {"hidden_size": hidden, "torch_dtype": dtype})
    assert torch.tensor(spec.embed_scale, dtype=torch.float32) == rounded.float()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window_pattern": 2},
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}},
        {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 5.0}}},
    ],
)
def test_gemma3_layers_are_those_of_transformers(changes: dict[str, Any]) -> None:
    given = GEMMA3 | {"num_hidden_layers": 7} | changes
    config, spec = transformers.AutoConfig.for_model(**given), ModelSpec.from_hf_config(given)
    assert list(spec.layer_types) == config.layer_types
    for kind, rope in zip(spec.layer_types, spec.layer_ropes, strict=True):
        theirs = config.rope_parameters[kind]
        assert rope is not None
        assert (rope.theta, rope.kind) == (theirs["rope_theta"], theirs["rope_type"])
        assert rope.factor == theirs.get("factor", 1.0)


@pytest.mark.parametrize("changes", [{}, {"n_inner": 100}, {"scale_attn_weights": False}, {"layer_norm_epsilon": 1e-3}])
def test_gpt2_sizes_are_those_of_transformers(changes: dict[str, Any]) -> None:
    spec = ModelSpec.from_hf_config(GPT2 | changes)
    config = transformers.AutoConfig.for_model(**GPT2, **changes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    block = model.transformer.h[1]
    assert spec.intermediate_size == block.mlp.c_fc.nf
    assert spec.rms_norm_eps == block.ln_2.eps
    assert (spec.attention_scale or spec.head_dim**-0.5) == block.attn.scaling
    assert spec.max_position == model.transformer.wpe.num_embeddings
    assert spec.tie_embeddings == config.tie_word_embeddings
    assert spec.layer_ropes == (None, None)
