"""Everything wrong with an adapter's tensors is found at load, and all of it is in one message."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.adapters.errors import AdapterRefused, AdapterSourceNotFound
from manylora.adapters.peft_loader import inspect_peft_adapter, load_peft_adapter
from tests.adapters.peft_dirs import SHAPES, plain_config, plain_tensors, write_dir

Tensors = dict[str, torch.Tensor]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
EMBED = "base_model.model.model.embed_tokens"
UNANNOUNCED = "tensors that the config does not announce"


def refusal(path: Path, **kwargs: Any) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as caught:
        load_peft_adapter(path, SHAPES, **kwargs)
    return caught.value


def extra(name: str, shape: tuple[int, ...] = (2,)) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


def without(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


def poke(name: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][1, 2] = value

    return change


CASES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no B": (without(f"{Q0}.lora_B.weight"), "layers.0.self_attn.q_proj has no lora_B.weight"),
    "no A": (without(f"{Q0}.lora_A.weight"), "layers.0.self_attn.q_proj has no lora_A.weight"),
    "wrong in": (
        put(f"{Q0}.lora_A.weight", torch.ones(4, 33)),
        f"{Q0}.lora_A.weight has shape [4, 33], expected [4, 32]",
    ),
    "wrong out": (
        put(f"{Q0}.lora_B.weight", torch.ones(16, 4)),
        f"{Q0}.lora_B.weight has shape [16, 4], expected [32, 4]",
    ),
    "wrong rank": (
        put(f"{Q0}.lora_A.weight", torch.ones(8, 32)),
        "expected [4, 32] (rank 8 in the file, 4 by the config's r and rank_pattern)",
    ),
    "one dimension": (put(f"{Q0}.lora_A.weight", torch.ones(128)), "has shape [128], expected [4, 32]"),
    "empty (DeepSpeed)": (put(f"{Q0}.lora_A.weight", torch.ones(0)), "has shape [0], expected [4, 32]"),
    "layer out of range": (
        extra("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight", (4, 32)),
        "layers that the base does not have (its layers are 0 to 1)",
    ),
    "unmatched module": (
        extra("base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight", (4, 32)),
        "tensors that match no module of the base",
    ),
    "not targeted": (
        lambda t: t.update(
            {
                "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 32),
                "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": torch.ones(48, 4),
            }
        ),
        "modules that have tensors and that the config does not target (PEFT would skip them): "
        "model.layers.0.mlp.up_proj",
    ),
    "targeted without tensors": (
        lambda t: [t.pop(f"{Q0}.lora_{side}.weight") for side in "AB"],
        "modules that the config targets and that have no tensors: model.layers.0.self_attn.q_proj",
    ),
    "NaN": (poke(f"{Q0}.lora_A.weight", float("nan")), f"values that are not finite: 1 in {Q0}.lora_A.weight"),
    "infinity": (poke(f"{Q0}.lora_B.weight", float("-inf")), f"values that are not finite: 1 in {Q0}.lora_B.weight"),
    "float64": (
        lambda t: t.update({f"{Q0}.lora_A.weight": t[f"{Q0}.lora_A.weight"].double()}),
        f"dtype that is not served (F32, F16, BF16 are): {Q0}.lora_A.weight is F64",
    ),
    "int8": (put(f"{Q0}.lora_A.weight", torch.ones(4, 32, dtype=torch.int8)), "lora_A.weight is I8"),
    "all of B zero": (
        lambda t: [t[k].zero_() for k in t if "lora_B" in k],
        "nothing to apply: the delta is exactly zero in every module",
    ),
    "all of A zero": (
        lambda t: [t[k].zero_() for k in t if "lora_A" in k],
        "nothing to apply: the delta is exactly zero in every module",
    ),
    "A and B never meet": (
        lambda t: [t[k][:2].zero_() if "lora_A" in k else t[k][:, 2:].zero_() for k in t],
        "nothing to apply: the delta is exactly zero in every module",
    ),
    "DoRA": (
        extra(f"{Q0}.lora_magnitude_vector", (32,)),
        f"{UNANNOUNCED}: {Q0}.lora_magnitude_vector (use_dora is not set)",
    ),
    "lora_bias": (
        extra(f"{Q0}.lora_B.bias", (32,)),
        f"{UNANNOUNCED}: {Q0}.lora_B.bias (lora_bias is not set)",
    ),
    "bias": (
        extra(f"{Q0}.base_layer.bias", (32,)),
        "does not announce (its bias is none)",
    ),
    "token deltas": (
        extra(f"{EMBED}.token_adapter.trainable_tokens_delta"),
        "retrained tokens that the config does",
    ),
    "modules_to_save": (
        extra("base_model.model.score.modules_to_save.weight"),
        "under PEFT's inner names",
    ),
    "KaSA": (extra(f"{Q0}.lora_diag", (4,)), "tensors with KaSA singular values"),
    "AdaLoRA": (extra(f"{Q0}.lora_E", (4, 1)), "tensors of AdaLoRA, in an adapter of another type"),
    "adapter name left in": (extra(f"{Q0}.lora_A.default.weight"), "save the adapter with PEFT's save_pretrained"),
    "no prefix": (
        extra("model.layers.0.self_attn.q_proj.lora_A.weight"),
        "tensors without the prefix base_model.model.",
    ),
    "lm_head replaced": (
        extra("base_model.model.lm_head.weight", (64, 32)),
        "whole weights, which are not served unless equal to the base's: base_model.model.lm_head.weight",
    ),
    "resized vocabulary": (
        extra(f"{EMBED}.weight", (66, 32)),
        f"{EMBED}.weight has shape [66, 32], the base's is [64, 32] (was the vocabulary resized",
    ),
    "embedding spelled as linear": (extra(f"{EMBED}.lora_A.weight", (4, 64)), "tensors that match no module"),
    "linear spelled as embedding": (extra(f"{Q0}.lora_embedding_A", (4, 32)), "tensors that match no module"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    change, reason = CASES[name]
    tensors = plain_tensors()
    change(tensors)
    error = refusal(write_dir(tmp_path, tensors=tensors))
    assert any(reason in found for found in error.reasons), str(error)
    assert str(tmp_path) in str(error)


def test_the_plain_one_is_accepted(tmp_path: Path) -> None:
    adapter = load_peft_adapter(write_dir(tmp_path), SHAPES, base_name="/models/Tiny/")
    assert set(adapter.lora.pairs) == {(p, layer) for p in ("q", "v") for layer in (0, 1)}
    assert adapter.report.warnings == ()
    assert adapter.max_rank == 4
    assert adapter.nbytes == adapter.report.nbytes


def test_no_tensors_at_all(tmp_path: Path) -> None:
    error = refusal(write_dir(tmp_path, tensors={}))
    assert any("nothing to apply" in reason for reason in error.reasons)


def test_alpha_zero_is_a_delta_of_zero(tmp_path: Path) -> None:
    assert "exactly zero" in str(refusal(write_dir(tmp_path, plain_config(lora_alpha=0))))


def test_a_delta_of_zero_is_told_beside_other_reasons(tmp_path: Path) -> None:
    tensors = {name: value * ("lora_A" in name) for name, value in plain_tensors().items()} | {"x": torch.ones(1)}
    found = refusal(write_dir(tmp_path, tensors=tensors)).reasons
    assert len(found) == 2
    assert found[1].startswith("nothing to apply: the delta is exactly zero in every module")


def test_one_zero_module_is_a_warning(tmp_path: Path) -> None:
    tensors = plain_tensors()
    tensors[f"{Q0}.lora_B.weight"].zero_()
    (warning,) = load_peft_adapter(write_dir(tmp_path, tensors=tensors), SHAPES).report.warnings
    assert warning == "the delta is exactly zero in model.layers.0.self_attn.q_proj"


def test_every_reason_in_one_message(tmp_path: Path) -> None:
    tensors = plain_tensors()
    for name in ("no B", "layer out of range", "DoRA", "no prefix"):
        CASES[name][0](tensors)
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"][0, 0] = float("nan")
    config = plain_config(use_qalora=True, init_lora_weights="pissa", base_model_name_or_path="org/other")
    error = refusal(write_dir(tmp_path, config, tensors), base_name="org/tiny", strict_base=True)
    assert len(error.reasons) == 8, str(error)


def test_many_of_a_kind_are_counted(tmp_path: Path) -> None:
    tensors = plain_tensors() | {f"other.{i}": torch.ones(1) for i in range(10)}
    (reason,) = refusal(write_dir(tmp_path, tensors=tensors)).reasons
    assert reason.endswith(" and 6 more")


def test_tensors_of_a_refused_feature_are_not_reported_twice(tmp_path: Path) -> None:
    tensors = plain_tensors() | {f"{Q0}.lora_diag": torch.ones(4)}
    (reason,) = refusal(write_dir(tmp_path, plain_config(kasa_config={}), tensors)).reasons
    assert reason.startswith("kasa_config = {}")


def test_rank_pattern_disagrees_with_the_tensors(tmp_path: Path) -> None:
    error = refusal(write_dir(tmp_path, plain_config(rank_pattern={"q_proj": 8})))
    assert "rank 4 in the file, 8 by the config's r and rank_pattern" in str(error)


@pytest.mark.parametrize(
    ("trained_on", "served", "differs"),
    [
        ("org/tiny", "org/tiny", False),
        ("org/tiny", "/models/tiny/", False),
        ("C:\\models\\Tiny", "org/tiny", False),
        ("org/tiny-2", "org/tiny", True),
        (None, "org/tiny", True),
        ("", "org/tiny", True),
        ("org/other", None, False),
    ],
)
def test_trained_on_another_base(trained_on: str | None, served: str | None, differs: bool, tmp_path: Path) -> None:
    path = write_dir(tmp_path, plain_config(base_model_name_or_path=trained_on))
    assert bool(load_peft_adapter(path, SHAPES, base_name=served).report.warnings) == differs
    if differs:
        assert len(refusal(path, base_name=served, strict_base=True).reasons) == 1
    else:
        load_peft_adapter(path, SHAPES, base_name=served, strict_base=True)


def test_target_that_matches_nothing_is_a_warning(tmp_path: Path) -> None:
    path = write_dir(tmp_path, plain_config(target_modules=["q_proj", "v_proj", "c_attn"]))
    assert load_peft_adapter(path, SHAPES).report.warnings == (
        "target_modules that match no module of the base: c_attn",
    )


# --- files ---------------------------------------------------------------------------------------------------------


def test_pickle_is_never_loaded(tmp_path: Path) -> None:
    write_dir(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    error = refusal(tmp_path)
    assert "adapter_model.bin, a pickle" in str(error)
    assert "save_file" in str(error)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(AdapterSourceNotFound, match="is not a directory"):
        load_peft_adapter(tmp_path / "nowhere", SHAPES)
    with pytest.raises(AdapterSourceNotFound, match=r"holds no adapter_config\.json"):
        load_peft_adapter(tmp_path, SHAPES)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterSourceNotFound, match=r"no adapter_model\.safetensors"):
        load_peft_adapter(tmp_path, SHAPES)


def test_truncated_weights(tmp_path: Path) -> None:
    write_dir(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        (reason,) = refusal(tmp_path).reasons
        assert reason.startswith("adapter_model.safetensors is corrupt")


def test_corrupt_config(tmp_path: Path) -> None:
    (reason,) = refusal(write_dir(tmp_path, "{'r': 4}")).reasons
    assert reason.startswith("adapter_config.json is not valid JSON")


def test_version_is_that_of_the_content(tmp_path: Path) -> None:
    def version(path: Path) -> str:
        return load_peft_adapter(path, SHAPES).version

    first = version(write_dir(tmp_path / "a"))
    assert len(first) == 64
    assert version(write_dir(tmp_path / "b")) == first
    assert version(write_dir(tmp_path / "c", plain_config(lora_alpha=9))) != first
    assert version(write_dir(tmp_path / "d", tensors=plain_tensors(seed=1))) != first
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ messages }}")
    assert version(tmp_path / "b") != first


def test_the_directory_may_go_away(tmp_path: Path) -> None:
    tensors = plain_tensors()
    adapter = load_peft_adapter(write_dir(tmp_path / "a", tensors=tensors), SHAPES)
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(b"\0" * weights.stat().st_size)
    shutil.rmtree(tmp_path / "a")
    assert torch.equal(adapter.lora.pairs["q", 0].a, tensors[f"{Q0}.lora_A.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_of_the_file_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = plain_tensors(dtype=dtype)
    adapter = load_peft_adapter(write_dir(tmp_path, tensors=tensors), SHAPES)
    assert torch.equal(adapter.lora.pairs["q", 0].b, tensors[f"{Q0}.lora_B.weight"])
    assert adapter.report.dtype == str(dtype).removeprefix("torch.")
    assert all(t.is_contiguous() for pair in adapter.lora.pairs.values() for t in (pair.a, pair.b))


@pytest.mark.parametrize(
    ("name", "text", "template"),
    [
        ("chat_template.jinja", "{{ x }}", "{{ x }}"),
        ("tokenizer_config.json", '{"chat_template": "{{ y }}"}', "{{ y }}"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default", "template": "{{ z }}"}]}', "{{ z }}"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "tool_use", "template": "{{ z }}"}]}', None),
        ("tokenizer_config.json", '{"model_max_length": 1}', None),
    ],
)
def test_chat_template(name: str, text: str, template: str | None, tmp_path: Path) -> None:
    (write_dir(tmp_path) / name).write_text(text)
    assert load_peft_adapter(tmp_path, SHAPES).chat_template == template


def test_malformed_tokenizer_config(tmp_path: Path) -> None:
    (write_dir(tmp_path) / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json is not valid JSON" in str(refusal(tmp_path))


def test_inspect_needs_no_base(tmp_path: Path) -> None:
    facts = inspect_peft_adapter(write_dir(tmp_path, plain_config(use_qalora=True)))
    assert facts.version == inspect_peft_adapter(tmp_path).version
    assert facts.base_model == "org/tiny"
    assert facts.config is not None
    assert facts.config.r == 4
    assert len(facts.tensors) == 8
    assert len(facts.reasons) == 1
    assert facts.kind == "LoRA"
